"""Timing: what the figures mean, on made-up times; how a run goes, on a model of one node."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest

from qcompile.errors import ModelError
from qcompile.quant import Array
from qcompile.rewriting.testing import model_proto
from qcompile.runtime import latency
from qcompile.runtime.latency import Comparison, Timing, TimingOptions, compare_latency

QUICK = TimingOptions(threads=1, rounds=4, seconds=0, min_runs=3, warmup=1)


def times(label: str, *medians: float) -> Timing:
    """Rounds of three runs around a median."""
    return Timing(label, [[m, m * 0.9, m * 1.5] for m in medians])


def compared(*timings: Timing, seed: int = 0) -> Comparison:
    return Comparison(list(timings), {"x": [1, 2]}, threads=1, seed=seed)


def model(op: str) -> bytes:
    text = f"g (float[N,2] x) => (float[N,2] y) {{ y = {op}(x) }}"
    return bytes(model_proto(text).SerializeToString())


def test_statistics_of_one_model() -> None:
    found = Timing("m", [[4.0, 2.0, 3.0], [5.0, 1.0, 3.0, 8.0]])
    assert (found.best, found.median, found.medians) == (1.0, 3.0, [3.0, 4.0])
    assert found.p90 == pytest.approx(np.percentile([4, 2, 3, 5, 1, 3, 8], 90))


def test_ratios_are_taken_within_rounds() -> None:
    """A machine that slows down by half in the middle shows in no ratio."""
    found = compared(times("float", 2, 2, 4, 4), times("int8", 1, 1, 2, 2)).ratio(1)
    assert (found.median, found.low, found.high, found.best) == (0.5, 0.5, 0.5, 0.5)


def test_intervals_hold_the_median_and_are_the_same_each_time() -> None:
    rng = np.random.default_rng(0)
    old, new = times("a", *rng.uniform(1, 2, 9)), times("b", *rng.uniform(1, 2, 9))
    found = compared(old, new).ratio(1)
    assert found.low < found.median < found.high
    assert compared(old, new).ratio(1) == found
    ratios = np.array(new.medians) / old.medians
    assert ratios.min() <= found.low and found.high <= ratios.max()


@pytest.mark.parametrize(
    ("medians", "slower"), [((1.1, 1.2, 1.1), True), ((0.9, 1.2, 1.1), False), ((1, 1, 1), False)]
)
def test_slower_needs_the_whole_interval(medians: tuple[float, ...], slower: bool) -> None:
    assert (compared(times("a", 1, 1, 1), times("b", *medians)).ratio(1).low > 1) == slower


def test_noise_shows_in_any_model() -> None:
    calm, wild = times("a", 1, 1.2), times("b", 1, 1.3)
    assert (calm.noisy, wild.noisy) == (False, True)
    assert (compared(calm, calm).noisy, compared(calm, wild).noisy) == (False, True)


def test_plain_values_for_reports() -> None:
    found = compared(times("a", 2, 2), times("b", 1, 1)).to_dict()
    assert (found["rounds"], found["threads"], found["shapes"]) == (2, 1, {"x": [1, 2]})
    first, second = found["models"]
    assert (first["model"], first["runs"], "ratio" in first) == ("a", 6, False)
    assert (second["ratio"], second["ratio_best"], second["best_ms"]) == (0.5, 0.5, 0.9)
    assert found["onnxruntime"]


def test_a_run_has_all_rounds_and_reports_each() -> None:
    seen: list[int] = []
    models = [("abs", model("Abs")), ("neg", model("Neg"))]
    feed: dict[str, Array] = {"x": np.ones((3, 2), np.float32), "unused": np.ones(1)}
    found = compare_latency(models, feed, QUICK, lambda: seen.append(1))
    assert [t.label for t in found.timings] == ["abs", "neg"]
    assert all([len(r) for r in t.rounds] == [3] * 4 for t in found.timings)
    assert all(t > 0 for timed in found.timings for t in timed.all)
    assert (len(seen), found.threads, found.shapes["x"]) == (4, 1, [3, 2])


def test_models_take_turns_with_one_live_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def fake(name: bytes, *_: object) -> list[float]:
        order.append(name.decode())
        return [1.0]

    monkeypatch.setattr(latency, "_round", fake)
    compare_latency([("a", b"a"), ("b", b"b"), ("c", b"c")], {}, QUICK)
    assert order == [*"abc", *"cba", *"abc", *"cba"]


def test_runs_go_on_until_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def clock() -> Iterator[float]:
        now = 0.0
        while True:
            yield now
            now += 0.1

    ticks = clock()
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    options = TimingOptions(threads=1, rounds=1, seconds=3.05, min_runs=1, warmup=0)
    (found,) = compare_latency(
        [("abs", model("Abs"))], {"x": np.ones((1, 2), np.float32)}, options
    ).timings
    assert len(found.all) == 11  # three readings of the clock a run, one less for the first
    assert found.best == pytest.approx(100)


def test_what_does_not_run_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="no value was fed for input 'x'"):
        compare_latency([("abs", model("Abs"))], {"z": np.ones(1, np.float32)}, QUICK)
    with pytest.raises(ModelError, match="cannot load the model"):
        compare_latency([("bad", b"bad")], {}, QUICK)


@pytest.mark.parametrize(("slow", "runs"), [(0.0, 1), (60.0, 3)])
def test_a_slow_model_is_run_but_twice_a_round(
    slow: float, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "_SLOW", slow)
    (found,) = compare_latency(
        [("one", model("Abs"))], {"x": np.ones((1, 2), np.float32)}, QUICK
    ).timings
    assert [len(r) for r in found.rounds] == [runs] * QUICK.rounds
