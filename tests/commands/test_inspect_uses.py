"""inspect, diff and the page: what is computed and held otherwise than it is stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from qcompile.compiler.report.html import page
from qcompile.rewriting.testing import model_proto, normal
from tests.command_line import run

WIDTH = 128
HEADS = ("computed in", "bytes in memory")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in three forms: 8 bits, 4 bits that become 8, and 4 bits that stay 4."""
    made = tmp_path_factory.mktemp("uses")
    text = f"g (float[B,{WIDTH}] x) => (float[B,{WIDTH}] y) {{ y = MatMul(x, w) }}"
    onnx.save(model_proto(text, 21, w=normal(WIDTH, WIDTH)), made / "m.onnx")
    for name, mode, bits in (
        ("w8", "dynamic", 8),
        ("w4", "dynamic", 4),
        ("nbits", "weight-only", 4),
    ):
        done = run(
            "compile", made / "m.onnx", "-o", made / f"{name}.onnx", "--mode", mode,
            "--weight-bits", bits, "--no-bench", "--no-verify",
        )  # fmt: skip
        assert done.exit_code == 0, done.output
    return made


def alone(model: Path, folder: Path) -> Path:
    """A copy without a report."""
    copy = folder / model.name
    copy.write_bytes(model.read_bytes())
    return copy


def weight(model: Path) -> dict[str, Any]:
    found = json.loads(run("inspect", model, "--json").stdout)
    assert sum(row["bytes"] for row in found["ledger"]) == model.stat().st_size
    row: dict[str, Any] = next(r for r in found["ledger"] if r["kind"] == "weight")
    return row


@pytest.mark.parametrize(
    ("name", "dtype", "held", "size"),
    [("w8", "int8", "int8", 1), ("w4", "int4", "int8", 1), ("nbits", "int4", "int4", 0.5)],
)
def test_with_and_without_a_report(
    folder: Path, tmp_path: Path, name: str, dtype: str, held: str, size: float
) -> None:
    for model in (folder / f"{name}.onnx", alone(folder / f"{name}.onnx", tmp_path)):
        row = weight(model)
        assert (row["dtype"], row["computed"], row["memory_dtype"]) == (dtype, "int8", held)
        assert row["memory"] == WIDTH * WIDTH * size and row["shape"] == [WIDTH, WIDTH]


def test_an_old_report_gets_the_values_of_the_file(folder: Path, tmp_path: Path) -> None:
    model = alone(folder / "w4.onnx", tmp_path)
    report = json.loads((folder / "w4.report.json").read_text())
    for row in report["ledger"]:
        for key in ("computed", "looked_up", "memory_dtype", "memory"):
            del row[key]
    (tmp_path / "w4.report.json").write_text(json.dumps(report))
    assert weight(model)["memory"] == WIDTH * WIDTH
    assert "w/int8" in page(report) and "in memory once" not in page(report)


@pytest.mark.parametrize("every", [(), ("--all",)])
def test_columns_are_there_only_where_something_differs(
    folder: Path, every: tuple[str, ...]
) -> None:
    differs = run("inspect", folder / "w4.onnx", *every).stdout
    same = run("inspect", folder / "w8.onnx", *every).stdout
    assert all(head in " ".join(differs.split()) for head in HEADS)
    assert not any(head in " ".join(same.split()) for head in HEADS)


def test_diff_shows_what_one_type_becomes_in_two_forms(folder: Path, tmp_path: Path) -> None:
    """With a report of one, both or none."""
    a, b = folder / "w4.onnx", folder / "nbits.onnx"
    for second in (b, alone(b, tmp_path)):
        tensors = json.loads(run("diff", a, second, "--json").stdout)["tensors"]
        found = next(t for t in tensors if t["tensor"] == "w")
        assert found["change"] == "computed"
        assert (found["a"]["memory_dtype"], found["b"]["memory_dtype"]) == ("int8", "int4")
        text = run("diff", a, second).stdout
        assert "int4, computed in int8, int8 in memory" in " ".join(text.split())
    copy = alone(a, tmp_path)
    copy.rename(tmp_path / "other.onnx")
    assert json.loads(run("diff", a, tmp_path / "other.onnx", "--json").stdout)["equal"]
    changed = json.loads(run("diff", folder / "w8.onnx", a, "--json").stdout)["tensors"]
    assert [t["change"] for t in changed] == ["type"]


def test_the_page_has_both_sums(folder: Path) -> None:
    report = json.loads((folder / "w4.report.json").read_text())
    shown = page(report)
    held = sum(row["memory"] or 0 for row in report["ledger"])
    assert held > WIDTH * WIDTH
    assert "in the file" in shown and "of constants in memory once the model is loaded" in shown
    for row in report["ledger"]:
        row["memory"] = row["memory"] and 10 * row["memory"]
    assert page(report) != shown
