"""battery.py tells good from bad: each verdict is reached by a model that earns it."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.robustness import _battery_case as case
from benchmarks.robustness import battery
from qcompile.commands import cli
from qcompile.ir.model_io.to_proto import serialize
from qcompile.rewriting.testing import normal, parse


def write(path: Path, text: str, size: int = 8) -> Path:
    """A model with an 8 x 8 weight."""
    graph = parse(f"g (float[B,8] x) => (float[B,N] y) {{ {text} }}", w=normal(8, size))
    path.write_bytes(serialize(graph))
    return path


@pytest.fixture
def linear(tmp_path: Path) -> Path:
    return write(tmp_path / "linear.onnx", "y = MatMul(x, w)")


def test_good_ones(linear: Path, tmp_path: Path) -> None:
    limits = case.Limits()
    found = case.outcome(linear, "static", limits)
    assert (found.verdict, found.runs, found.file) == ("ok", True, "linear.onnx")
    plain = write(tmp_path / "plain.onnx", "y = Relu(x)")
    found = case.outcome(plain, "dynamic", limits)
    assert (found.verdict, found.runs) == ("unchanged", True)
    assert "no rule that fits" in found.detail


def test_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    found = case.outcome(broken, "dynamic", case.Limits())
    assert (found.verdict, found.runs) == ("refused", False)
    assert "is not a readable ONNX model" in found.detail


def test_below_the_gate(linear: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.runtime.evaluation.closeness.Closeness.mean_cosine", 0.5)
    monkeypatch.setattr("qcompile.compiler.stages.verify._repeats", lambda *_: True)
    found = case.outcome(linear, "static", case.Limits())
    assert (found.verdict, found.detail[:26]) == ("gate", "output 'y': mean cosine 0.")


def answers(model: Path) -> Callable[..., None]:
    """A compiler that writes this model whatever it is given, and says that all is well."""

    def main(arguments: list[str]) -> None:
        out = Path(arguments[arguments.index("-o") + 1])
        out.write_bytes(model.read_bytes())
        out.with_name("out.report.json").write_text('{"notes": []}')
        raise SystemExit(0)

    return main


def fails(code: int, said: str, written: bool) -> Callable[..., None]:
    def main(arguments: list[str]) -> None:
        print(said, file=sys.stderr, flush=True)
        if written:
            Path(arguments[arguments.index("-o") + 1]).write_bytes(b"half")
        raise SystemExit(code)

    return main


PLAIN = "y = Identity(x)"


@pytest.mark.parametrize(
    ("original", "written", "verdict", "detail"),
    [
        (PLAIN, "y = Neg(x)", "wrong", "on fresh inputs at x [12, 8]: output 'y': mean cosine -"),
        (
            PLAIN,
            "y = MatMul(x, w)",
            "wrong",
            "output 'y' is float32[12, 6], expected float32[12, 8]",
        ),
        (PLAIN, "s = Constant<value_ints=[12, 8]>() y = Reshape(x, s)", "broken", "at x [29, 8]: "),
        (
            "y = Add(x, x)",
            "n = Size(x) k = Constant<value_int=96>() f = Equal(n, k) h = Neg(x) "
            "y2 = Add(x, x) y = Where(f, y2, h)",
            "wrong",
            "on fresh inputs at x [29, 8]: output 'y': mean cosine -",
        ),
    ],
    ids=["values", "shape", "fails at another size", "wrong at another size"],
)
def test_wrong_answers(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    original: str,
    written: str,
    verdict: str,
    detail: str,
) -> None:
    """A compiled model that does not do what the float model does, at the data's size or others."""
    planted = write(tmp_path / "planted.onnx", written, size=6)
    monkeypatch.setattr(cli, "main", answers(planted))
    found = case.outcome(write(tmp_path / "float.onnx", original), "static", case.Limits())
    assert found.verdict == verdict
    assert detail in found.detail


