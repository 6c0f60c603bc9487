"""Calibration as work items: shards of the feeds, merged into one collector in their order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from qcompile.calibration import shards
from qcompile.calibration.collector import Collector
from qcompile.calibration.shards import DataSize, ObservedTap, SentShard, Shard, ShardCollector
from qcompile.compiler.cluster.workers import Kit, Site, Task

_FOLDER = "calibration"


@dataclass(frozen=True)
class _Open:
    """Loads the model with its taps in a worker."""

    taps: ShardCollector
    model: str
    spill: bool

    def __call__(self, site: Site) -> Callable[[SentShard], list[ObservedTap]]:
        model = site.files[self.model]
        collector = self.taps.collector(model, site.threads, spill=self.spill)
        return lambda shard: shards.observe(collector, shard)


@dataclass
class CalibrationTask(Task[Shard, Shard]):
    """Adds what shards hold to ``collector``. ``spill``: workers keep samples in files.

    whole: size of all data, of which the collector has seen ``merged``; None if unknown. Then
    workers send all rows that may be in a sample of what was merged so far.
    """

    collector: Collector
    spill: bool
    whole: DataSize | None = None
    merged: DataSize = field(default_factory=DataSize)

    def here(self, item: Shard) -> Shard:
        """Run the feeds in this process."""
        run = self.collector.update_background if item.background else self.collector.update
        for feed in item.feeds:
            run(feed)
        return item

    def kit(self) -> Kit:
        """The model with its taps."""
        model = self.collector.model
        files = {f"{_FOLDER}/{p.name}": p for p in sorted(model.parent.iterdir())}
        taps = ShardCollector.of(self.collector)
        opens = _Open(taps, f"{_FOLDER}/{model.name}", self.spill)
        return Kit(files, opens, shards.MergeShards(taps))

    def label(self, item: Shard) -> str:
        """How many feeds, after how many."""
        what = "general text" if item.background else "calibration"
        return f"{what}, {len(item.feeds)} feeds after feed {self.collector.feeds_seen}"

    def sent(self, item: Shard) -> SentShard:
        """The feeds, and which rows can still enter samples."""
        return shards.sent(self.collector, item, self.merged, self.whole)

    def merges(self, one: Shard, later: Shard) -> bool:
        """True of shards of the same text: general text is counted otherwise."""
        return one.background == later.background

    def received(self, items: Sequence[Shard], answer: Any) -> Sequence[Shard]:
        """Merge what was seen in the next shards."""
        item = Shard([feed for item in items for feed in item.feeds], items[0].background)
        shards.merge(self.collector, item, answer)
        if not item.background:
            self.merged += item.size
        return items
