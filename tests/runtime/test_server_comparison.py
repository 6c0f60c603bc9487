"""Models under load: what is compared, what is noted, and one start in a process of its own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from qcompile.data.feeds import Feed
from qcompile.errors import DataError, ModelError
from qcompile.rewriting.testing import model_proto
from qcompile.runtime import server_comparison, session, startup
from qcompile.runtime.latency import Comparison, TimingOptions
from qcompile.runtime.request_load import Load, LoadRound, Plan, send
from qcompile.runtime.server_comparison import compare_under_load
from qcompile.runtime.session import Session
from qcompile.runtime.startup import Served, Startup
from qcompile.system import memory
from tests.runtime.virtual_clock import VirtualClock

FEEDS: list[Feed] = [{"x": np.ones((n, 2), np.float32)} for n in (1, 3)]
START = Startup(load=0.5, first_run=0.25, base=50, resident=70, peak=90)


def model(op: str = "Abs") -> bytes:
    text = f"g (float[N,2] x) => (float[N,2] y) {{ y = {op}(x) }}"
    return bytes(model_proto(text).SerializeToString())


@dataclass(frozen=True)
class Takes:
    """A model whose run takes so many seconds of the virtual clock."""

    clock: VirtualClock
    seconds: float

    def __call__(self, streams: int, _threads: int) -> Sequence[Callable[[Feed], None]]:
        return [self.clock.run(self.seconds)] * streams


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> VirtualClock:
    """The clock of all load; starts cost what they cost, and the machine has two cores."""
    virtual = VirtualClock()

    def on_it(calls: Any, feeds: Any, plan: Plan) -> LoadRound:
        if plan.seconds == server_comparison._WARM_UP:
            return LoadRound(plan, [])
        return send(calls, feeds, plan, virtual)

    monkeypatch.setattr(server_comparison, "send", on_it)
    monkeypatch.setattr(server_comparison, "startup_in_new_process", lambda *_: START)
    monkeypatch.setattr(server_comparison, "_floor_ms", lambda *_: 0.25)
    monkeypatch.setattr(session, "threads", lambda: 2)
    return virtual


def compared(
    clock: VirtualClock, seconds: Sequence[float], load: Load, *, threads: int = 1
) -> Comparison:
    models: list[tuple[str, Served]] = [(f"m{i}", Takes(clock, s)) for i, s in enumerate(seconds)]
    return compare_under_load(models, FEEDS, load, TimingOptions(threads, rounds=4, seconds=64))


def test_figures_back_to_back(clock: VirtualClock) -> None:
    found = compared(clock, (0.25, 0.125), Load(2)).to_dict()
    assert found["shapes"] == {"x": [3, 2]}
    server = found["server"]
    assert server["smallest_shapes"] == {"x": [1, 2]}
    assert (server["streams"], server["sessions"], server["cores"]) == (2, 1, 2)
    assert (server["arrival"], server["seconds"], server["feeds"]) == (None, 64, 2)
    assert (server["floor_ms"], server["base_bytes"]) == (0.25, 50)
    first, second = found["models"]
    assert (first["median_ms"], first["p90_ms"], first["server"]["p99_ms"]) == (250, 250, 250)
    assert (first["server"]["runs_per_second"], first["server"]["samples_per_second"]) == (8, 16)
    assert (first["server"]["load_ms"], first["server"]["first_run_ms"]) == (500, 250)
    assert (first["server"]["resident_bytes"], first["server"]["peak_bytes"]) == (70, 90)
    assert "throughput_ratio" not in first["server"]
    assert (second["server"]["throughput_ratio"], second["ratio"]) == (2, 0.5)
    assert server["notes"] == []


def test_figures_of_arrivals(clock: VirtualClock) -> None:
    found = compared(clock, (0.125, 0.0625), Load(1, arrival=4.0))
    slow, fast = (timing.server for timing in found.timings)
    assert slow is not None and fast is not None
    assert (slow.capacity, fast.capacity) == pytest.approx((8, 16))
    assert slow.queue_ms > fast.queue_ms > 0  # at half the capacity, random arrivals do queue
    assert slow.runs_per_second == pytest.approx(4, rel=0.3)
    assert not slow.saturated and slow.unanswered == 0
    assert [t.best for t in found.timings] == pytest.approx([125, 62.5])
    assert found.server is not None and found.server.notes == []


def test_a_saturated_model_is_reported_as_such(clock: VirtualClock) -> None:
    found = compared(clock, (0.125, 1.0), Load(1, arrival=4.0))
    assert found.server is not None
    fine, full = (timing.server for timing in found.timings)
    assert fine is not None and full is not None
    assert (fine.saturated, full.saturated) == (False, True)
    assert (full.capacity, full.runs_per_second) == pytest.approx((1, 1), rel=0.05)
    note, _ = found.server.notes  # and that runs are few
    assert "m1 is saturated: 4 requests arrive per second, it answers " in note
    assert full.unanswered > 0 and f"{full.unanswered} were never answered" in note
    assert f"up to {full.waiting} were waiting" in note


def test_all_models_get_the_same_requests(
    clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[Plan] = []
    on_the_clock: Any = vars(server_comparison)["send"]

    def seen(calls: Any, feeds: Any, plan: Plan) -> LoadRound:
        plans.append(plan)
        sent: LoadRound = on_the_clock(calls, feeds, plan)
        return sent

    monkeypatch.setattr(server_comparison, "send", seen)
    compared(clock, (0.125, 0.0625), Load(1, arrival=4.0))
    rounds = [p for p in plans if p.seconds == 64]
    assert rounds[0::2] == rounds[1::2] and len({id(p) for p in rounds}) == 4


def test_notes_name_what_disturbs(clock: VirtualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_comparison, "_floor_ms", lambda *_: 50.0)
    found = compared(clock, (0.25, 0.5), Load(2), threads=2)
    assert found.server is not None
    cores, slower, floor = found.server.notes
    assert "2 streams with 2 threads each need more than the 2 cores" in cores
    assert slower == (
        "m1 is slower than the reference: it answers 0.50 times as many requests as m0"
    )
    assert "50.000 ms with a model that does nothing, over 5% of the fastest median" in floor
    assert (found.server.sessions, found.threads) == (2, 2)
    slow = compared(clock, (0.0625, 0.125), Load(1, arrival=4.0)).server
    assert slow is not None
    assert any("m1 is slower" in n and "as long under this load as m0" in n for n in slow.notes)


def test_a_p99_of_few_runs_is_noted(clock: VirtualClock) -> None:
    models: list[tuple[str, Served]] = [("m", Takes(clock, 0.25))]
    found = compare_under_load(models, FEEDS, Load(), TimingOptions(1, rounds=1, seconds=2))
    assert found.server is not None
    assert "p99 is of 8 runs" in found.server.notes[0]


@pytest.mark.parametrize(("streams", "threads"), [(1, 2), (2, 1), (3, 1)])
def test_the_cores_are_divided_between_streams(
    streams: int, threads: int, clock: VirtualClock
) -> None:
    assert compared(clock, (0.25,), Load(streams), threads=0).threads == threads


def test_a_start_that_fails_leaves_the_other_figures(
    clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> Startup:
        raise ModelError("no process")

    monkeypatch.setattr(server_comparison, "startup_in_new_process", fails)
    found = compared(clock, (0.25,), Load(2))
    assert found.timings[0].server is not None and found.server is not None
    assert found.timings[0].server.load_ms is None
    assert found.server.notes == ["no process"]


def test_nothing_to_send() -> None:
    with pytest.raises(DataError, match="at least one feed"):
        compare_under_load([("m", model())], [], Load())
    with pytest.raises(DataError, match="--seconds"):
        compare_under_load([("m", model())], FEEDS, Load(arrival=1e-6))


def test_one_session_unless_streams_have_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []

    def counted(*args: Any) -> Session:
        opened.append(args)
        return Session(*args)

    monkeypatch.setattr(startup, "Session", counted)
    for threads, expected in ((1, 1), (2, 3)):
        opened.clear()
        feeds = [{**feed, "unused": np.ones(1)} for feed in FEEDS]
        options = TimingOptions(threads)
        calls, read = startup.open_streams("m", model(), feeds, Load(3), options)
        assert (len(opened), len(calls)) == (expected, 3)
        assert [list(feed) for feed in read] == [["x"]] * 2


def test_a_feed_that_the_model_does_not_take_is_a_model_error() -> None:
    options = TimingOptions(1, rounds=1, seconds=0.01)
    wrong: list[Feed] = [*FEEDS, {"x": np.ones((1, 5), np.float32)}]
    with pytest.raises(ModelError, match="failed on the model"):
        compare_under_load([("m", model())], wrong, Load(2), options)


def test_a_start_in_a_process_of_its_own() -> None:
    options = TimingOptions(1, seconds=0.01)
    found = startup.startup_in_new_process("m", model(), FEEDS, Load(2), options)
    assert found.load > 0 and found.first_run > 0
    assert found.base is not None and found.resident is not None and found.peak is not None
    assert found.base > 0 and found.peak >= found.resident


def test_a_start_that_fails_says_why() -> None:
    with pytest.raises(ModelError, match=r"m cannot be started .*: ONNX Runtime cannot load"):
        startup.startup_in_new_process("m", b"bad", FEEDS, Load(), TimingOptions(1))


def test_a_process_that_dies_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    dead = subprocess.CompletedProcess([], -9, b"", b"")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: dead)
    with pytest.raises(ModelError, match="exit code -9"):
        startup.startup_in_new_process("m", model(), FEEDS, Load(), TimingOptions(1))


def test_the_result_is_the_last_line_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries print what they like."""
    text = "a banner\n" + json.dumps(vars(START))
    done = subprocess.CompletedProcess([], 0, text.encode(), b"")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    found = startup.startup_in_new_process("m", model(), FEEDS, Load(), TimingOptions(1))
    assert found == START


def test_memory_counts_from_before_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([memory.Resident(100, 900), memory.Resident(150, 180)])
    monkeypatch.setattr(memory, "resident_memory", lambda: next(readings))
    task = ("m", model(), FEEDS, Load(), TimingOptions(1, seconds=0.01))
    found = startup.measure_startup(*task)
    assert (found.base, found.resident, found.peak) == (100, 50, 80)


def test_what_the_generator_itself_takes() -> None:
    """An upper bound of a request to nothing; no machine takes 50 ms for one."""
    for load in (Load(2), Load(2, arrival=500.0), Load(1, arrival=1e6)):
        assert 0 < server_comparison._floor_ms(FEEDS, load) < 50
