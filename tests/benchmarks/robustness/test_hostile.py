"""Files that mean harm, through the command line, judged by hostile.py in separate processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.robustness import _isolated_process as forked
from benchmarks.robustness import hostile
from tests.command_line import run_module

# Cases in which nothing is wrong with the file but its size or its names.
HARMLESS = {
    "axis_2_60", "chain_of_2_000_nodes", "input_negative", "names_that_steer_a_terminal",
    "recipe_seed_2_100", "text_is_null_bytes",
    "tokenizer_config_nested_deep", "tokenizer_truncates_absurdly",
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What became of every case under ``compile``."""
    file = tmp_path_factory.mktemp("hostile") / "rows.json"
    run_module("benchmarks.robustness.hostile", "--command", "compile", "--json", file)
    found: list[dict[str, Any]] = json.loads(file.read_text())
    return found


def test_every_case_ends_well(rows: list[dict[str, Any]]) -> None:
    assert len(rows) >= 100
    assert [(r["name"], r["fault"]) for r in rows if r["fault"]] == []


def test_what_is_wrong_is_refused(rows: list[dict[str, Any]]) -> None:
    assert {r["name"] for r in rows if r["code"] == 0} == HARMLESS
    assert all(r["said"].startswith("error: ") for r in rows if r["code"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("external_outside", "outside the model's folder"),
        ("external_symlinked_folder", "outside the model's folder"),
        ("constant_of_shape_2_60", "takes 4611686018427387904 bytes"),
        ("range_2_40", "'big' of shape [1099511627776]"),
        ("doubled_by_concat_40_times", "over 1073741824"),
        ("cycle_through_a_body", "cycle"),
        ("functions_call_each_other", "calls itself, directly or through others"),
        ("functions_multiply", "10000000000 nodes"),
        ("ten_million_empty_nodes", "no model needs so many"),
        ("npz_bomb", "one feed of it takes 4294967296 bytes"),
        ("npz_pickle", "pickled objects, which are never loaded"),
        ("jsonl_line_of_100_mb", "line 1: over 1048576 characters"),
        ("tokenizer_post_processor_lies", "cannot tokenize the text"),
        ("recipe_alias_bomb", "alias in line 2"),
    ],
)
def test_the_line_says_what_is_wrong(rows: list[dict[str, Any]], name: str, words: str) -> None:
    (row,) = (r for r in rows if r["name"] == name)
    assert words in row["said"]


def outcome(folder: Path, code: str, seconds: float = 5) -> Any:
    return forked.run(lambda: exec(code), seconds, 4 << 30, folder / "log")


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("import os; os.kill(os.getpid(), 9)", "signal 9"),
        ("while True: pass", "hung"),
        ("raise ValueError('x')", "exit code 99; traceback"),
        ("print('error: a\\nerror: b'); raise SystemExit(2)", "not one line of error"),
        ("print('error: \\x1b[31m'); raise SystemExit(2)", "controls the terminal"),
        ("print('error: internal error'); raise SystemExit(2)", "internal error"),
        ("x = b'1' * 900_000_000", "MB"),
        ("open('side-effect', 'w').close()", "touched"),
        ("print('error: fine'); raise SystemExit(2)", ""),
    ],
)
def test_the_judge_sees_a_fault(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    fault: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    end = outcome(tmp_path, code, 1 if fault == "hung" else 5)
    said = hostile.judge(end, tmp_path / "out.onnx", {})
    assert fault in said if fault else said == ""


def test_memory_has_a_limit(tmp_path: Path) -> None:
    end = outcome(tmp_path, "x = bytearray(8 << 30)")
    assert (end.code, "MemoryError" in end.output) == (99, True)
