"""The search raises few tensors to more bits, meets the gate, keeps to its time, and resumes."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qcompile
from qcompile import Gates, Options, Recipe
from qcompile.compiler.report.records import SearchAccount
from qcompile.compiler.report.report import Report
from qcompile.compiler.search import mixed_precision
from qcompile.compiler.search.measurements import Measurements, StateFile
from qcompile.compiler.search.sensitivity import Meter, Score
from qcompile.compiler.stages.result import RejectedError
from qcompile.errors import DataError, OutputError
from qcompile.ir.model_io.to_proto import serialize
from qcompile.planning.context import Precision
from qcompile.quant import Array
from qcompile.rewriting.testing import encoder
from tests.encoder_files import token_feeds

# All 8 bits in the weights of 16 channels, so that the wide activations are what is to be found.
QDQ = Recipe(target="qdq", transforms="none", isa="avx512-vnni")
CPU = Recipe(target="cpu", transforms="none")
CLOSE = Gates(min_cosine=0.995, max_latency_ratio=None)
FEEDS = token_feeds(4)


@pytest.fixture(scope="module")
def model() -> bytes:
    """x0 and x1, and the sums y0 and y1, have one wide channel; at 8 bits the cosine is .97."""
    return serialize(encoder(2, width=16, outlier=40.0))


def options(state: Path | None = None, seconds: float = 60, **more: object) -> Options:
    base = Options(bench=False, threads=1, search_time=seconds, search_state=state)
    return replace(base, **more)  # type: ignore[arg-type]


def compile(
    model: bytes, recipe: Recipe = QDQ, gates: Gates = CLOSE, given: Options | None = None
) -> qcompile.Result:
    return qcompile.compile(model, FEEDS, recipe=recipe, gates=gates, options=given or options())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Measurements: how many switches were on in each."""
    made: list[int] = []
    original = Meter.__call__

    def counted(self: Meter, on: Collection[int], samples: int = 0) -> Score:
        made.append(len(on))
        return original(self, on, samples)

    monkeypatch.setattr(Meter, "__call__", counted)
    return made


# ---- what it finds


def searched(report: Report) -> SearchAccount:
    assert report.search is not None
    return report.search


def test_few_tensors_are_lifted_and_the_gate_is_met(model: bytes) -> None:
    with pytest.raises(RejectedError, match=r"below 0\.995"):
        compile(model, given=options(seconds=0))
    report = compile(model).report
    assert report.verdict is not None and report.verdict.passed
    lifted = {row.item: row.error_alone for row in searched(report).raised}
    assert 1 <= len(lifted) <= 4 and set(lifted) <= {"x0", "x1", "y0", "y1"}
    assert report.recipe.precision == tuple((name, 16) for name in lifted)
    rows = {r.tensor: r for r in report.ledger if r.kind == "activation"}
    for name, error in lifted.items():
        assert rows[name].dtype == "uint16"
        assert rows[name].reason == f"raised by the search: error {error:.1e} alone"
    said = f"by the search {len(lifted)} of {searched(report).items} tensors raised to 16 bits"
    assert any(said in note for note in report.note_texts)


def test_no_subset_of_what_was_lifted_is_predicted_to_do(model: bytes) -> None:
    found = [row.item for row in searched(compile(model).report).raised]
    for name in found:
        rest: dict[str, Precision] = {n: 16 for n in found if n != name}
        recipe = replace(QDQ, precision=tuple(rest.items()))
        with pytest.raises(RejectedError):
            compile(model, recipe, given=options(seconds=0))


def test_on_cpu_linears_stay_float_as_a_whole(model: bytes) -> None:
    report = compile(model, CPU).report
    lifted = [row.item for row in searched(report).raised]
    assert lifted in (["MatMul:fm0"], ["MatMul:fm0", "MatMul:fm1"])
    kept = {r.tensor for r in report.ledger if r.kind == "weight" and r.dtype == "float"}
    assert {"wf0"} <= kept and "operators raised to float" in " ".join(report.note_texts)


def test_a_recipe_with_precision_is_kept_behind_what_is_lifted(model: bytes) -> None:
    recipe = replace(QDQ, precision=(("x0", 8), ("role:query", "float")))
    found = compile(model, recipe).report.recipe.precision
    assert found[-2:] == recipe.precision and ("x0", 16) in found


