"""Load: what percentiles and queues must be for runs of exactly known duration."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

import numpy as np
import pytest

from qcompile.data.feeds import Feed
from qcompile.errors import DataError, ModelError
from qcompile.quant import Array
from qcompile.runtime.request_load import Load, LoadRound, Plan, send
from tests.runtime.virtual_clock import VirtualClock, running

FEED: Feed = {"x": np.ones((3, 2), np.float32)}  # three samples
FIRST = np.array([0])


def served(streams: int, run: float, arrivals: list[float] | None, seconds: float = 1) -> LoadRound:
    """A round in which every run takes ``run`` seconds."""
    clock = VirtualClock()
    plan = Plan(seconds, FIRST, None if arrivals is None else np.array(arrivals))
    return send([clock.run(run)] * streams, [FEED], plan, clock)


def latencies(found: LoadRound) -> list[float]:
    return sorted(found.latencies)


@pytest.mark.parametrize(("streams", "rate"), [(1, 4.0), (2, 8.0), (3, 12.0)])
def test_back_to_back_every_stream_is_always_busy(streams: int, rate: float) -> None:
    found = served(streams, 0.25, None)
    assert latencies(found) == [250.0] * 4 * streams
    assert (found.runs_per_second, found.samples_per_second) == (rate, 3 * rate)
    assert (found.capacity, found.queue_ms, found.waiting, found.unanswered) == (rate, 0, 0, 0)


def test_each_stream_makes_a_run_however_long_it_takes() -> None:
    found = served(2, 4.0, None)
    assert (latencies(found), found.runs_per_second) == ([4000.0] * 2, 0.5)


def test_streams_that_end_at_different_times_count_their_own() -> None:
    clock = VirtualClock()
    found = send([clock.run(0.5), clock.run(0.75)], [FEED], Plan(1, FIRST), clock)
    assert found.runs_per_second == 2 + 2 / 1.5  # until 1 s and until 1.5 s


def test_latency_counts_from_the_arrival_not_from_the_start() -> None:
    """Arrivals twice as fast as runs: each request waits a quarter longer than the one before."""
    found = served(1, 0.5, [0, 0.25, 0.5, 0.75])
    assert latencies(found) == [500.0, 750.0, 1000.0, 1250.0]
    assert found.queue_ms == 375
    assert found.runs_per_second == 2  # within the round; the others were answered after it
    assert (found.capacity, found.waiting, found.unanswered) == (2, 1, 0)


def test_a_second_stream_empties_the_queue() -> None:
    found = served(2, 0.5, [0, 0, 0.25, 1.5], seconds=2)
    assert latencies(found) == [500.0, 500.0, 500.0, 750.0]
    assert (found.queue_ms, found.waiting) == (62.5, 0)


def test_requests_are_answered_in_the_order_of_their_arrival() -> None:
    found = served(2, 0.5, [0, 0.125, 0.25, 0.375])
    by_arrival = sorted(found.answers)
    assert [a.start for a in by_arrival] == [0, 0.125, 0.5, 0.625]


def test_the_capacity_does_not_count_the_time_without_requests() -> None:
    found = served(1, 0.25, [0, 0.75])
    assert (found.capacity, found.runs_per_second) == (4, 2)


def test_a_queue_that_cannot_be_emptied_is_given_up() -> None:
    found = served(1, 0.5, [0.0] * 10)
    assert [a.start for a in found.answers] == [0, 0.5, 1, 1.5]  # none after twice the round
    assert (found.arrived, found.waiting, found.unanswered) == (10, 7, 6)
    assert found.runs_per_second == 2


def test_feeds_take_turns_in_the_order_of_the_plan() -> None:
    seen: list[int] = []
    clock = VirtualClock()

    def call(feed: Feed) -> None:
        seen.append(int(feed["x"][0]))
        clock.run(0.25)(feed)

    feeds: list[Feed] = [{"x": np.full(n + 1, n)} for n in range(3)]
    found = send([call], feeds, Plan(1, np.array([2, 0, 1])), clock)
    assert seen == [2, 0, 1, 2]
    assert found.samples_per_second == 3 + 1 + 2 + 3


def test_plans_are_the_same_each_time_and_differ_between_rounds() -> None:
    load = Load(1, arrival=1000.0, seed=3)
    first, again, second = load.plan(0, 2, 9), load.plan(0, 2, 9), load.plan(1, 2, 9)
    assert first.arrivals is not None and second.arrivals is not None
    np.testing.assert_array_equal(first.arrivals, again.arrivals)
    np.testing.assert_array_equal(first.order, again.order)
    assert first.arrivals[0] != second.arrivals[0]
    other = Load(1, arrival=1000.0, seed=4).plan(0, 2, 9).arrivals
    assert other is not None and other[0] != first.arrivals[0]


def test_arrivals_are_a_poisson_process() -> None:
    """Counts in windows have the mean and the variance rate * window, here 20 ± 6 deviations."""
    arrivals = Load(1, arrival=200.0).plan(0, 100, 1).arrivals
    assert arrivals is not None
    assert (np.diff(arrivals) >= 0).all() and arrivals[0] >= 0 and arrivals[-1] < 100
    counts = np.bincount((arrivals * 10).astype(int), minlength=1000)
    assert abs(counts.mean() - 20) < 6 * np.sqrt(20 / 1000)
    assert abs(counts.var() - 20) < 6 * 20 * np.sqrt(2 / 1000)


def test_at_least_one_request_arrives() -> None:
    arrivals = Load(1, arrival=1e-3).plan(0, 1, 1).arrivals
    assert arrivals is not None and len(arrivals) == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"streams": 0}, "streams 0: expected 1 to 1024"),
        ({"streams": 5000}, "streams 5000"),
        ({"arrival": 0.0}, "arrival 0: expected requests per second, over 0"),
        ({"arrival": -1.0}, "arrival -1"),
        ({"arrival": float("nan")}, "arrival nan"),
        ({"arrival": float("inf")}, "arrival inf"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_values_out_of_range(given: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        Load(**given)


@pytest.mark.parametrize(
    ("rate", "said"), [(1.0, "at least 10 .*--seconds 10"), (1e9, "at most 1000000")]
)
def test_rounds_with_too_few_or_too_many_requests(rate: float, said: str) -> None:
    Load(arrival=5.0).check_seconds(2)
    Load().check_seconds(1e-3)
    with pytest.raises(DataError, match=said):
        Load(arrival=rate).check_seconds(2)


def test_an_error_in_one_stream_ends_all() -> None:
    def fails(feed: Feed) -> None:
        raise ModelError("broken")

    with pytest.raises(ModelError, match="broken"):
        send([lambda feed: time.sleep(0.001), fails], [FEED], Plan(60, FIRST))
    assert running() == 0


@pytest.mark.parametrize("arrivals", [None, np.array([0.0, 50.0])])
@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_joins_the_streams_first(arrivals: Array | None) -> None:
    """Also those that sleep until a request arrives."""
    main = threading.main_thread().ident
    assert main is not None
    kill = threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT))
    kill.start()
    with pytest.raises(KeyboardInterrupt):
        send([lambda feed: time.sleep(0.001)] * 2, [FEED], Plan(60, FIRST, arrivals))
    assert running() == 0
    kill.join()
