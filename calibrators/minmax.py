"""Min-max: the range is the smallest and the largest value seen. Nothing is clipped.

Source: the default of every post-training quantizer, for example ``MinMaxCalibrater`` in ONNX
Runtime and ``allminmax`` in Qualcomm's transformer-quantization. One outlier sets the scale of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from qcompile.calibrators._extrema import ExtremaObserver
from qcompile.quant import Calibrator, QSpec


@dataclass(frozen=True)
class MinMax(Calibrator):
    """Smallest and largest value, per tensor or per channel."""

    name: ClassVar[str] = "minmax"
    needs: ClassVar[Literal["extrema", "values"]] = "extrema"

    def observer(self, spec: QSpec) -> ExtremaObserver:
        """A fresh observer; its range holds every value seen."""
        return ExtremaObserver(self, spec)