def test_the_result_is_what_its_recipe_gives(model: bytes) -> None:
    """Same bytes from the recipe in the report, without a search."""
    found = compile(model)
    again = compile(model, found.report.recipe, given=options(seconds=0))
    assert again.model == found.model


def test_without_a_miss_there_is_no_search(model: bytes, calls: list[int]) -> None:
    easy = replace(CLOSE, min_cosine=0.5, min_worst_cosine=None)
    assert compile(model, gates=easy).report.search is None
    assert calls == []


# ---- what it cannot do


def test_a_gate_out_of_reach(model: bytes, tmp_path: Path) -> None:
    state = tmp_path / "m.search.json"
    with pytest.raises(RejectedError) as caught:
        compile(model, gates=replace(CLOSE, max_abs=-1.0), given=options(state))
    text = str(caught.value)
    assert "--max-abs" in text and "with all raised it would be" in text
    assert "0 of" in text and not state.exists()


def test_all_in_float_is_no_result(model: bytes) -> None:
    with pytest.raises(RejectedError, match="leaves nothing quantized"):
        compile(model, CPU, replace(CLOSE, min_sqnr=200.0))


def test_time_is_kept_and_the_best_so_far_is_judged(model: bytes, tmp_path: Path) -> None:
    """No time to rank: some prefix is compiled all the same, and what was measured is kept."""
    state = tmp_path / "m.search.json"
    begun = options(state, seconds=1e-6)
    found = compile(model, given=begun).report
    assert searched(found).measurements < 6 and searched(found).compilations == 1
    assert found.verdict is not None and found.verdict.passed
    assert not state.exists()


def test_when_the_time_is_up_the_same_command_goes_on(model: bytes, tmp_path: Path) -> None:
    state = tmp_path / "m.search.json"
    with pytest.raises(RejectedError, match=r"the search time ran out .*--search-time") as caught:
        compile(model, CPU, given=options(state, seconds=1e-6))
    assert "0 of 12 operators raised" in str(caught.value)
    assert caught.value.result.report.verdict is not None
    assert state.exists()
    found = compile(model, CPU, given=options(state)).report
    assert searched(found).raised and not state.exists()


def test_one_pass_data_cannot_be_searched(model: bytes) -> None:
    with pytest.raises(RejectedError) as caught:
        qcompile.compile(model, iter(FEEDS), recipe=QDQ, gates=CLOSE, options=options())
    assert any("read once only" in n for n in caught.value.result.report.note_texts)


def test_made_up_inputs_are_not_searched(model: bytes) -> None:
    with pytest.raises(RejectedError) as caught:
        qcompile.compile(model, recipe=CPU, gates=replace(CLOSE, min_sqnr=100.0), options=options())
    assert any("it needs data" in n for n in caught.value.result.report.note_texts)


