"""Shards of calibration data, merged in one process: the bits of one collector that saw all."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest

from qcompile.calibration import shards
from qcompile.calibration.channel_observer import ChannelObserver
from qcompile.calibration.collector import Collector, CollectorOptions, collector
from qcompile.calibration.resume import states
from qcompile.calibration.shards import Shard, ShardCollector
from qcompile.calibrators.minmax import MinMax
from qcompile.calibrators.moving_average import MovingAverage, MovingAverageObserver
from qcompile.errors import RecipeError
from qcompile.quant import Array, Calibrator, Observer, QSpec, StatRequest
from qcompile.rewriting.registry import calibrators
from qcompile.rewriting.testing import normal, parse
from qcompile.runtime.session import evaluate

UINT8 = QSpec("uint8", symmetric=False)
TEXT = """
    agraph (float[N, 24] x) => (float[N, 24] y) {
        h = MatMul(x, w)
        y = Relu(h)
    }
"""


def make(calibrator: Calibrator) -> Collector:
    graph = parse(TEXT, w=normal(24, 24))
    requests = [StatRequest(name, UINT8) for name in ("h", "y")]
    options = CollectorOptions(threads=1)
    return collector(graph, requests, calibrator, evaluate, options, ["h", "y"], ["h"])


def feeds(count: int = 24) -> list[dict[str, Array]]:
    """Values of several magnitudes, so that the order of a sum shows in its last bits."""
    rng = np.random.default_rng(4)
    shape = 200, 24
    sizes = 10.0 ** rng.integers(-6, 2, (count, 200, 1))
    values = (rng.normal(size=shape) * size for size in sizes)
    return [{"x": v.astype(np.float32)} for v in values]


def whole(calibrator: Calibrator) -> Collector:
    found = make(calibrator)
    for feed in feeds():
        found.update(feed)
    for feed in feeds(3):
        found.update_background(feed)
    return found


refused: list[Shard] = []  # since the guess was wrong


def by_shards(
    calibrator: Calibrator, size: int, *, spill: bool = False, ahead: int = 0
) -> Collector:
    """As workers do it: a collector of their own, fresh observers for each shard, pickled.

    ``ahead``: feeds that were sent before the shard that is merged.
    """
    client = make(calibrator)
    taps = pickle.loads(pickle.dumps(ShardCollector.of(client)))
    worker = taps.collector(client.model, 1, spill=spill)
    items = [*shards.shards(feeds(), size), *shards.shards(feeds(3), size, background=True)]
    for item in items:
        feeds_sent = client.feeds_seen + len(item.feeds) + ahead
        sent = pickle.loads(pickle.dumps(shards.sent(client, item, feeds_sent)))
        observed = pickle.loads(pickle.dumps(shards.observe(worker, sent)))
        if not shards.merge(client, item, observed):
            refused.append(item)
            assert shards.merge(client, item, shards.observe(worker, shards.sent(client, item)))
    return client


def by_groups(calibrator: Calibrator, size: int, fan_in: int) -> Collector:
    """As many workers do it: each of the parts that the client merges is a tree of shards."""
    client = make(calibrator)
    taps = ShardCollector.of(client)
    worker, merge = taps.collector(client.model, 1, spill=False), shards.MergeShards(taps)
    for group in batched(shards.shards(feeds(), 2), size):
        level = [shards.observe(worker, shards.sent(client, item)) for item in group]
        while len(level) > 1:
            level = [merge(part) for part in batched(pickle.loads(pickle.dumps(level)), fan_in)]
        all_feeds = [feed for item in group for feed in item.feeds]
        assert shards.merge(client, Shard(all_feeds), level[0])
    for item in shards.shards(feeds(3), 3, background=True):
        shards.merge(client, item, shards.observe(worker, shards.sent(client, item)))
    return client


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    source = iter(items)
    while part := list(islice(source, size)):
        yield part


def bits(found: Collector) -> Any:
    """The states of all observers but the steps, which only workers keep, and the results."""
    kept = [
        {n: a.tobytes() for n, a in state.items() if n not in ("kept", "row_sums", "row_counts")}
        for state in states(found) or []
    ]
    channels = {
        n: [None if a is None else np.asarray(a).tobytes() for a in vars(c).values()]
        for n, c in found.channels().items()
    }
    facts = [(t.values, t.fault) for t in found.taps]
    return kept, channels, facts, found.ranges().found["h"].lo.tobytes(), found.feeds_seen


@pytest.mark.parametrize("name", sorted(calibrators()))
@pytest.mark.parametrize("size", [1, 5])
def test_the_same_bits(name: str, size: int) -> None:
    rule = calibrators()[name]()
    same = bits(by_shards(rule, size)) == bits(whole(rule))
    assert same


@pytest.mark.parametrize("name", sorted(calibrators()))
def test_the_same_bits_through_a_tree(name: str) -> None:
    rule = calibrators()[name]()
    same = bits(by_groups(rule, 5, 2)) == bits(whole(rule))
    assert same


def test_merged_parts_know_which_rows_any_of_them_left_out() -> None:
    client = make(MinMax())
    taps = ShardCollector.of(client)
    worker = taps.collector(client.model, 1, spill=False)
    limits: list[dict[int, int]] = [{}, {3: 1 << 50}, {3: 1 << 51}]
    parts = []
    for below, item in zip(limits, shards.shards(feeds(), 8), strict=True):
        parts.append(shards.observe(worker, replace(shards.sent(client, item), below=below)))
    merged = shards.MergeShards(taps)(parts)
    assert [tap.below for tap in merged] == [None, None, None, 1 << 50]
    assert not shards.merge(make(MinMax()), Shard(feeds()), merged)


def test_rows_over_what_was_left_out_do_not_count() -> None:
    full, rest = ChannelObserver(limit=4), ChannelObserver(limit=4, below=1 << 62)
    full.update(normal(30, 8))
    assert full.threshold is not None
    assert ChannelObserver(limit=4).sees_all(full, full.threshold + 1)
    assert not ChannelObserver(limit=4).sees_all(full, full.threshold)
    assert not rest.sees_all(ChannelObserver(limit=4), 1 << 62)


def test_parts_of_a_batch_count_what_they_share_once() -> None:
    """A worker gets them cut, and each part has all positions."""
    graph = parse(
        """agraph (float[B, S, 4] x) => (float[B, S, 4] y)
        <int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}> {
            size = Shape(x) length = Slice(size, one, two)
            positions = Slice(table, zero, length, one) y = Add(x, positions)
        }""",
        table=normal(1, 64, 4),
    )
    options = CollectorOptions(threads=1)
    client = collector(graph, [], MinMax(), evaluate, options, ["positions"])
    worker = ShardCollector.of(client).collector(client.model, 1, spill=False)
    cut = [{"x": normal(2, 40, 4)}, {"x": normal(1, 40, 4)}]
    for feed in (cut, cut[:1]):
        (seen,) = shards.observe(worker, shards.SentShard([feed], background=False, below={}))
        assert seen.values == 40


def test_the_same_bits_with_samples_in_files() -> None:
    same = bits(by_shards(MinMax(), 2, spill=True)) == bits(whole(MinMax()))
    assert same


def test_a_wrong_guess_of_the_rows_is_seen_and_changes_nothing() -> None:
    """So many feeds were said to be sent that too few rows seemed to have a chance."""
    refused.clear()
    same = bits(by_shards(MinMax(), 2)) == bits(whole(MinMax()))
    assert same and not refused
    same = bits(by_shards(MinMax(), 2, ahead=1000)) == bits(whole(MinMax()))
    assert same and len(refused) > 2


@pytest.mark.parametrize("kind", [MovingAverageObserver, ChannelObserver])
def test_a_merge_that_depends_on_the_grouping_is_seen(
    kind: type[Observer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the steps of rounded sums, the comparison above fails."""
    monkeypatch.setattr(kind, "prepare_to_merge", lambda self: None)
    rule = MovingAverage(momentum=0.7)
    same = bits(by_shards(rule, 5)) == bits(whole(rule))
    assert not same


