"""How weights are rounded to what a spec allows: to nearest, or by the error of their outputs."""

from qcompile.quant.rounding.block_multipliers import BlockMultipliers, rebased, with_multipliers
from qcompile.quant.rounding.few_bits import RoundingProblem, few_bits_rounded
from qcompile.quant.rounding.gptq import compensated
from qcompile.quant.rounding.lattice import Lattice, Zero, fitted
from qcompile.quant.rounding.lattice_search import searched
from qcompile.quant.rounding.nearest import nearest

__all__ = [
    "BlockMultipliers",
    "Lattice",
    "RoundingProblem",
    "Zero",
    "compensated",
    "few_bits_rounded",
    "fitted",
    "nearest",
    "rebased",
    "searched",
    "with_multipliers",
]
