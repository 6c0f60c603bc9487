"""Arithmetic of quantization: what passes and calibrators import."""

from qcompile.quant.affine import dequantize, out_of_scale, qparams, quantize, sqnr_db
from qcompile.quant.channel_statistics import FEWEST_ROWS, ChannelStats
from qcompile.quant.gptq import compensated
from qcompile.quant.observer import Calibrator, Observer
from qcompile.quant.pair_order import pair_order
from qcompile.quant.ranges import ENOUGH_VALUES, Ranges, StatRequest, widened
from qcompile.quant.types import Array, Floats, QParams, QSpec, Range
from qcompile.quant.weight_rounding import PAIR_SUM, Rounded, nearest, real, worst_sums

__all__ = [
    "ENOUGH_VALUES",
    "FEWEST_ROWS",
    "PAIR_SUM",
    "Array",
    "Calibrator",
    "ChannelStats",
    "Floats",
    "Observer",
    "QParams",
    "QSpec",
    "Range",
    "Ranges",
    "Rounded",
    "StatRequest",
    "compensated",
    "dequantize",
    "nearest",
    "out_of_scale",
    "pair_order",
    "qparams",
    "quantize",
    "real",
    "sqnr_db",
    "widened",
    "worst_sums",
]
