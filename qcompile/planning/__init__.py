"""What becomes of each tensor: what a pass imports."""

from qcompile.planning.block_rows import BlockRows, block_rows, fitting_block
from qcompile.planning.context import Context, PassSettings, PrecisionRule, Skip
from qcompile.planning.half_quantizers import float32_quantizers, operand_dequantizers
from qcompile.planning.linear_groups import LinearGroup, QuantizedLinear, add_to_bias, linear_groups
from qcompile.planning.plan import Decision, Kind, Plan, Use, uses_of
from qcompile.planning.precision import PrecisionChoice
from qcompile.planning.quantizer_nodes import (
    dequantized_activation,
    dequantized_weight,
    float_without_range,
)

__all__ = [
    "BlockRows",
    "Context",
    "Decision",
    "Kind",
    "LinearGroup",
    "PassSettings",
    "Plan",
    "PrecisionChoice",
    "PrecisionRule",
    "QuantizedLinear",
    "Skip",
    "Use",
    "dequantized_activation",
    "add_to_bias",
    "block_rows",
    "fitting_block",
    "float32_quantizers",
    "float_without_range",
    "linear_groups",
    "operand_dequantizers",
    "uses_of",
    "dequantized_weight",
]
