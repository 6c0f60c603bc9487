"""``sensitivity``, its policies, and the search of ``compile``, from the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection
from pathlib import Path

import pytest
import yaml
from click.testing import Result

from qcompile.compiler.search.sensitivity import Meter, Score
from tests.command_line import assert_one_line, run

PLAIN = "--recipe", "per-tensor", "--threads", "1"


def sensitivity(model: Path, data: Path, *more: object) -> Result:
    return run("sensitivity", model, "--data", data, "--target", "qdq", *PLAIN, *more)


def compile_(model: Path, data: Path, *more: object) -> Result:
    out = model.with_name("out.onnx")
    given = ("compile", model, "-o", out, "--data", data, "--no-bench", "--threads", "1")
    return run(*given, *more)


# ---- sensitivity


def test_the_table_and_the_policy(model: Path, data: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    result = sensitivity(model, data, "-o", policy, "--lift", 3, "--top", 5)
    assert result.exit_code == 0, result.output
    assert "ffn-in" in result.stdout and "more: --top shows them" in result.stdout
    assert "which raises 3" in result.stdout and "next:" in result.stdout
    found = yaml.safe_load(policy.read_text())
    assert len(found["precision"]) == 3 and found["transforms"] == "none"
    done = compile_(model, data, "--recipe", policy, "--min-cosine", 0.5, "--min-worst-cosine", 0.5)
    assert done.exit_code == 0, done.output
    report = json.loads(model.with_name("out.report.json").read_text())
    wide = {r["tensor"] for r in report["ledger"] if r["dtype"] == "uint16" and not r["bytes"]}
    assert wide == set(found["precision"])


def test_a_policy_passes_the_gates_that_it_was_made_for(
    model: Path, data: Path, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.yaml"
    assert compile_(model, data, *PLAIN, "--target", "qdq").exit_code == 1
    assert sensitivity(model, data, "-o", policy, "-q").stdout == ""
    assert compile_(model, data, "--recipe", policy).exit_code == 0


def test_json_and_measure(model: Path, data: Path) -> None:
    result = sensitivity(model, data, "--json", "--measure", "alone", "--by", "role")
    found = json.loads(result.stdout)
    assert found["by"] == "role" and found["policy"] is None
    errors = [row["alone"]["error"] for row in found["rows"]]
    assert errors == sorted(errors, reverse=True)
    assert all(row["lifted"] is None for row in found["rows"])


def test_bad_use_of_sensitivity(model: Path, data: Path, tmp_path: Path) -> None:
    assert_one_line(sensitivity(model, data, "-o", tmp_path / "p.json"), 2, ".yaml")
    assert_one_line(sensitivity(model, data, "-o", tmp_path / "no" / "p.yaml"), 2, "no")
    assert_one_line(sensitivity(model, data, "--target", "cpu", "--by", "kind"), 2, "--by kind")
    assert_one_line(sensitivity(model, tmp_path / "none.npz"), 2, "does not exist")
    assert_one_line(run("sensitivity", model), 2, "--data")
    same = tmp_path / "m.yaml"
    model.rename(same)
    assert_one_line(sensitivity(same, data, "-o", same), 2, "input model itself")


def test_no_policy_for_gates_out_of_reach(model: Path, data: Path, tmp_path: Path) -> None:
    policy = tmp_path / "p.yaml"
    result = sensitivity(model, data, "-o", policy, "--max-abs", -1)
    assert_one_line(result, 1, "no policy passes the gates", "--max-abs")
    assert not policy.exists()


# ---- compile with a gate


def searched(model: Path, data: Path, *more: object) -> Result:
    return compile_(model, data, *PLAIN, "--target", "qdq", "--min-cosine", 0.995, *more)


def test_a_gate_that_is_given_starts_a_search(model: Path, data: Path, tmp_path: Path) -> None:
    result = searched(model, data)
    assert result.exit_code == 0, result.output
    assert "by the search" in result.stdout
    report = json.loads(model.with_name("out.report.json").read_text())
    assert report["search"]["lifted"] and report["passed"]
    assert not list(tmp_path.glob("*.search.json"))


def test_without_time_or_with_default_gates_there_is_none(model: Path, data: Path) -> None:
    assert_one_line(searched(model, data, "--search-time", 0), 1, "below 0.995 (--min-cosine)")
    by_default = compile_(model, data, *PLAIN, "--target", "qdq")
    assert_one_line(by_default, 1, "below 0.98 (--min-cosine)")
    assert "by the search" not in by_default.output
    assert "given as an option, the gate starts a search" in by_default.output


def test_an_unreachable_gate_says_what_was_reached(model: Path, data: Path) -> None:
    result = searched(model, data, "--max-abs", "-1")
    assert_one_line(result, 1, "the search reached this with", "--max-abs")
    assert not model.with_name("out.onnx").exists()


def test_an_interrupt_keeps_what_was_measured(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = Meter.__call__, list[int]()

    def interrupted(self: Meter, on: Collection[int], samples: int = 0) -> Score:
        seen.append(len(on))
        if len(seen) == 10:
            raise KeyboardInterrupt
        return original(self, on, samples)

    monkeypatch.setattr(Meter, "__call__", interrupted)
    result = searched(model, data)
    assert result.exit_code == 130 and "measurements are kept in out.search.json" in result.stderr
    state = model.with_name("out.search.json")
    assert state.exists() and not model.with_name("out.onnx").exists()
    assert searched(model, data).exit_code == 0
    assert not state.exists()


def test_a_metric(model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_metric.py").write_text(
        "def smallest(feeds, outputs):\n"
        "    return min(float(batch['out'].min()) for batch in outputs)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("own_metric", None)
    open_gates = ("--min-cosine", 0, "--min-worst-cosine", -1, "--target", "qdq", *PLAIN)
    metric = ("--metric", "own_metric:smallest", *open_gates)
    done = compile_(model, data, *metric, "--min-metric", -100, "--json")
    assert json.loads(done.stdout)["verify"]["metric"]["compiled"] < 0
    assert "metric" in compile_(model, data, *metric).stdout
    failed = compile_(model, data, *metric, "--min-metric", 100)
    assert_one_line(failed, 1, "metric", "is below 100 (--min-metric)")
    assert_one_line(compile_(model, data, "--min-metric", 1), 2, "--min-metric needs a --metric")
    assert_one_line(compile_(model, data, "--metric", "nowhere:f"), 2, "metric 'nowhere:f'")


def test_the_state_may_not_be_another_file(model: Path, data: Path) -> None:
    report = model.with_name("out.search.json")
    assert_one_line(searched(model, data, "--report", report), 2, "search state", "report")


# ---- bits


def test_bits_of_weights_are_measured(model: Path, data: Path, tmp_path: Path) -> None:
    page = tmp_path / "p.html"
    given = ("--target", "cpu", "--measure", "alone")
    run_with = ("sensitivity", model, "--data", data, "--threads", 1, *given, "--bits", "4,2")
    found = json.loads(run(*run_with, "--json", "--report", page).stdout)["widths"]
    assert {row["item"] for row in found} >= {"wf0", "wh1"}
    for row in found:
        assert [drop["bits"] for drop in row["measured"]] == [8, 4, 2]
    errors = [row["measured"][-1]["error"] for row in found]
    assert errors == sorted(errors, reverse=True) and errors[-1] > found[-1]["measured"][0]["error"]
    assert "2 bits: error" in page.read_text()
    assert "weights alone, by bits" in run(*run_with).stdout


@pytest.mark.parametrize("bits", ["9", "1", "4,x", "", "4;3"])
def test_what_are_no_bits(model: Path, data: Path, bits: str) -> None:
    assert_one_line(sensitivity(model, data, "--bits", bits), 2, "not a list of bit widths")


@pytest.mark.parametrize("size", ["0%", "120%", "big", "-3MB", "18%%", "0"])
def test_what_is_no_limit_of_size(model: Path, data: Path, size: str) -> None:
    assert_one_line(compile_(model, data, "--max-size", size), 2, "--max-size", "16MB")


def test_an_impossible_size(model: Path, data: Path) -> None:
    result = compile_(model, data, "--max-size", "3%", "--min-cosine", 0.5)
    assert_one_line(result, 1, "over", "(--max-size 3%)")
    assert not model.with_name("out.onnx").exists()
