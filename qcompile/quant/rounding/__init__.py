"""How weights are rounded to what a spec allows: to nearest, or by the error of their outputs."""

from qcompile.quant.rounding.block_multipliers import SEVEN_BITS
from qcompile.quant.rounding.few_bits import RoundingProblem, few_bits_rounded
from qcompile.quant.rounding.gptq import compensated
from qcompile.quant.rounding.nearest import nearest

__all__ = ["SEVEN_BITS", "RoundingProblem", "compensated", "few_bits_rounded", "nearest"]
