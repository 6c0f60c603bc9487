"""Tests whether a sample's output depends on the rest of its batch, or on its padding.

With static ranges it does not, up to the order of float sums. With ranges per batch (mode dynamic)
it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from qcompile.data.feeds import Feed, common_batch, padding_mask
from qcompile.errors import ModelError
from qcompile.ir.analysis.data_path import MASK
from qcompile.quant import Array
from qcompile.runtime.evaluation.closeness import Verdict, cosine

_SAMPLES = 8
_MORE = 4  # positions of padding to add
# Another order of float sums: a relative error of 2^-24 per step changes a cosine by under 1e-6.
EQUAL = 1 - 1e-6
Run = Callable[[Feed], Mapping[str, Array]]


@dataclass(frozen=True)
class Invariance:
    """Worst cosines of samples' outputs: alone against in a batch, and with more padding against
    without.

    None where that was not tested: one sample per feed, no attention mask, or fixed shapes.
    """

    alone: float | None = None
    padded: float | None = None

    @property
    def note(self) -> str | None:
        """A note for the report, None where outputs depend on nothing else."""
        what = {"the rest of its batch": self.alone, "its padding": self.padded}
        found = [f"{n} (cosine {c:.5f})" for n, c in what.items() if c is not None and c < EQUAL]
        return f"a sample's output depends on {' and '.join(found)}" if found else None

    def on(self, verdict: Verdict) -> Verdict:
        """The verdict with these figures."""
        return replace(verdict, alone=self.alone, padded=self.padded)


def invariance(run: Run, feeds: Iterable[Feed], samples: int = _SAMPLES) -> Invariance:
    """Run samples again alone and padded further, ``samples`` at most. Never raises ModelError."""
    alone: list[float] = []
    padded: list[float] = []
    for feed in feeds:
        if len(alone) + len(padded) >= 2 * samples:
            break
        try:
            together = run(feed)
            alone += _alone(run, feed, together, samples - len(alone))
            padded += _padded(run, feed, together)[: samples - len(padded)]
        except ModelError:
            break  # shapes are fixed
    return Invariance(min(alone, default=None), min(padded, default=None))


def _alone(run: Run, feed: Feed, together: Mapping[str, Array], limit: int) -> list[float]:
    """Cosines between each sample of a batch and the same sample run alone without padding."""
    count = common_batch(feed)
    if count < 2:
        return []
    real = _real(feed)
    found = []
    for i in range(min(count, limit)):
        one: Feed = {name: values[i : i + 1] for name, values in feed.items()}
        end = _end(real[i]) if real is not None else None
        if real is not None:
            one = {n: _truncate(v, real.shape[1], end) for n, v in one.items()}
        single = run(one)
        for name, values in together.items():
            mate = values[i : i + 1]
            if real is not None:
                mate = _truncate(mate, real.shape[1], end)
                at = real[i : i + 1, :end]
                if mate.shape[:2] == at.shape == single[name].shape[:2]:
                    found += _cosine(mate[at], single[name][at])
                    continue
            found += _cosine(mate, single[name])
    return found


def _end(real: Array) -> int | None:
    """Where padding begins, None where it is not all at the end."""
    count = int(real.sum())
    return count if count and real[:count].all() else None


def _truncate(values: Array, length: int, end: int | None) -> Array:
    """The array without the padding at the end of axis 1, if that is the sequence."""
    return values[:, :end] if values.shape[1:2] == (length,) else values


def _padded(run: Run, feed: Feed, together: Mapping[str, Array]) -> list[float]:
    """Cosines of a batch with more padding, at its real positions."""
    real = _real(feed)
    if real is None:
        return []
    length = real.shape[1]
    longer = {n: _pad(v) if v.shape[1:2] == (length,) else v for n, v in feed.items()}
    more = run(longer)
    found = []
    for i, kept in enumerate(real):
        for name, values in together.items():
            a, b = values[i], more[name][i]
            if a.shape[:1] == (length,):
                a, b = a[kept], b[:length][kept]
            found += _cosine(a, b)
    return found


def _pad(values: Array) -> Array:
    """The array with zeros at the end of axis 1: token 0, masked."""
    return np.pad(values, [(0, 0), (0, _MORE), *[(0, 0)] * (values.ndim - 2)])


def _real(feed: Feed) -> Array | None:
    """The attention mask as bool [batch, sequence], None where the feed has none of rank 2."""
    mask = feed.get(MASK)
    if mask is None or mask.ndim != 2:
        return None
    real = padding_mask(feed)
    return np.ones(mask.shape, np.bool_) if real is None else real


def _cosine(a: Array, b: Array) -> list[float]:
    """The cosine of two float arrays; empty for anything else, or where shapes differ."""
    if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)):
        return []  # sequences and maps
    if a.shape != b.shape or a.dtype.kind != "f" or not a.size:
        return []
    return [cosine(a, b)]
