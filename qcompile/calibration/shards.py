"""Calibration of a part of the data in another process, and how the parts are merged.

A shard is a range of feeds. Its observers travel as arrays, and are merged in the order of the
shards, which gives the bits of one collector that saw all feeds: minima, maxima and counts are
exact, and observers with rounded sums keep every step (``Observer.prepare_to_merge``).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qcompile.calibration.channel_observer import ChannelObserver
from qcompile.calibration.collector import VARYING, Collector, CollectorOptions, Tap
from qcompile.data.feeds import Feed
from qcompile.errors import RecipeError
from qcompile.quant import Array, Observer
from qcompile.runtime.spilled_arrays import Store

_MOST = 1 << 24  # bytes of the feeds in a shard
_HASHES = 1 << 64
# Rows below a guessed hash, over those that the sample takes. The number of 1,024 is random by 3 %;
# the rest is for feeds of other lengths.
_CHANCE = 1.5


@dataclass(frozen=True)
class Shard:
    """``background``: general text, of which only watched channels are observed."""

    feeds: Sequence[Feed]
    background: bool = False


@dataclass(frozen=True)
class SentShard:
    """A shard for a worker: its feeds divided as the client's memory budget says.

    ``below``: by number of the tap, the hash that a row must be below to enter its sample.
    """

    feeds: list[list[Feed]]
    background: bool
    below: Mapping[int, int] = field(default_factory=dict)


class _Packed(NamedTuple):
    """An array; integers, most of which are counts of 0, are compressed."""

    data: bytes
    dtype: str
    shape: tuple[int, ...]
    compressed: bool


@dataclass(frozen=True)
class ObservedTap:
    """What one observer saw; ``values`` and ``fault`` as in ``Tap``, ``below`` as in the shard."""

    state: dict[str, _Packed]
    values: int
    fault: str | None
    below: int | None = None


@dataclass(frozen=True)
class ShardCollector:
    """Observes shards with fresh observers each; everything but the model's file."""

    taps: list[Tap]
    options: CollectorOptions
    divisible: bool

    @classmethod
    def of(cls, collector: Collector) -> ShardCollector:
        """The same taps as this collector's. Raises RecipeError for an observer without state."""
        taps = [replace(t, observer=t.kind.make(), values=0, fault=None) for t in collector.taps]
        for tap in taps:
            if tap.observer.state() is None:
                name = type(tap.observer).__name__
                raise RecipeError(
                    f"{name} cannot be sent by a worker, since it has no state(): calibrate "
                    "without --workers and --cluster, or with another --calibrator"
                )
        own = collector.options
        options = CollectorOptions(own.max_memory, own.mask, widen=own.widen)
        return cls(taps, options, collector.divisible)

    def collector(self, model: Path, threads: int, *, spill: bool) -> Collector:
        """A collector of the process that runs this. ``spill``: keep samples in files."""
        keep = Store().array if spill else None
        options = replace(self.options, threads=threads, keep=keep)
        return Collector(model, self.taps, options, self.divisible)


def observe(collector: Collector, shard: SentShard) -> list[ObservedTap]:
    """Run the feeds of a shard with fresh observers, in the process of a worker."""
    collector.taps = [_fresh(t, collector.options) for t in collector.taps]
    for i, key in shard.below.items():
        observer = collector.taps[i].observer
        assert isinstance(observer, ChannelObserver)
        observer.below = key
    update = collector.update_background if shard.background else collector.update
    for parts in shard.feeds:
        update(*parts)
    return [_observed(tap) for tap in collector.taps]


def _fresh(tap: Tap, options: CollectorOptions) -> Tap:
    observer = tap.kind.make(options.keep)
    observer.prepare_to_merge()
    return replace(tap, observer=observer, values=0, fault=None)


def sent(collector: Collector, shard: Shard, feeds: int = 0) -> SentShard:
    """A shard for a worker, while ``collector`` has merged earlier ones.

    ``feeds``: how many were sent, this shard included. From them follows how many rows compete for
    the sample, and so which of this shard's have a chance; ``merge`` checks that. 0: no guess.
    """
    below: dict[int, int] = {}
    for i, tap in enumerate(collector.taps):
        if isinstance(tap.observer, ChannelObserver) and not shard.background:
            limits = [tap.observer.threshold, _guessed(tap, collector.feeds_seen, feeds)]
            known = [limit for limit in limits if limit is not None]
            below |= {i: min(known)} if known else {}
    parts = [list(collector.options.parts(feed)) for feed in shard.feeds]
    return SentShard(parts, shard.background, below)