def test_rows_that_cannot_enter_the_sample_do_not_travel() -> None:
    client = make(MinMax())
    worker = ShardCollector.of(client).collector(client.model, 1, spill=False)
    rows = []
    for item in shards.shards(feeds(), 2):
        observed = shards.observe(worker, shards.sent(client, item))
        rows.append(observed[-1].state["keys"].shape[0])
        shards.merge(client, item, observed)
    assert rows[0] == 400 and rows[-1] < 300 and len(rows) == 12


def test_equal_hashes_keep_their_order() -> None:
    """Sparse rows often have equal hashes: of these the earlier ones stay, in their order."""
    rng = np.random.default_rng(0)
    rows = np.where(rng.random((4000, 64)) < 0.03, rng.normal(size=(4000, 64)), 0)
    rows = rows.astype(np.float32)
    alone = ChannelObserver(limit=100)
    for part in np.array_split(rows, 37):
        alone.update(part)
    merged = ChannelObserver(limit=100)
    for part in np.array_split(rows, 5):
        later = ChannelObserver(limit=100)
        later.update(part)
        merged.merge(later)
    assert np.array_equal(alone.stats().rows, merged.stats().rows)


def test_channels_that_vary_between_shards_give_no_statistics() -> None:
    client = make(MinMax())
    item = Shard(feeds(1))
    worker = ShardCollector.of(client).collector(client.model, 1, spill=False)
    observed = shards.observe(worker, shards.sent(client, item))
    shards.merge(client, item, observed)
    other = ChannelObserver()
    other.update(np.ones((3, 5), np.float32))
    observed[-1] = shards._observed(_with(client, other))
    shards.merge(client, item, observed)
    assert client.taps[-1].fault == "its channels are not the same in all feeds"
    assert "y" not in client.channels() and "h" in client.channels()


def _with(client: Collector, observer: Observer) -> Any:
    return replace(client.taps[-1], observer=observer)


def test_an_observer_without_state_is_refused() -> None:
    class Plain(Observer):
        def update(self, values: Array) -> None:
            pass

        def merge(self, later: Observer) -> None:
            pass

        def range(self) -> Any:
            raise ValueError

    class Rule(MinMax):
        def observer(self, spec: QSpec) -> Any:
            return Plain()

    with pytest.raises(RecipeError, match="Plain cannot be sent by a worker"):
        ShardCollector.of(make(Rule()))


def test_feeds_of_a_shard_are_copies() -> None:
    array = np.zeros((2, 2), np.float32)

    def reused() -> Any:
        for value in range(4):
            array[:] = value
            yield {"x": array}

    found = [float(f["x"][0, 0]) for shard in shards.shards(reused(), 2) for f in shard.feeds]
    assert found == [0, 1, 2, 3]


def test_a_shard_of_large_feeds_has_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_MOST", 2 * feeds(1)[0]["x"].nbytes)
    assert [len(shard.feeds) for shard in shards.shards(feeds(5), 8)] == [2, 2, 1]


def test_a_shard_without_rows_for_a_full_sample_is_merged() -> None:
    """The sample's largest hash is the limit that is sent: an equal one is no gap."""
    observer = ChannelObserver(limit=4)
    observer.update(normal(30, 8))
    assert observer.threshold is not None
    assert observer.sees_all(ChannelObserver(limit=4), observer.threshold)
    assert not observer.sees_all(ChannelObserver(limit=4), observer.threshold - 1)
