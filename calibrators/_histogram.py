"""A histogram that depends only on the values seen, not on how they are batched or ordered.

Bins are ``[i 2^k, (i + 1) 2^k)``: a value falls into bin ``floor(x / 2^k)``, exactly, since scaling
by a power of two is exact. The exponent k is the smallest for which the bins from minimum to
maximum fit the number allowed. When the range grows, k grows and pairs of bins are merged exactly
(``i >> 1``), so the counts equal those of a histogram that knew the final range from the start.
Merging two histograms therefore equals, bit for bit, one histogram of all values. (Where the first
batch sets the bin width, as in PyTorch or ONNX Runtime, the order of batches matters.)
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt

from qcompile.calibrators._extrema import ExtremaObserver
from qcompile.quant import Array, Calibrator, Floats, QSpec

Ints = npt.NDArray[np.int64]

_FEWEST_BINS, _MOST_BINS = 256, 2**20
# A per-channel histogram gets an eighth of the bins, so that 1000 channels need about 8 MB.
_CHANNEL_SHARE = 8
# Bins narrower than the spacing of float32 values add no information, only huge indices.
_MANTISSA_BITS, _SMALLEST_EXPONENT = 24, -126
_EXPONENT_OF_ZERO = -10_000
_CHUNK = 1 << 16  # values counted at once: temporaries stay in cache


@dataclass(frozen=True)
class Bins:
    """The histogram of one channel, without empty bins at its ends.

    ``counts[i]`` values lie in ``[(first + i) * width, (first + i + 1) * width)``; ``lo``, ``hi``
    are the exact extrema, inside the first and the last bin.
    """

    counts: Ints
    first: int
    exponent: int
    lo: float
    hi: float

    @property
    def width(self) -> float:
        """Width of a bin, a power of two, in the tensor's units."""
        return 2.0**self.exponent

    @property
    def edges(self) -> Array:
        """Bin edges, float64 ``(len(counts) + 1,)``; the outer ones may lie beyond lo and hi."""
        return (self.first + np.arange(self.counts.size + 1)) * self.width


class HistogramCalibrator(Calibrator):
    """A calibrator that derives the range from a histogram; subclasses add ``clip`` and ``bins``.

    ``bins`` is a field of each subclass, so that it comes after the subclass's other options.
    Raises ValueError unless it is a power of two from 256 to 2**20.
    """

    needs: ClassVar[Literal["extrema", "values"]] = "values"

    @property
    @abstractmethod
    def bins(self) -> int:
        """Number of bins of a tensor with one range: it bounds memory and resolution."""

    @abstractmethod
    def clip(self, bins: Bins, spec: QSpec) -> tuple[float, float]:
        """The range to quantize as ``spec``, in the tensor's units."""

    def __post_init__(self) -> None:
        if not (_FEWEST_BINS <= self.bins <= _MOST_BINS and self.bins & (self.bins - 1) == 0):
            expected = f"a power of two from {_FEWEST_BINS} to {_MOST_BINS}"
            raise ValueError(f"found {self.bins} bins, expected {expected}")

    def observer(self, spec: QSpec) -> HistogramObserver:
        """A fresh observer of all values."""
        return HistogramObserver(self, spec)


def _exponent(x: Array) -> Ints:
    """The e with ``2^(e-1) <= x < 2^e`` of each entry; for 0, a value far below all others."""
    return np.where(x == 0, _EXPONENT_OF_ZERO, np.frexp(x)[1]).astype(np.int64)


def _index(x: Array, exponent: Ints) -> Ints:
    """The index of the bin of width ``2^exponent`` that each value falls into."""
    return np.floor(np.ldexp(x, -exponent)).astype(np.int64)


