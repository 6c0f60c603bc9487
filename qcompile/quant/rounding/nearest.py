"""Rounding of a weight to nearest, whatever its spec."""

from __future__ import annotations

from qcompile.quant.rounding.few_bits import few_bits_nearest
from qcompile.quant.types import Array, QSpec
from qcompile.quant.weight_rounding import Rounded, nearest_step


def nearest(values: Array, spec: QSpec) -> Rounded:
    """Each value rounded to its nearest one that ``spec`` allows.

    Scales are those of the weight's extrema at 8 and 16 bits, and of least squared error at fewer.
    Raises ValueError where the weight is empty or holds NaN or infinity.
    """
    return nearest_step(values, spec) if spec.width is None else few_bits_nearest(values, spec)
