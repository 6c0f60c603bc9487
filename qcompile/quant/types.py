"""What a tensor is quantized to: integer type, granularity, ranges, scales and zero points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
DType = Literal["int8", "uint8", "int16", "uint16"]
Granularity = Literal["tensor", "channel"]
_LIMITS: dict[str, tuple[int, int]] = {
    "int8": (-128, 127),
    "uint8": (0, 255),
    "int16": (-32768, 32767),
    "uint16": (0, 65535),
}


FEW_BITS = range(2, 8)  # widths of codes for which there is no type of that many bits to compute in
# Two products of uint8 by these fit into int16: 255 · 64 · 2 < 2^15.
_REDUCED = (-64, 64)


@dataclass(frozen=True)
class QSpec:
    """How one tensor is quantized.

    ``axis`` counts from the front for weights and from the back (negative) for activations, whose
    leading dimensions vary. ``narrow`` does not use the most negative integer, so that symmetric
    ranges stay symmetric. ``reduced``: int8 from -64 to 64, so 7 bits (by the scale of a constant;
    activations are clipped, since QuantizeLinear saturates at 8 bits). ``paired``: int8 weights in
    which two values of one sign that are summed as neighbours (rows 2i and 2i + 1 of a matrix
    multiplication or convolution) add up to at most 128, so that the sum of both products with
    uint8 data fits into int16. ``width``: bits of a code in the file, 2 to 7, of an int8 weight
    whose values are codes, or with ``block`` codes times a small integer for each ``block`` values
    along the other axis (docs/lowbit.md). ``half_scale``: scales are float16 numbers. Raises
    ValueError on combinations that make no sense.
    """

    dtype: DType
    symmetric: bool
    granularity: Granularity = "tensor"
    axis: int | None = None
    narrow: bool = False
    reduced: bool = False
    paired: bool = False
    width: int | None = None
    block: int | None = None
    half_scale: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in _LIMITS:
            raise ValueError(
                f"unknown integer type {self.dtype!r}, expected one of {list(_LIMITS)}"
            )
        if self.reduced and self.dtype != "int8":
            raise ValueError(f"reduced range is for int8, not {self.dtype}")
        if self.paired and (self.dtype != "int8" or not self.symmetric or self.axis is None):
            raise ValueError(f"a bound on pairs is for symmetric int8 by channel, not {self}")
        if self.width is not None:
            if self.width not in FEW_BITS:
                raise ValueError(f"a code has {self.width} bits, expected 2 to 7")
            if self.dtype != "int8" or not self.symmetric or self.axis is None:
                raise ValueError(f"few bits are for symmetric int8 by channel, not {self.dtype}")
            if self.reduced or self.paired:
                raise ValueError("values of few bits need no other bound")
        elif self.block is not None:
            raise ValueError("blocks are for weights of few bits")
        if (self.granularity == "tensor") != (self.axis is None):
            raise ValueError(f"granularity {self.granularity!r} does not go with axis {self.axis}")

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest integer in use."""
        if self.reduced:
            return _REDUCED
        low, high = _LIMITS[self.dtype]
        return (low + 1, high) if self.narrow and low < 0 else (low, high)

    @property
    def bits(self) -> int:
        """Width of one value in the file, without what its block or channel adds."""
        return self.width or np.dtype(self.dtype).itemsize * 8

    def __str__(self) -> str:
        sign = "sym" if self.symmetric else "asym"
        where = self.granularity if self.axis is None else f"{self.granularity}[{self.axis}]"
        bound = ":7-bit" if self.reduced else ":pairs" if self.paired else ""
        if self.width is not None:
            bound = f":{self.width}-bit" + (f":block {self.block}" if self.block else "")
        return f"{self.dtype}:{sign}:{where}{bound}"


@dataclass(frozen=True)
class Range:
    """The interval of values to represent, per channel along ``axis`` where that is set.

    Shapes: scalars (``()``) without axis, else ``(channels,)``. Raises ValueError on NaN, infinite
    or inverted bounds.
    """

    lo: Array
    hi: Array
    axis: int | None = None

    def __post_init__(self) -> None:
        lo, hi = np.asarray(self.lo, np.float64), np.asarray(self.hi, np.float64)
        object.__setattr__(self, "lo", lo)
        object.__setattr__(self, "hi", hi)
        if lo.shape != hi.shape or lo.ndim != (0 if self.axis is None else 1):
            raise ValueError(f"range shapes {lo.shape} and {hi.shape} do not fit axis {self.axis}")
        if not (np.isfinite(lo).all() and np.isfinite(hi).all()):
            raise ValueError("range holds NaN or infinity")
        if (lo > hi).any():
            raise ValueError("range is inverted")


@dataclass(frozen=True)
class QParams:
    """Scale (float32) and zero point (integer) of one tensor, and the spec they belong to."""

    scale: Floats
    zero_point: Array
    spec: QSpec

    @property
    def per_axis(self) -> bool:
        return self.scale.ndim > 0
