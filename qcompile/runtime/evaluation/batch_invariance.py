"""Whether a sample's answer depends on its batch mates, or on how far it is padded.

With static ranges and scales per token it does not, up to the order of float sums; ranges that are
taken from each batch as it comes (mode dynamic) make it do so.
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
# Float sums of a transformer in another order: 2^-24 a step moves a cosine by less than 1e-6.
EQUAL = 1 - 1e-6
Run = Callable[[Feed], Mapping[str, Array]]


@dataclass(frozen=True)
class Invariance:
    """Worst cosines of samples' answers: alone against in the batch, and padded against not.

    None where that was not tried: one sample a feed, no attention mask, or a model that takes no
    other shapes.
    """

    alone: float | None = None
    padded: float | None = None

    @property
    def note(self) -> str | None:
        """What a user should know, None where answers depend on nothing else."""
        what = {"its batch mates": self.alone, "its padding": self.padded}
        found = [f"{n} (cosine {c:.5f})" for n, c in what.items() if c is not None and c < EQUAL]
        return f"a sample's answer depends on {' and '.join(found)}" if found else None

    def on(self, verdict: Verdict) -> Verdict:
        """The verdict, with what was found."""
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
    """Cosines of each sample of a batch, run alone and without its padding."""
    count = common_batch(feed)
    if count < 2:
        return []
    real = _real(feed)
    found = []
    for i in range(min(count, limit)):
        one: Feed = {name: values[i : i + 1] for name, values in feed.items()}
        end = _end(real[i]) if real is not None else None
        if real is not None:
            one = {n: _cut(v, real.shape[1], end) for n, v in one.items()}
        single = run(one)
        for name, values in together.items():
            mate = values[i : i + 1]
            if real is not None:
                mate = _cut(mate, real.shape[1], end)
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


def _cut(values: Array, length: int, end: int | None) -> Array:
    """Without the padding at the end of axis 1, where that is the sequence."""
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
    """Zeros behind axis 1: token 0, masked."""
    return np.pad(values, [(0, 0), (0, _MORE), *[(0, 0)] * (values.ndim - 2)])


def _real(feed: Feed) -> Array | None:
    """The mask as truth values, None where the feed has none of rank 2."""
    mask = feed.get(MASK)
    if mask is None or mask.ndim != 2:
        return None
    found = padding_mask(feed)
    return np.ones(mask.shape, np.bool_) if found is None else found


def _cosine(a: Array, b: Array) -> list[float]:
    """One cosine of two float arrays; none of anything else, or where shapes do not match."""
    if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)):
        return []  # sequences and maps
    if a.shape != b.shape or a.dtype.kind != "f" or not a.size:
        return []
    return [cosine(a, b)]
