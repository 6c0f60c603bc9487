"""--report in both forms, and reports that become pages later."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from qcompile.commands.cli import main
from tests.command_line import assert_one_line, compile_args, run
from tests.compiler.report.html.reports import compiled


@pytest.fixture
def report(tmp_path: Path) -> Path:
    path = tmp_path / "x.report.json"
    path.write_text(json.dumps(compiled()))
    return path


def test_a_page_comes_beside_the_json(model: Path, data: Path) -> None:
    page = model.with_name("x.html")
    result = run(*compile_args(model, data, "--report", page))
    assert result.exit_code == 0, result.output
    assert "<h1>m.onnx</h1>" in page.read_text() and str(page) in result.stdout
    found = json.loads(model.with_name("out.report.json").read_text())
    assert found["bench"] is None and found["profile"] == []  # --no-bench times nothing


def test_both_forms_may_be_named(model: Path, data: Path) -> None:
    page, plain = model.with_name("x.html"), model.with_name("x.json")
    result = run(*compile_args(model, data, "--report", plain, "--report", page))
    assert result.exit_code == 0, result.output
    assert page.exists() and plain.exists()
    assert not model.with_name("out.report.json").exists()


def test_a_profile_is_taken_for_the_page_alone(model: Path, data: Path) -> None:
    args = [a for a in compile_args(model, data, "--max-latency-ratio", 1000) if a != "--no-bench"]
    assert run(*args, "--report", model.with_name("x.html")).exit_code == 0
    found = json.loads(model.with_name("out.report.json").read_text())
    assert [p["model"] for p in found["profile"]] == ["float", "compiled"]
    assert run(*args).exit_code == 0
    assert json.loads(model.with_name("out.report.json").read_text())["profile"] == []


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["x.pdf"], ("x.pdf", ".json or .html")),
        (["a.html", "b.html"], ("b.html", "a.html", "same format")),
        (["m.onnx"], ("m.onnx", ".json or .html")),
        (["no/x.html"], ("no", "does not exist")),
    ],
)
def test_bad_reports_are_told_before_any_work(
    model: Path,
    data: Path,
    names: list[str],
    words: tuple[str, ...],
) -> None:
    given = [x for name in names for x in ("--report", model.parent / name)]
    assert_one_line(run(*compile_args(model, data, *given)), 2, *words)
    assert not model.with_name("out.onnx").exists()


def test_a_failed_gate_writes_no_page(model: Path, data: Path) -> None:
    page = model.with_name("x.html")
    result = run(*compile_args(model, data, "--min-cosine", "1.0", "--report", page))
    assert result.exit_code == 1 and not page.exists()


def test_a_report_becomes_a_page_beside_it(report: Path) -> None:
    result = run("report", report)
    assert result.exit_code == 0, result.output
    assert report.with_suffix(".html").read_text().startswith("<!DOCTYPE html>")
    assert "x.report.html" in result.stdout


def test_a_ranking_has_a_page(model: Path, data: Path) -> None:
    page, plain = model.with_name("s.html"), model.with_name("s.json")
    given = ("--data", data, "--measure", "alone", "--report", page, "--report", plain)
    result = run("sensitivity", model, *given)
    assert result.exit_code == 0, result.output
    assert "qcompile sensitivity</title>" in page.read_text() and str(page) in result.stdout
    again = model.with_name("again.html")
    assert run("report", plain, "-o", again).exit_code == 0
    assert again.read_text() == page.read_text()
    assert_one_line(run("sensitivity", model, *given[:2], "--report", "x.csv"), 2, "x.csv", ".html")


def test_a_report_comes_through_a_pipe(report: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.html"
    args = ["report", "-", "-o", str(out), "-q"]
    done = CliRunner().invoke(main, args, input=report.read_text())
    assert (done.exit_code, done.stdout) == (0, "") and out.exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("channels", 5),
        ("bench", {}),
        ("ledger", None),
        ("passes", "x"),
        ("gates", []),
        ("bench", 0),
    ],
)
def test_a_damaged_report_is_one_line(key: str, value: object, report: Path) -> None:
    report.write_text(json.dumps({**compiled(), key: value}))
    assert_one_line(run("report", report), 2, "is not a report")


def test_a_report_with_impossible_figures_is_one_line(report: Path) -> None:
    found = compiled()
    found["bench"]["models"][1]["ratio"] = 0
    report.write_text(json.dumps(found))
    assert_one_line(run("report", report), 2, "is not a report", "ZeroDivisionError")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", ("is not JSON",)),
        (b"\xff\xfe", ("is not JSON",)),
        (b"[]", ("is not a report", "qcompile compile")),
        (b'{"ledger": [{}]}', ("is not a report",)),
        (b"[" * 200_000, ("is not JSON",)),
    ],
)
def test_what_is_no_report_is_one_line(
    content: bytes, words: tuple[str, ...], report: Path
) -> None:
    report.write_bytes(content)
    assert_one_line(run("report", report), 2, *words)
    assert not report.with_suffix(".html").exists()


def test_other_mistakes_are_one_line(report: Path, tmp_path: Path) -> None:
    assert_one_line(run("report", tmp_path / "no.json"), 2, "no.json", "cannot be read")
    assert_one_line(run("report", report, "-o", tmp_path / "x.txt"), 2, "x.txt", ".html")
    assert_one_line(run("report", "-"), 2, "-o is needed")
    assert_one_line(run("report", report, "-o", tmp_path / "no" / "x.html"), 2, "does not exist")
