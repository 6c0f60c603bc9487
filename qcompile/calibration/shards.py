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
from qcompile.calibration.row_sample import RowSample
from qcompile.data.feeds import Feed, padding_mask
from qcompile.errors import RecipeError
from qcompile.quant import Array, Observer
from qcompile.runtime.spilled_arrays import Store

_MOST = 1 << 24  # bytes of the feeds in a shard


@dataclass(frozen=True)
class Shard:
    """``background``: general text, of which only watched channels are observed."""

    feeds: Sequence[Feed]
    background: bool = False

    @property
    def size(self) -> DataSize:
        """How much data it holds."""
        return DataSize.of(self.feeds)


@dataclass(frozen=True)
class DataSize:
    """How many feeds, and positions in them: tokens without padding, else values of an input."""

    feeds: int = 0
    positions: int = 0

    @classmethod
    def of(cls, feeds: Iterable[Feed]) -> DataSize:
        """Reads the feeds."""
        total = cls()
        for feed in feeds:
            total += cls(1, _positions(feed))
        return total

    def __add__(self, other: DataSize) -> DataSize:
        return DataSize(self.feeds + other.feeds, self.positions + other.positions)

    def share(self, whole: DataSize) -> float:
        """Of the rows of any tensor in ``whole``, at least: rows are as many as positions, or as
        many in each feed."""
        parts = (self.feeds, whole.feeds), (self.positions, whole.positions)
        return max(part / of if of else 1.0 for part, of in parts)


def _positions(feed: Feed) -> int:
    mask = padding_mask(feed)
    if mask is not None:
        return int(mask.sum())
    return max((array.size for array in feed.values()), default=0)


@dataclass(frozen=True)
class SentShard:
    """A shard for a worker: its feeds divided as the client's memory budget says.

    ``bounds``: by number of the tap, the largest hash of rows that may enter its sample.
    ``share``: the part of all data that the shard is, 1 if unknown.
    """

    feeds: list[list[Feed]]
    background: bool
    bounds: Mapping[int, int] = field(default_factory=dict)
    share: float = 1.0


class _Packed(NamedTuple):
    """An array; integers, most of which are counts of 0, are compressed."""

    data: bytes
    dtype: str
    shape: tuple[int, ...]
    compressed: bool


@dataclass(frozen=True)
class ObservedTap:
    """What one observer saw; ``values`` and ``fault`` as in ``Tap``."""

    state: dict[str, _Packed]
    values: int
    fault: str | None


@dataclass(frozen=True)
class ShardCollector:
    """Observes shards with fresh observers each; everything but the model's file."""

    taps: list[Tap]
    options: CollectorOptions
    divisible: bool

    @classmethod
    def of(cls, collector: Collector) -> ShardCollector:
        """The same taps as this collector's. Raises RecipeError for an observer without state."""
        taps = [
            replace(t, observer=t.kind.make(), values=0, fault=None, pending=[])
            for t in collector.taps
        ]
        for tap in taps:
            if tap.observer.state() is None:
                name = type(tap.observer).__name__
                raise RecipeError(
                    f"{name} cannot be sent by a worker, since it has no state(): calibrate "
                    "without --workers and --cluster, or with another --calibrator"
                )
        own = collector.options
        options = CollectorOptions(own.max_memory, own.mask, widen=own.widen, provider=own.provider)
        return cls(taps, options, collector.divisible)

    def collector(self, model: Path, threads: int, *, spill: bool) -> Collector:
        """A collector of the process that runs this. ``spill``: keep samples in files."""
        keep = Store().array if spill else None
        options = replace(self.options, threads=threads, keep=keep)
        return Collector(model, self.taps, options, self.divisible)


def observe(collector: Collector, shard: SentShard) -> list[ObservedTap]:
    """Run the feeds of a shard with fresh observers, in the process of a worker."""
    collector.taps = [_fresh(t, collector.options) for t in collector.taps]
    for number, bound in shard.bounds.items():
        _sample(collector.taps[number]).leave_out(bound)
    update = collector.update_background if shard.background else collector.update
    for parts in shard.feeds:
        update(*parts)
    if not shard.background:
        _leave_out_unlikely(collector, shard.share)
    return [_observed(tap) for tap in collector.taps]


def _leave_out_unlikely(collector: Collector, share: float) -> None:
    """Drop rows that will hardly be in the samples of all data, of which these are a ``share``."""
    for observer in (tap.observer for tap in collector.taps):
        if isinstance(observer, ChannelObserver):
            bound = observer.sample.likely_bound(share)
            if bound is not None:
                observer.sample.leave_out(bound)


def _sample(tap: Tap) -> RowSample:
    assert isinstance(tap.observer, ChannelObserver)
    return tap.observer.sample


def _fresh(tap: Tap, options: CollectorOptions) -> Tap:
    observer = tap.kind.make(options.keep)
    observer.prepare_to_merge()
    return replace(tap, observer=observer, values=0, fault=None, pending=[])


def sent(
    collector: Collector,
    shard: Shard,
    merged: DataSize | None = None,
    whole: DataSize | None = None,
) -> SentShard:
    """A shard for a worker, while ``collector`` has merged earlier ones.

    merged, whole: sizes of what was merged and of all data, if known. From them follows which rows
    have a chance to enter the sample. ``Collector.lacks_rows`` says if others had one.
    """
    bounds: dict[int, int] = {}
    if not shard.background:
        share = merged.share(whole) if merged is not None and whole is not None else 1.0
        for i, tap in enumerate(collector.taps):
            if isinstance(tap.observer, ChannelObserver):
                own = tap.observer.sample
                known = own.threshold, own.bound, own.likely_bound(share)
                limits = [bound for bound in known if bound is not None]
                bounds |= {i: min(limits)} if limits else {}
    parts = [list(collector.options.parts(feed)) for feed in shard.feeds]
    part = 1.0 if whole is None else shard.size.share(whole)
    return SentShard(parts, shard.background, bounds, part)


def merge(collector: Collector, shard: Shard, observed: Sequence[ObservedTap]) -> None:
    """Add what a worker saw in the next shard."""
    for tap, part in zip(collector.taps, observed, strict=True):
        _add(tap, part)
    collector.feeds_seen += 0 if shard.background else len(shard.feeds)


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
            for part in parts:
                _add(tap, part[number])
        return [_observed(tap) for tap in taps]


def _add(tap: Tap, part: ObservedTap) -> None:
    observer = tap.kind.make()
    observer.restore({name: _unpacked(a) for name, a in part.state.items()})
    tap.fault = part.fault or tap.fault
    if _fit(tap.observer, observer):
        tap.observer.merge(observer)
    else:
        tap.fault = VARYING
    tap.values += part.values


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
    return ObservedTap({n: _packed(a) for n, a in state.items()}, tap.values, tap.fault)


def _packed(values: Array) -> _Packed:
    compressed = values.dtype == np.int64
    data = np.ascontiguousarray(values).tobytes()
    data = zlib.compress(data, 1) if compressed else data
    return _Packed(data, values.dtype.str, values.shape, compressed)


def _unpacked(packed: _Packed) -> Array:
    data = zlib.decompress(packed.data) if packed.compressed else packed.data
    return np.frombuffer(bytearray(data), packed.dtype).reshape(packed.shape)