def _guessed(tap: Tap, merged: int, feeds: int) -> int | None:
    """A hash that enough rows of ``feeds`` feeds are below, if later ones are like those merged."""
    if not (merged and feeds and tap.values):
        return None
    assert isinstance(tap.observer, ChannelObserver)
    share = _CHANCE * tap.observer.limit / (tap.values / merged * feeds)
    return int(share * _HASHES) if share < 1 else None


def merge(collector: Collector, shard: Shard, observed: Sequence[ObservedTap]) -> bool:
    """Add what a worker saw in the next shard.

    False, and nothing is added, where it left out rows that may be in a sample: then the shard is
    to be observed again without a guess.
    """
    restored = []
    for tap, part in zip(collector.taps, observed, strict=True):
        later = _restored(tap, part)
        if not _sees_all(tap.observer, later, part.below):
            return False
        restored.append(later)
    for tap, part, later in zip(collector.taps, observed, restored, strict=True):
        _add(tap, part, later)
    collector.feeds_seen += 0 if shard.background else len(shard.feeds)
    return True


@dataclass(frozen=True)
class MergeShards:
    """Makes one of what was seen in consecutive shards, in the process of a worker.

    The client then merges fewer and smaller parts, with the same bits: observers that were
    prepared to be merged keep the steps of their parts.
    """

    taps: ShardCollector

    def __call__(self, parts: Sequence[list[ObservedTap]]) -> list[ObservedTap]:
        """parts: in the order of the data."""
        taps = [_fresh(tap, self.taps.options) for tap in self.taps.taps]
        for number, tap in enumerate(taps):
            if isinstance(tap.observer, ChannelObserver):
                limits = (part[number].below for part in parts)
                tap.observer.below = min((b for b in limits if b is not None), default=None)
            for part in parts:
                _add(tap, part[number], _restored(tap, part[number]))
        return [_observed(tap) for tap in taps]


def _restored(tap: Tap, part: ObservedTap) -> Observer:
    observer = tap.kind.make()
    observer.restore({name: _unpacked(a) for name, a in part.state.items()})
    return observer


def _add(tap: Tap, part: ObservedTap, observer: Observer) -> None:
    """Add a part to a tap; ``observer`` is the part's."""
    tap.fault = part.fault or tap.fault
    if _fit(tap.observer, observer):
        tap.observer.merge(observer)
    else:
        tap.fault = VARYING
    tap.values += part.values


def _sees_all(one: Observer, later: Observer, below: int | None) -> bool:
    if below is None:
        return True
    assert isinstance(one, ChannelObserver) and isinstance(later, ChannelObserver)
    return one.sees_all(later, below)


def _fit(one: Observer, other: Observer) -> bool:
    """True unless both saw channels, and not as many."""
    if not (isinstance(one, ChannelObserver) and isinstance(other, ChannelObserver)):
        return True
    return None in (one.channels, other.channels) or one.channels == other.channels


def shards(feeds: Iterable[Feed], size: int, *, background: bool = False) -> Iterator[Shard]:
    """Ranges of at most ``size`` feeds, and so many bytes that a few of them fit in memory.

    Copies, if there may be more than one, since sources may reuse arrays.
    """
    part: list[Feed] = []
    held = 0
    for feed in feeds:
        part.append({n: v.copy() for n, v in feed.items()} if size > 1 else feed)
        held += sum(v.nbytes for v in feed.values())
        if len(part) >= size or held >= _MOST:
            yield Shard(part, background)
            part, held = [], 0
    if part:
        yield Shard(part, background)


def _observed(tap: Tap) -> ObservedTap:
    state = tap.observer.state() or {}
    below = tap.observer.below if isinstance(tap.observer, ChannelObserver) else None
    return ObservedTap({n: _packed(a) for n, a in state.items()}, tap.values, tap.fault, below)


def _packed(values: Array) -> _Packed:
    compressed = values.dtype == np.int64
    data = np.ascontiguousarray(values).tobytes()
    data = zlib.compress(data, 1) if compressed else data
    return _Packed(data, values.dtype.str, values.shape, compressed)


def _unpacked(packed: _Packed) -> Array:
    data = zlib.decompress(packed.data) if packed.compressed else packed.data
    return np.frombuffer(bytearray(data), packed.dtype).reshape(packed.shape)
