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
from qcompile.calibration.shards import DataSize, Shard, ShardCollector
from qcompile.calibrators.minmax import MinMax
from qcompile.calibrators.moving_average import MovingAverage, MovingAverageObserver
from qcompile.errors import InvariantError, RecipeError
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


WHOLE = DataSize.of(feeds())


def by_shards(
    calibrator: Calibrator, size: int, *, spill: bool = False, whole: DataSize | None = WHOLE
) -> Collector:
    """As workers do it: a collector of their own, fresh observers for each shard, pickled."""
    client, merged = make(calibrator), DataSize()
    taps = pickle.loads(pickle.dumps(ShardCollector.of(client)))
    worker = taps.collector(client.model, 1, spill=spill)
    items = [*shards.shards(feeds(), size), *shards.shards(feeds(3), size, background=True)]
    for item in items:
        sent = pickle.loads(pickle.dumps(shards.sent(client, item, merged, whole)))
        shards.merge(client, item, pickle.loads(pickle.dumps(shards.observe(worker, sent))))
        merged += DataSize() if item.background else item.size
    return client


def by_groups(calibrator: Calibrator, size: int, fan_in: int) -> Collector:
    """As many workers do it: each of the parts that the client merges is a tree of shards."""
    client = make(calibrator)
    taps = ShardCollector.of(client)
    worker, merge = taps.collector(client.model, 1, spill=False), shards.MergeShards(taps)
    for group in batched(shards.shards(feeds(), 2), size):
        sent = [shards.sent(client, item, whole=WHOLE) for item in group]
        level = [shards.observe(worker, shard) for shard in sent]
        while len(level) > 1:
            level = [merge(part) for part in batched(pickle.loads(pickle.dumps(level)), fan_in)]
        all_feeds = [feed for item in group for feed in item.feeds]
        shards.merge(client, Shard(all_feeds), level[0])
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


@pytest.mark.parametrize("size", [1, 5])
def test_the_same_bits_where_the_size_of_the_data_is_unknown(size: int) -> None:
    same = bits(by_shards(MinMax(), size, whole=None)) == bits(whole(MinMax()))
    assert same


def test_rows_that_were_left_out_are_missed() -> None:
    """Data that was said to be a hundred times as much leaves too few rows."""
    found = by_shards(MinMax(), 2, whole=DataSize(2400, 100 * WHOLE.positions))
    assert found.lacks_rows
    with pytest.raises(InvariantError, match="rows of a sample of channels were left out"):
        found.channels()
    assert not by_shards(MinMax(), 2).lacks_rows


def test_a_bound_is_saved_with_the_rows() -> None:
    part, again = ChannelObserver(limit=40), ChannelObserver(limit=40)
    part.update(normal(30, 8))
    part.sample.leave_out(int(part.sample.keys[9]))
    again.restore(part.state())
    assert again.sample.bound == part.sample.bound is not None
    assert len(again.sample.rows) == 10 and again.sample.lacks_rows


def test_the_share_of_a_shard() -> None:
    """Rows of a tensor may be tokens or sentences: a shard of long texts has more of the former."""
    masks = [np.ones((2, 9), np.int64), np.ones((2, 3), np.int64)]
    masks[0][1, 5:] = 0
    data = [{"attention_mask": mask} for mask in masks]
    whole_data = DataSize.of(data)
    assert whole_data == DataSize(2, 9 + 5 + 6)
    assert Shard(data[:1]).size.share(whole_data) == 14 / 20
    assert Shard(data[1:]).size.share(whole_data) == 1 / 2
    assert DataSize.of([{"x": np.zeros((2, 3)), "y": np.zeros(2)}]) == DataSize(1, 6)


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
        (seen,) = shards.observe(worker, shards.SentShard([feed], background=False))
        assert seen.values == 40


def test_the_same_bits_with_samples_in_files() -> None:
    same = bits(by_shards(MinMax(), 2, spill=True)) == bits(whole(MinMax()))
    assert same


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
        observed = shards.observe(worker, shards.sent(client, item, whole=WHOLE))
        rows.append(observed[-1].state["keys"].shape[0])
        shards.merge(client, item, observed)
    assert len(rows) == 12 and max(rows) <= 86 + 3.5 * 86**0.5 + 9  # of 1,024 / 12, of 400


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
