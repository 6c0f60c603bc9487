"""benchmarks/low_bits.py: its rows, which of them are run, and its table. No compiler runs here."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from benchmarks import _low_bits_rows as rows
from benchmarks import _session_cost, accuracy, low_bits
from benchmarks._accuracy_rows import Row
from benchmarks._accuracy_run import Figures
from qcompile.rewriting.registry import target
from qcompile.rewriting.testing import model_proto
from qcompile.runtime.session import SessionOptions

SESSION = _session_cost.SessionCost(31.4, 41_000_000)
LATENCY = low_bits.Latency(1.012, 0.988, 1.031)
LINE = accuracy.Line(
    "stored", "A row", "-", Figures(86.694, 0.993412, 0.976649, 23_500_000), accuracy.Cost(6.28, 9)
)
ADD = "g (float[n,4] x) => (float[n,4] y) { y = Add(x, x) }"


# ---- rows


def test_names_of_rows_and_peers_differ() -> None:
    names = [*(row.name for row in rows.ROWS), *(peer.name for peer in rows.PEERS)]
    assert len(names) == len(set(names))


def test_no_two_rows_have_the_same_settings() -> None:
    settings = [json.dumps(row.settings, sort_keys=True) for row in rows.ROWS]
    assert len(settings) == len(set(settings))


def test_bits_that_are_not_asked_for_are_left_to_the_target() -> None:
    assert rows.few_bits("cpu", 8, 8, 0).settings == {"target": "cpu"}
    assert rows.few_bits("cpu", 4, 8, 32).settings == {
        "target": "cpu",
        "weight_bits": 4,
        "weight_block": 32,
    }
    row = rows.few_bits("qdq", 8, 2, 0, mode="weight-only")
    assert row.settings == {"target": "qdq", "mode": "weight-only", "embedding_bits": 2}
    assert (row.group, row.name) == ("qdq", "qdq W8A32 E2")
    assert rows.few_bits("cpu", 4, 4, 0).name == "cpu W4A8 E4, channel"


def test_rounding_is_replaced_and_everything_else_kept() -> None:
    row = Row("stored", "x", {"target": "cpu", "weight_bits": 4})
    own, nearest, other = (
        [*target("cpu").transform["static"]],
        rows.with_rounding(row, None).settings,
        rows.with_rounding(row, "adaround").settings,
    )
    left = [item for item in own if not item.startswith("round-weights")]
    assert nearest["transforms"] == ",".join(left) and len(left) == len(own) - 1
    assert "round-weights{method=adaround}" in other["transforms"]
    assert other["attention"] == target("cpu").attention  # else it would become float
    assert other["weight_bits"] == 4 and "transforms" not in row.settings


def test_biases_are_corrected_after_rounding() -> None:
    found = rows.with_bias_correction(Row("stored", "x", {"target": "cpu"})).settings
    own = [item.partition("{")[0] for item in target("cpu").transform["static"]]
    at = own.index(rows.ROUNDING) + 1
    names = [item.partition("{")[0] for item in found["transforms"].split(",")]
    assert names == [*own[:at], "correct-bias", *own[at:]]
    assert found["attention"] == target("cpu").attention


def test_options_of_rounding_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    goal = SimpleNamespace(transform={"static": ("round-weights{damping=2}",)}, attention="")
    monkeypatch.setattr(rows, "target", lambda name: goal)
    found = rows.with_rounding(Row("stored", "x", {"target": "cpu"}), "adaround")
    assert found.settings["transforms"] == "round-weights{damping=2,method=adaround}"


def test_rows_are_chosen_by_glob(capsys: pytest.CaptureFixture[str]) -> None:
    assert low_bits.chosen([]) == [*(r.name for r in rows.ROWS), *(p.name for p in rows.PEERS)]
    found = low_bits.chosen(["cpu W4A8*", "*HQQ*"])
    assert "onnxruntime HQQ W4, block 32" in found and "qdq W8A8 E8" not in found
    with pytest.raises(SystemExit):
        low_bits.chosen(["cpu W4*", "cpu W9*"])
    assert "'cpu W9*' matches no row" in capsys.readouterr().err


def test_the_8_bit_file_comes_first_and_once() -> None:
    bench: Any = SimpleNamespace(source="s")
    names = ["token table alone, E8", rows.REFERENCE.name, "qdq W8A8 E8", rows.PEERS[-1].name]
    found = [candidate.name for candidate in low_bits.candidates(bench, names)]
    assert found == [
        rows.REFERENCE.name,
        "qdq W8A8 E8",
        "token table alone, E8",
        rows.PEERS[-1].name,
    ]
    alone = [candidate.name for candidate in low_bits.candidates(bench, names[:1])]
    assert alone == [rows.REFERENCE.name, "token table alone, E8"]


def test_a_peer_that_is_not_installed_says_so() -> None:
    peer = replace(rows.PEERS[0], module="no_such_tool")
    bench: Any = SimpleNamespace(source="s")
    assert accuracy.peer_candidate(bench, peer).obstacle == "not installed: no_such_tool"


# ---- table


def test_every_kind_of_row_has_a_cell_for_each_column() -> None:
    session = low_bits.Timing((), SESSION)
    entries = [
        low_bits.Entry(LINE),
        low_bits.Entry(LINE, session),
        low_bits.Entry(LINE, low_bits.Timing((LATENCY, LATENCY), SESSION)),
        low_bits.Entry(replace(LINE, figures=None, failure="not installed: a|b")),
    ]
    found = [low_bits.cells(e, 94_000_000) for e in entries]
    assert {len(row) for row in found} == {len(low_bits.HEADS)}
    closeness = ["A row", "23.50", "25.0%", "0.99341", "0.97665", "86.69"]
    ratio = "1.01 (0.99 to 1.03)"
    assert found[0] == [*closeness, "-", "-", "-", "-", "9.0"]
    assert found[1] == [*closeness, "1", "1", "31", "41", "9.0"]
    assert found[2] == [*closeness, ratio, ratio, "31", "41", "9.0"]
    assert found[3][:3] == ["A row", "not installed: a/b", ""]


def test_a_long_reason_is_cut() -> None:
    line = replace(LINE, figures=None, failure="word " * 100)
    assert len(low_bits.cells(low_bits.Entry(line), 1)[1]) <= 120


def test_memory_that_the_system_does_not_say_is_a_dash() -> None:
    timing = low_bits.Timing((), replace(SESSION, memory=None))
    assert low_bits.cells(low_bits.Entry(LINE, timing), 1)[-2] == "-"


def test_a_model_that_cannot_be_timed_keeps_its_other_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock: Any = SimpleNamespace(reference=tmp_path / "8.onnx", timing=None)  # not callable
    missing = low_bits.timed(LINE, tmp_path / "a.onnx", tmp_path / "a.onnx", clock)
    assert missing == low_bits.Entry(LINE)  # nothing to compare with
    clock.reference.touch()
    assert low_bits.timed(LINE, tmp_path / "a.onnx", tmp_path / "a.onnx", clock).timing is None
    assert "A row: not timed" in capsys.readouterr().err


# ---- timing


def clock(folder: Path, reference: Path) -> low_bits.Clock:
    """Times graphs that have an input x, instead of sentences."""
    bench: Any = SimpleNamespace(key="k", threads=1)
    made = low_bits.Clock(bench, reference, rounds=4)
    made.__dict__["feeds"] = [{"x": np.ones((n, 4), np.float32)} for n in (1, 2)]
    return made


def test_a_model_is_timed_once_and_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratio = SimpleNamespace(median=1.5, low=1.25, high=2.0)
    calls: list[str] = []

    def compared(models: Any, feed: Any, options: Any) -> Any:
        calls.append(models[1][1].name)
        assert models[0][1] == tmp_path / "8.onnx" and options.rounds == 4
        return SimpleNamespace(ratio=lambda number: ratio)

    monkeypatch.setattr(low_bits, "compare_latency", compared)
    monkeypatch.setattr(low_bits, "session_cost", lambda model, feed, threads: SESSION)
    made = clock(tmp_path, tmp_path / "8.onnx")
    first = made.timing(tmp_path / "a.onnx", tmp_path / "a.onnx")
    assert made.timing(tmp_path / "a.onnx", tmp_path / "a.onnx") == first
    assert calls == ["a.onnx", "a.onnx"] and first.latencies[0].high == 2.0
    assert low_bits.timing_from(json.loads(json.dumps(asdict(first)))) == first
    own = made.timing(tmp_path / "8.onnx", tmp_path / "8.onnx")
    assert own.latencies == () and len(calls) == 2


def test_loading_is_timed_and_memory_read(tmp_path: Path) -> None:
    onnx.save(model_proto(ADD, 17), tmp_path / "a.onnx")
    np.savez(tmp_path / "feed.npz", x=np.ones((1, 4), np.float32), unused=np.zeros(1))
    found = _session_cost.measured(tmp_path / "a.onnx", tmp_path / "feed.npz", SessionOptions(1))
    assert found.load_ms > 0


def test_a_process_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(returncode=1, stderr="Traceback\nModelError: no such file\n")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(RuntimeError, match=r"^ModelError: no such file$"):
        _session_cost.session_cost(tmp_path / "a.onnx", tmp_path / "feed.npz", 1)


# ---- the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "MODEL is missing"),
        (["m.onnx", "--data", "d"], "--eval is missing"),
        (["m.onnx", "--data", "d", "--eval", "e", "--tokenizer", "t", "--rounds", "2"], "--rounds"),
        (["m.onnx", "--data", "d", "--eval", "e", "--tokenizer", "t"], "m.onnx is not a file"),
    ],
)
def test_what_is_missing_is_said(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["low_bits", *arguments])
    with pytest.raises(SystemExit):
        low_bits.arguments()
    assert message in capsys.readouterr().err


def test_names_are_listed_without_a_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["low_bits", "--list", "--match", "token table*"])
    low_bits.main()
    assert capsys.readouterr().out.splitlines()[0] == "token table alone, E8"