def _grid(lo: Floats, hi: Floats, bins: int) -> tuple[Ints, Ints]:
    """The exponent of each channel's finest allowed grid, and the index of its first bin.

    The exponent never decreases when the range grows: bins can be merged but not split.
    """
    low, high = lo.astype(np.float64), hi.astype(np.float64)
    finest = _exponent(np.maximum(-low, high)) - _MANTISSA_BITS
    # high - low < 2^e: exponent e - log2(bins) is enough, unless alignment needs one more bin
    spanning = _exponent(high - low) - (bins.bit_length() - 1)
    exponent = np.maximum(np.maximum(finest, spanning), _SMALLEST_EXPONENT)
    exponent += _index(high, exponent) - _index(low, exponent) >= bins
    return exponent, _index(low, exponent)


def _tally(columns: Floats, exponent: Ints, first: Ints, bins: int) -> Ints:
    """Counts of values ``(n, channels)`` per bin: ``(channels, bins)``."""
    n, channels = columns.shape
    size = channels * bins
    # float64: in float32 a tiny negative value times a tiny scale would become 0, in another bin
    scale = np.ldexp(1.0, -exponent)
    # bins of all channels in one vector: channel c starts at c * bins
    offset = np.arange(channels) * bins - first
    counts = np.zeros(size, np.int64)
    step = max(1, max(_CHUNK, size) // channels)
    for start in range(0, n, step):
        indices = np.floor(columns[start : start + step] * scale)
        indices += offset
        counts += np.bincount(indices.astype(np.intp).ravel(), minlength=size)
    return counts.reshape(channels, bins)


class HistogramObserver(ExtremaObserver):
    """Counts ``(channels, bins)`` on power-of-two grids; ``rule.clip`` turns them into a range."""

    state_fields: ClassVar[tuple[str, ...]] = (
        *ExtremaObserver.state_fields,
        "counts",
        "exponent",
        "first",
    )

    def __init__(self, rule: HistogramCalibrator, spec: QSpec) -> None:
        super().__init__(rule, spec)
        self._clip = rule.clip
        per_channel = max(_FEWEST_BINS, rule.bins // _CHANNEL_SHARE)
        self.bins = rule.bins if spec.axis is None else per_channel
        self.counts: Ints = np.zeros((0, self.bins), np.int64)
        self.exponent: Ints = np.zeros(0, np.int64)
        self.first: Ints = np.zeros(0, np.int64)

    def histogram(self, channel: int = 0) -> Bins:
        """The bins of one channel."""
        lo, hi = float(self.lo[channel]), float(self.hi[channel])
        exponent, first = int(self.exponent[channel]), int(self.first[channel])
        used = int(np.floor(np.ldexp(hi, -exponent))) - first + 1
        return Bins(self.counts[channel, :used], first, exponent, lo, hi)

    def _record(self, columns: Floats, lo: Floats, hi: Floats) -> None:
        self._regrid()
        self.counts += _tally(columns, self.exponent, self.first, self.bins)

    def _absorb(self, later: Self) -> None:
        self._regrid()
        self.counts += later._counts_on(self.exponent, self.first)

    def _bounds(self) -> tuple[Array, Array]:
        clips = [self._clip(self.histogram(c), self.spec) for c in range(self.lo.size)]
        lo, hi = np.array(clips, np.float64).T + 0.0  # no -0.0
        return lo, hi

    def _regrid(self) -> None:
        """Move the counts to the grid that fits ``lo`` and ``hi`` now."""
        exponent, first = _grid(self.lo, self.hi, self.bins)
        same = np.array_equal(exponent, self.exponent) and np.array_equal(first, self.first)
        if not same:
            self.counts = self._counts_on(exponent, first)
            self.exponent, self.first = exponent, first

    def _counts_on(self, exponent: Ints, first: Ints) -> Ints:
        """The same counts on a grid that is at least as coarse and covers all values."""
        size = exponent.size * self.bins
        channel, old = np.nonzero(self.counts)
        doublings = np.minimum(exponent[channel] - self.exponent[channel], 62)  # int64 shifts end
        # merging 2^d bins of one is a right shift of the absolute index by d
        new = ((self.first[channel] + old) >> doublings) - first[channel]
        counts = np.zeros(size, np.int64)
        np.add.at(counts, channel * self.bins + new, self.counts[channel, old])
        return counts.reshape(exponent.size, self.bins)
