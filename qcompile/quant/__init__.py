"""Arithmetic of quantization: what passes and calibrators import."""

from qcompile.quant.affine import dequantize, out_of_scale, qparams, quantize, sqnr_db
from qcompile.quant.channel_statistics import FEWEST_ROWS, ChannelStats
from qcompile.quant.observer import Calibrator, Observer
from qcompile.quant.packing import nibbles, packed
from qcompile.quant.pair_order import pair_order
from qcompile.quant.ranges import ENOUGH_VALUES, Ranges, StatRequest, widened
from qcompile.quant.stored_codes import LEAST_SAVED, StoredCodes, repeated_rows, stored_codes
from qcompile.quant.types import Array, Floats, QParams, QSpec, Range
from qcompile.quant.weight_rounding import PAIR_SUM, Rounded, real, worst_sums

__all__ = [
    "Array",
    "Calibrator",
    "ChannelStats",
    "ENOUGH_VALUES",
    "FEWEST_ROWS",
    "Floats",
    "LEAST_SAVED",
    "Observer",
    "PAIR_SUM",
    "QParams",
    "QSpec",
    "Range",
    "Ranges",
    "Rounded",
    "StatRequest",
    "StoredCodes",
    "dequantize",
    "nibbles",
    "out_of_scale",
    "packed",
    "pair_order",
    "qparams",
    "quantize",
    "real",
    "repeated_rows",
    "sqnr_db",
    "stored_codes",
    "widened",
    "worst_sums",
]