def test_where_compiling_misses_more_is_lifted(
    model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prediction that is too good: the next of the ranking follow until the gate is met."""
    original = mixed_precision._Search._passes
    monkeypatch.setattr(
        mixed_precision._Search,
        "_passes",
        lambda self, lifted: bool(lifted) or original(self, lifted),
    )
    found = compile(model).report
    assert searched(found).compilations > 1 and found.verdict is not None and found.verdict.passed


# ---- interrupts


def stopped(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Ctrl-C comes during the measurement of that number."""
    original = Meter.__call__
    seen: list[int] = []

    def interrupted(self: Meter, on: Collection[int], samples: int = 0) -> Score:
        if len(seen) == after:
            raise KeyboardInterrupt
        seen.append(len(on))
        return original(self, on, samples)

    monkeypatch.setattr(Meter, "__call__", interrupted)


def test_after_an_interrupt_it_goes_on(model: bytes, tmp_path: Path) -> None:
    state = tmp_path / "m.search.json"
    whole = searched(compile(model).report)
    with pytest.MonkeyPatch.context() as patch:
        stopped(patch, 20)
        with pytest.raises(KeyboardInterrupt, match=r"19 measurements are kept in m\.search\.json"):
            compile(model, given=options(state))
    assert len(json.loads(state.read_text())["scores"]) == 19  # and one to time the model
    rest = searched(compile(model, given=options(state)).report)
    assert rest.raised == whole.raised
    assert rest.measurements == whole.measurements - 19
    assert not state.exists()


@pytest.mark.parametrize("change", ["data", "recipe", "gates"])
def test_a_state_of_something_else_is_not_taken(model: bytes, tmp_path: Path, change: str) -> None:
    state = tmp_path / "m.search.json"
    with pytest.MonkeyPatch.context() as patch:
        stopped(patch, 9)
        with pytest.raises(KeyboardInterrupt):
            compile(model, given=options(state))
    recipe = replace(QDQ, seed=1) if change == "recipe" else QDQ
    gates = replace(CLOSE, min_cosine=0.996) if change == "gates" else CLOSE
    data = token_feeds(5, 3) if change == "data" else FEEDS
    found = qcompile.compile(model, data, recipe=recipe, gates=gates, options=options(state))
    fresh = qcompile.compile(model, data, recipe=recipe, gates=gates, options=options())
    assert searched(found.report).measurements == searched(fresh.report).measurements


def test_a_file_that_is_no_state_is_left_alone(model: bytes, tmp_path: Path) -> None:
    for text in ("precious", '{"format": "else"}', "[1]"):
        state = tmp_path / "m.search.json"
        state.write_text(text)
        with pytest.raises(OutputError, match="was not written by a search"):
            compile(model, given=options(state))
        assert state.read_text() == text


def test_a_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    kept = Score(1e-3, float("inf"), 0.9, 0.8, None, ("too low",))
    meter: Any = None  # never asked
    Measurements(meter, "d", StateFile(path), {"0:ff": kept}, {"3": kept}, 7).save()
    for digest, expected in (("d", ({"0:ff": kept}, {"3": kept}, 7)), ("other", ({}, {}, None))):
        again = Measurements(meter, digest, StateFile(path))
        again.resume()
        assert (again.scores, again.tried, again.samples) == expected
    StateFile(path).drop()
    assert not path.exists()


# ---- a metric of the user


def steady(inputs: Sequence[Mapping[str, Array]], made: Sequence[Mapping[str, Array]]) -> float:
    """Minus the largest value: any function of feeds and outputs will do."""
    assert len(inputs) == len(made) and inputs[0]["ids"].ndim == 2
    return -float(max(np.abs(batch["out"]).max() for batch in made))


@pytest.fixture
def scores(model: bytes) -> Iterator[tuple[float, float]]:
    """The metric of the float model, and of the one at 8 bits."""
    open_gates = Gates(None, None, min_r2=None, max_latency_ratio=None)
    report = compile(model, gates=open_gates, given=options(metric=steady)).report
    assert report.verdict is not None and report.verdict.metric is not None
    yield report.verdict.metric


def test_a_metric_is_a_gate_and_a_goal(model: bytes, scores: tuple[float, float]) -> None:
    was, now = scores
    assert abs(was - now) > 1e-3

    def measure(a: Sequence[Mapping[str, Array]], b: Sequence[Mapping[str, Array]]) -> float:
        return -abs(steady(a, b) - was)

    gates = Gates(None, None, min_r2=None, max_latency_ratio=None, min_metric=-abs(was - now) / 4)
    with pytest.raises(RejectedError, match="--min-metric"):
        compile(model, gates=gates, given=options(seconds=0, metric=measure))
    report = compile(model, gates=gates, given=options(metric=measure)).report
    assert searched(report).raised and report.verdict is not None
    assert report.to_dict()["verify"]["metric"]["compiled"] >= gates.min_metric


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise KeyError('labels')", "KeyError: 'labels'"),
        ("return 'good'", "ValueError"),
        ("return float('nan')", "NaN"),
    ],
)
def test_a_metric_that_fails(
    model: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, words: str
) -> None:
    (tmp_path / "task_metric.py").write_text(f"def score(feeds, outputs):\n    {body}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("task_metric", None)
    with pytest.raises(DataError, match="task_metric:score") as caught:
        compile(model, given=options(metric="task_metric:score"))
    assert words in str(caught.value)


def test_a_metric_that_is_not_there_is_told_before_any_work(model: bytes) -> None:
    with pytest.raises(DataError, match=r"expected package\.module:function"):
        compile(model, given=options(metric="nothing"))
