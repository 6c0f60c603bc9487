"""Results in notebooks and logs: short repr, tables as HTML, stages by callback and logger."""

from __future__ import annotations

import html.parser
import logging
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

import qcompile
from qcompile import errors
from qcompile.compiler import progress
from qcompile.compiler.progress import shown_progress
from qcompile.compiler.stages.options import CompileOptions
from qcompile.runtime.latency import TimingOptions
from qcompile.runtime.notebook_table import html_table

QUICK = CompileOptions(bench=False)


class Cells(html.parser.HTMLParser):
    """The text of each cell; raises AssertionError where a tag is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture
def result(model: Path, data: Path) -> qcompile.Result:
    return qcompile.compile(model, str(data), options=QUICK)


def test_every_error_is_public() -> None:
    names = {n for n, c in vars(errors).items() if isinstance(c, type)}
    assert names <= {*qcompile.__all__}
    assert all(getattr(qcompile, name) is getattr(errors, name) for name in names)


def test_results_are_short_and_have_a_table(
    result: qcompile.Result, model: Path, data: Path
) -> None:
    verdict = qcompile.verify(model, result.model, str(data))
    timing = TimingOptions(rounds=1, seconds=0.001, min_runs=1)
    timed = qcompile.bench([model, result.model], data=str(data), options=timing)
    for value, words in (
        (result, ("m.onnx: cpu, static", "of float", "cosine", "passed")),
        (result.report, ("Report", "passed")),
        (verdict, ("passed", "cosine", "32 samples")),
        (timed, ("m.onnx", "model 1", "x)")),
    ):
        assert len(repr(value)) < 300 and "\n" not in repr(value)
        assert all(word in repr(value) for word in words), repr(value)
        assert len(Cells(value._repr_html_()).texts) > 5


def test_a_failed_gate_is_in_repr_and_table(model: Path, data: Path) -> None:
    gates = qcompile.Gates(min_cosine=2.0)
    with pytest.raises(qcompile.RejectedError) as caught:
        qcompile.compile(model, str(data), gates=gates, options=QUICK)
    found = caught.value.result
    assert "1 failure" in repr(found) and "gate failed" in found._repr_html_()
    verdict = qcompile.verify(model, found.model, str(data), gates=gates)
    assert "1 gate" in repr(verdict) and "gate failed" in verdict._repr_html_()


def test_sensitivity_is_short_and_has_a_table(model: Path, data: Path) -> None:
    found = qcompile.sensitivity(model, str(data), by="layer", measure="alone")
    assert len(repr(found)) < 300 and "by layer" in repr(found)
    assert "alone: error" in Cells(found._repr_html_()).texts


def test_names_of_models_are_escaped() -> None:
    text = html_table("<b>", ["&"], [["<script>"]], ["<i>"])
    assert Cells(text).texts == ["<b>", "&", "<script>", "<i>"]
    assert "<script>" not in text


# ---- progress and logging


def test_a_callback_hears_stages_and_units(model: Path, data: Path) -> None:
    heard: list[tuple[str, int, int | None]] = []

    def hear(stage: str, done: int, total: int | None) -> None:
        heard.append((stage, done, total))

    compiled = qcompile.compile(model, str(data), options=QUICK, progress=hear)
    stages = [stage for stage, done, _ in heard if not done]
    assert stages[0] == "load" and {"calibrate", "verify"} <= {*stages}
    assert max(done for stage, done, _ in heard if stage == "calibrate") > 1
    heard.clear()
    qcompile.verify(model, compiled.model, str(data), progress=hear)
    assert heard[0] == ("verify", 0, None) and heard[-1][1] >= 4
    heard.clear()
    timing = TimingOptions(rounds=2, seconds=0.001, min_runs=1)
    qcompile.bench([model], data=str(data), options=timing, progress=hear)
    assert heard == [("bench", 0, 2), ("bench", 1, 2), ("bench", 2, 2)]


def test_stages_are_logged_and_details_for_debugging(
    model: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "qcompile"):
        qcompile.compile(model, str(data), options=QUICK)
    by_level = {
        level: [r.getMessage() for r in caplog.records if r.levelno == level]
        for level in (logging.INFO, logging.DEBUG)
    }
    assert "stage: calibrate" in by_level[logging.INFO]
    assert by_level[logging.INFO][-1].startswith("m.onnx: cpu, static")
    assert any(text.startswith("pass insert-qdq") for text in by_level[logging.DEBUG])
    assert all(r.name.split(".")[0] == "qcompile" for r in caplog.records)
    assert max(r.levelno for r in caplog.records) == logging.INFO


def test_the_library_prints_nothing_and_installs_no_handler(
    model: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    qcompile.compile(model, str(data), options=QUICK)
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("qcompile").handlers == []


def test_bars_are_drawn_where_a_notebook_can(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "draws_bars", lambda: True)
    with shown_progress(None) as shown:
        shown.step("calibrate", 2)
        shown.advance()
        shown.step("verify")
    out = capsys.readouterr().out
    assert "calibrate" in out and "verify" in out and out.count("100%") == 2


@pytest.mark.parametrize("missing", ["IPython", "ipywidgets", ""])
def test_bars_need_a_notebook_with_widgets(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("IPython", "ipywidgets"):
        found = types.ModuleType(name)
        found.__spec__ = None if name == missing else ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, found)
    monkeypatch.setattr(progress, "find_spec", lambda name: sys.modules[name].__spec__)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert progress.draws_bars() is (not missing)


def test_texts_and_pairs_in_every_function(tmp_path: Path) -> None:
    from tests.compiler.model_folder.written_folder import write_folder

    folder = write_folder(tmp_path / "f")
    model, texts = folder / "model.onnx", ["a b c", "d e", "f g h a"] * 8
    options = CompileOptions(tokenizer=folder, bench=False)
    result = qcompile.compile(model, texts, options=options)
    assert result.report.calibration is not None and result.report.calibration.general_text
    pairs = [("a b", "c")] * 4
    assert qcompile.verify(model, result.model, pairs, tokenizer=folder).samples == 4
    timing = TimingOptions(rounds=1, seconds=0.001, min_runs=1)
    timed = qcompile.bench([model], data=texts, tokenizer=folder, options=timing)
    assert timed.shapes["input_ids"][0] == 8
    found = qcompile.sensitivity(model, texts, by="layer", measure="alone", options=options)
    assert found.rows
    with pytest.raises(qcompile.DataError, match=r"^data, row 24: found int, expected a text"):
        qcompile.compile(model, [*texts, 5], options=options)