@pytest.mark.parametrize(("form", "given"), [("dynamic", True), ("dynamic-no-data", False)])
def test_data_are_given_only_where_the_form_has_some(
    linear: Path, monkeypatch: pytest.MonkeyPatch, form: str, given: bool
) -> None:
    def main(arguments: list[str]) -> None:
        print(f"error: data {'--data' in arguments}", file=sys.stderr, flush=True)
        raise SystemExit(2)

    monkeypatch.setattr(cli, "main", main)
    found = case.outcome(linear, form, case.Limits())
    assert (found.verdict, found.detail) == ("refused", f"data {given}")


@pytest.mark.parametrize(
    ("main", "verdict", "detail"),
    [
        (fails(2, "error: no", True), "wrong", "exit code 2, but a file was written"),
        (fails(2, "", False), "wrong", "exit code 2 with 0 lines of error"),
        (fails(2, "Traceback\nKeyError", False), "crashed", "KeyError"),
        (fails(2, "error: internal error, KeyError", False), "crashed", "internal error, KeyError"),
        (lambda arguments: os.kill(os.getpid(), 9), "crashed", "ended with code -9"),
        (lambda arguments: os.kill(os.getpid(), signal.SIGXCPU), "hung", "over 0.05 s"),
        (lambda arguments: time.sleep(60), "hung", "over 0.05 s"),
    ],
    ids=["half", "silent", "traceback", "internal", "killed", "busy", "hung"],
)
def test_faults(
    linear: Path,
    monkeypatch: pytest.MonkeyPatch,
    main: Callable[..., None],
    verdict: str,
    detail: str,
) -> None:
    monkeypatch.setattr(cli, "main", main)
    limits = case.Limits(seconds=0.05 if verdict == "hung" else 60)
    found = case.outcome(linear, "dynamic", limits)
    assert (found.verdict, found.detail) == (verdict, detail)


def test_memory_is_limited(linear: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "main", lambda arguments: np.ones(1 << 40))
    found = case.outcome(linear, "dynamic", case.Limits(memory=16 << 30))
    assert (found.verdict, found.detail) == ("crashed", "ended with code 1")


# The script ----------------------------------------------------------------------------------


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["battery.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        battery.main()
    return int(ended.value.code or 0)


def test_the_table_counts_what_the_index_says_runs(
    linear: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = linear.parent
    (folder / "broken.onnx").write_bytes(b"no model")
    rows = [{"file": "linear.onnx", "runs": True}, {"file": "broken.onnx", "runs": False}]
    (folder / "index.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    kept = folder / "found.json"
    assert run([str(folder), "--form", "dynamic", "--json", str(kept)], monkeypatch) == 0
    said = capsys.readouterr().out
    assert "100.0%" in said
    assert "files that do not run there, in all forms: 1 refused" in said
    assert [o["verdict"] for o in json.loads(kept.read_text())] == ["ok", "refused"]


def test_a_fault_is_named_and_is_the_exit_code(
    linear: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "main", fails(2, "Traceback\nKeyError", False))
    assert run([str(linear.parent), "--form", "dynamic"], monkeypatch) == 1
    assert "crashed dynamic linear.onnx: KeyError" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}", "--form", "int4"], "unknown form 'int4', expected of: static, dynamic"),
        (["{}", "--part", "5/4"], "--part '5/4', expected NUMBER/COUNT"),
        (["{}", "--match", "*.pt"], "matches '*.pt'"),
        (["{}/nowhere"], "is no folder"),
    ],
)
def test_wrong_usage_is_one_line(
    linear: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    folder = str(linear.parent)
    assert run([a.replace("{}", folder) for a in arguments], monkeypatch) == 2
    assert message in capsys.readouterr().err


def test_an_index_that_is_none(
    linear: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (linear.parent / "index.jsonl").write_text('{"path": "linear.onnx"}')
    assert run([str(linear.parent)], monkeypatch) == 2
    assert "is no index, expected lines with file and runs" in capsys.readouterr().err
