"""--max-memory: the same bytes within it, one line over it, and what is kept in files meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest

import qcompile
from qcompile import Gates, Options
from qcompile.compiler.stages.build_report import over_budget
from qcompile.errors import DataError
from qcompile.ir import Graph
from qcompile.ir.analysis.activation_memory import footprint
from qcompile.ir.model_io.from_proto import from_proto
from qcompile.quant import Array, ChannelStats
from qcompile.rewriting.testing import model_proto, normal
from qcompile.runtime.memory_budget import FETCHED, LIBRARIES, Budget
from qcompile.runtime.session import evaluate
from qcompile.runtime.spilled_arrays import KeptChannels, KeptValues, Store

WIDE = 1024
TEXT = """mlp (float[batch,1024] x) => (float[batch,8] y) {
    h = MatMul(x, w1) r = Relu(h) y = MatMul(r, w2)
}"""
WEIGHTS = 4 * WIDE * (WIDE + 8)
OPEN = Gates(min_cosine=None, min_worst_cosine=None, min_r2=None, max_latency_ratio=None)


def proto() -> onnx.ModelProto:
    return model_proto(TEXT, w1=normal(WIDE, WIDE) / 32, w2=normal(WIDE, 8, seed=1) / 32)


@pytest.fixture(scope="module")
def graph() -> Graph:
    return from_proto(proto())


def feed(rows: int) -> dict[str, Array]:
    return {"x": np.random.default_rng(rows).standard_normal((rows, WIDE)).astype(np.float32)}


def test_activations_alive_at_once(graph: Graph) -> None:
    """By hand: two tensors of [5, 1024] live at a time; the outputs of [5, 8] are small."""
    found = footprint(graph, evaluate, {"x": (5, WIDE)})
    assert found.bytes == 2 * 5 * WIDE * 4
    assert found.largest == 5 * WIDE * 4 and found.tensor in ("x", "h", "r")


def test_shapes_that_depend_on_data_count_nothing() -> None:
    graph = from_proto(model_proto("g (float[N] x) => (int64[1,K] y) { y = NonZero(x) }"))
    found = footprint(graph, evaluate, {"x": (6,)})
    assert found.bytes == 24


def test_feeds_are_halved_until_they_fit(graph: Graph) -> None:
    limit = 8 * WEIGHTS
    budget = Budget(limit, graph, evaluate)
    assert budget.weights == WEIGHTS and budget.largest == "w1"
    assert budget.fetched == limit // 8
    # Two tensors are alive, each twice in the runtime's arena.
    most = (limit - WEIGHTS - budget.fetched) // (2 * 2 * WIDE * 4)
    (part,) = budget.parts(feed(most))
    assert len(part["x"]) == most
    halves = list(budget.parts(feed(most + 1)))
    assert [len(p["x"]) for p in halves] == [(most + 1) // 2, (most + 1) - (most + 1) // 2]
    assert np.array_equal(np.concatenate([p["x"] for p in halves]), feed(most + 1)["x"])
    assert len(list(Budget(None, graph, evaluate).parts(feed(10 * most)))) == 1


def test_what_cannot_fit_says_what_would(graph: Graph) -> None:
    with pytest.raises(DataError, match=r"'w1'.*give at least (\d+)") as said:
        list(Budget(WEIGHTS, graph, evaluate).parts(feed(4)))
    least = int(str(said.value).rsplit("at least ", 1)[1].split(",")[0])
    assert [len(p["x"]) for p in Budget(least, graph, evaluate).parts(feed(4))] == [1] * 4
    with pytest.raises(DataError):
        list(Budget(least - 16, graph, evaluate).parts(feed(4)))
    fixed = Budget(least, graph, evaluate, divisible=False)
    with pytest.raises(DataError, match=r"'[xhr]'"):
        list(fixed.parts(feed(4)))


def test_what_is_said_to_fit_fits_all_feeds() -> None:
    """A later, longer sample needs more than the first: whoever follows the advice is not refused
    again."""
    text = "g (float[B,S,8] x) => (float[B,S,8] y) { h = MatMul(x, w) y = Relu(h) }"
    made = model_proto(text, w=np.eye(8, dtype=np.float32))
    feeds = [{"x": np.ones((2, length, 8), np.float32)} for length in (4, 64, 16, 8)]
    limit = 1000
    for runs in range(2):
        options = Options(bench=False, threads=1, max_memory=limit)
        if runs:
            qcompile.compile(made, feeds, options=options, gates=OPEN)
            return
        with pytest.raises(DataError, match=r"--max-memory .*give at least (\d+)") as said:
            qcompile.compile(made, feeds, options=options, gates=OPEN)
        limit = int(str(said.value).rsplit("at least ", 1)[1].split(",")[0])


def test_the_largest_sample_is_looked_for(graph: Graph) -> None:
    needed = 2 * 2 * WIDE * 4  # two tensors of one row, twice in the runtime's arena
    limit = (WEIGHTS + needed) * 8 // 7 + 8
    Budget(limit, graph, evaluate).check([feed(4), feed(300)])
    Budget(None, graph, evaluate).check([feed(4)])
    whole = Budget(limit, graph, evaluate, divisible=False)
    with pytest.raises(
        DataError, match=f"activations of the smallest part of a feed {300 * needed}"
    ):
        whole.check([feed(4), feed(300), feed(7)])


def test_large_budgets_fetch_no_more_than_is_fast(graph: Graph) -> None:
    assert (
        Budget(1 << 40, graph, evaluate).fetched == FETCHED == Budget(None, graph, evaluate).fetched
    )


@pytest.mark.parametrize("calibrator", ["minmax", "entropy"])
def test_a_budget_changes_no_byte(calibrator: str) -> None:
    feeds = [feed(n) for n in (200, 90, 300)]
    made = []
    for limit in (None, 8 * WEIGHTS):
        options = Options(bench=False, threads=1, max_memory=limit)
        made.append(
            qcompile.compile(proto(), feeds, calibrator=calibrator, gates=OPEN, options=options)
        )
    free, tight = made
    assert free.model == tight.model
    assert free.report.verdict is not None and tight.report.verdict is not None
    assert free.report.verdict.samples == tight.report.verdict.samples


def test_over_the_budget_is_one_line_before_any_output(tmp_path: Path) -> None:
    options = Options(bench=False, threads=1, max_memory=WEIGHTS)
    for mode in ("static", "dynamic"):
        with pytest.raises(DataError, match=rf"--max-memory {WEIGHTS} .*weights take {WEIGHTS}"):
            qcompile.compile(proto(), [feed(4)], mode=mode, options=options)


def test_made_up_feeds_are_held_to_the_budget_too() -> None:
    options = Options(bench=False, threads=1, max_memory=WEIGHTS)
    with pytest.raises(DataError, match=rf"--max-memory {WEIGHTS} .*weights take"):
        qcompile.compile(proto(), mode="dynamic", options=options)


def test_no_search_where_it_would_not_fit() -> None:
    options = Options(bench=False, threads=1, max_memory=2 * WEIGHTS, search_time=60, force=True)
    gates = Gates(min_cosine=1.0, max_latency_ratio=None)
    feeds = [feed(4), feed(5), feed(6)]
    found = qcompile.compile(proto(), feeds, gates=gates, options=options)
    note = next(n for n in found.report.note_texts if "no search" in n)
    assert f"takes {3 * WEIGHTS} bytes, over --max-memory {2 * WEIGHTS}" in note
    with pytest.raises(DataError, match="sensitivity takes"):
        qcompile.sensitivity(proto(), feeds, gates=gates, options=options)


def test_a_stage_that_took_more_is_noted() -> None:
    memory = {"load": LIBRARIES, "verify": LIBRARIES + 1001, "bench": LIBRARIES + 2000}
    (note,) = over_budget(1000, memory)
    assert note.text.startswith(f"verify took {LIBRARIES + 1001} bytes")
    assert over_budget(2000, memory) == over_budget(None, memory) == []


def test_kept_arrays_are_files_that_go() -> None:
    store = Store()
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    kept = store.keep(values)
    path = kept.path
    assert path.stat().st_size == values.nbytes and np.array_equal(kept.load(), values)
    constant: Any = KeptValues(kept)
    assert tuple(constant.shape) == (2, 3) and np.array_equal(constant.load(), values)
    view = store.array(values.T)
    assert np.array_equal(view, values.T) and len(list(path.parent.iterdir())) == 1
    del kept, constant
    assert not path.exists()
    assert store.keep(np.zeros((0, 3), np.float32)).load().shape == (0, 3)


def test_kept_channels_are_a_mapping() -> None:
    rows = np.arange(8, dtype=np.float32).reshape(4, 2)
    stats = ChannelStats(rows.min(0), rows.max(0), rows)
    channels = KeptChannels(Store(), {"a": stats})
    channels["b"] = channels["a"].scaled(np.array([2, 1], np.float32))
    assert np.array_equal(channels["b"].rows, rows * [2, 1]) and [*channels] == ["a", "b"]
    del channels["a"]
    assert len(channels) == 1 and "a" not in channels
