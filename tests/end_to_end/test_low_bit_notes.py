"""What few bits cost in speed reaches the report: notes, operators, and the types of the ledger."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx
import pytest

import qcompile
from qcompile import Options, Recipe
from qcompile.compiler.report.report import Report
from qcompile.rewriting.testing import model_proto, normal

WIDTH = 128
FLOATS, SPEED = "data-quantized-by-runtime", "weight-only-speed"
LOW_BITS = "low-bit-qdq"


def model() -> onnx.ModelProto:
    text = f"""g (float[B,{WIDTH}] x) => (float[B,{WIDTH}] y) {{
        a = MatMul(x, w) h = Tanh(a) y = MatMul(h, v)
    }}"""
    return model_proto(text, 21, w=normal(WIDTH, WIDTH), v=normal(WIDTH, WIDTH, seed=1))


@functools.cache
def compiled(target: str, mode: str, bits: int) -> Report:
    choices: dict[str, Any] = {"target": target, "mode": mode, "weight_bits": bits}
    recipe = Recipe(**choices, transforms="none")
    data = [{"x": normal(8, WIDTH, seed=2)}] if mode == "static" else None
    options = Options(bench=False, verify=False)
    return qcompile.compile(model(), data, recipe=recipe, options=options).report


def notes(target: str, mode: str, bits: int) -> dict[str, str]:
    return {note.code: note.text for note in compiled(target, mode, bits).notes}


@pytest.mark.parametrize("mode", ["static", "weight-only"])
def test_low_bit_qdq_says_that_it_runs_as_float(mode: str) -> None:
    text = notes("qdq", mode, 4)[LOW_BITS]
    assert "(2 here)" in text and "not for speed" in text and "float data" in text


@pytest.mark.parametrize(("target", "mode", "bits"), [("qdq", "static", 8), ("cpu", "static", 4)])
def test_where_nothing_runs_as_float_nothing_is_said(target: str, mode: str, bits: int) -> None:
    assert LOW_BITS not in notes(target, mode, bits)


def test_the_fused_multiplications_are_counted_and_are_those_of_the_ledger() -> None:
    report = compiled("qdq", "weight-only", 4)
    fused = report.operators["com.microsoft.MatMulNBits"]
    assert f"MatMulNBits ({fused} here)" in notes("qdq", "weight-only", 4)[FLOATS]
    assert fused == sum(r.computed == "int8" for r in report.ledger if r.kind == "weight") == 2


def test_where_the_int8_kernel_is_faster_it_is_used_or_named() -> None:
    """Modes static and dynamic have no MatMulNBits, and weight-only says that they are faster."""
    assert "static and dynamic are faster" in notes("cpu", "weight-only", 4)[SPEED]
    assert compiled("cpu", "weight-only", 4).operators["com.microsoft.MatMulNBits"] == 2
    for mode in ("static", "dynamic"):
        report = compiled("cpu", mode, 4)
        assert "com.microsoft.MatMulNBits" not in report.operators
        assert SPEED not in notes("cpu", mode, 4)
        weights = [row for row in report.ledger if row.kind == "weight"]
        assert {(r.dtype, r.computed, r.memory_dtype) for r in weights} == {
            ("int4", "int8", "int8")
        }


def test_rows_of_all_forms_sum_to_the_file_and_say_what_is_in_memory() -> None:
    report = compiled("cpu", "static", 4)
    assert sum(row.bytes for row in report.ledger) == report.bytes
    held = sum(row.memory or 0 for row in report.ledger if row.kind == "weight")
    assert held == 2 * WIDTH * WIDTH
    assert np.all([row.memory is None for row in report.ledger if row.kind == "activation"])
