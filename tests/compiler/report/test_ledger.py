"""The ledger: every constant has one kind and a reason, and the bytes are the file's."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest

from qcompile.compiler.report.ledger import (
    LedgerRow,
    count_activation_matmuls,
    ledger_rows,
    read_rows,
    summarize_rows,
)
from qcompile.ir import Graph
from qcompile.ir.model_io.to_proto import serialize
from qcompile.passes.lower.insert_qdq import InsertQdq
from qcompile.passes.plan.plan_operands import PlanOperands
from qcompile.planning import Context, Decision
from qcompile.quant import Range
from qcompile.rewriting.testing import context, normal, parse, run_pass
from qcompile.system.json_values import json_value

TEXT = """g (float[N,8] x) => (float[N,8] y, float[N,8] z)
<int64[2] k = {-1, 8}> {
    a = MatMul(x, w) c = Add(a, b) y = Reshape(c, k) z = Mul(v, c)
}"""


def graph() -> Graph:
    return parse(TEXT.replace("z = Mul(v, c)", "u = MatMul(c, v) z = Exp(u)"),
                 w=normal(8, 8), v=normal(8, 8, seed=1), b=normal(8))  # fmt: skip


def found(made: Graph, ctx: Context | None = None) -> dict[str, LedgerRow]:
    data = serialize(made)
    table = ledger_rows(onnx.ModelProto.FromString(data), len(data), ctx)
    assert sum(r.bytes for r in table) == len(data)
    assert sum(s.bytes for s in summarize_rows(table)) == len(data)
    assert sum(s.count for s in summarize_rows(table)) == len(table)
    return {r.name: r for r in table}


def compiled() -> tuple[Graph, Context]:
    """Static, with a range for the input of one product alone."""
    made, ctx = graph(), context("qdq", keep_float=("v",))
    run_pass(made, PlanOperands(), ctx=ctx)
    ctx.ranges.set("x", Range(np.array(-1.0), np.array(3.0)))
    run_pass(made, InsertQdq(), ctx=ctx)
    return made, ctx


def test_bytes_add_up_to_a_model_as_it_is() -> None:
    table = found(graph())
    assert {n: (r.kind, r.dtype, r.shape) for n, r in table.items()} == {
        "w": ("weight", "float", (8, 8)),
        "v": ("weight", "float", (8, 8)),
        "b": ("parameter", "float", (8,)),
        "k": ("shape", "int64", (2,)),
        "(graph)": ("structure", "", ()),
    }
    assert table["w"].reason == "float in the file"
    assert table["w"].bytes >= 8 * 8 * 4


def test_a_compiled_model_tells_origin_reason_noise_and_range() -> None:
    table = found(*compiled())
    weight = table["w/int8"]
    assert (weight.tensor, weight.kind, weight.dtype) == ("w", "weight", "int8")
    assert weight.sqnr_db is not None and 30 < weight.sqnr_db < 60
    assert weight.reason == "Q/DQ around the matrix multiplication"
    for name in ("w/scale", "w/zero_point", "x/scale", "x/zero_point"):
        assert table[name].kind == "quantization", name
    assert (table["v"].kind, table["v"].dtype) == ("weight", "float")
    assert table["v"].reason == "kept float by pattern 'v'"
    activation = table["x"]
    assert (activation.kind, activation.dtype, activation.bytes) == ("activation", "uint8", 0)
    assert (activation.low, activation.high) == (-1, 3)


@pytest.mark.parametrize(
    ("mode", "said"),
    [("float", "mode float quantizes nothing"), ("static", "target 'cpu' has no rule")],
)
def test_a_weight_without_decision_says_why(mode: str, said: str) -> None:
    assert said in found(graph(), context("cpu", mode=mode))["w"].reason


def test_float_decisions_show_without_a_range() -> None:
    ctx = context("cpu")
    ctx.plan.decide(Decision("c", "activation", None, "stays float"))
    row = found(graph(), ctx)["c"]
    assert (row.dtype, row.low, row.high, row.reason) == ("float", None, None, "stays float")


def test_integers_of_the_model_that_came_in() -> None:
    made = parse(
        """g (float[N,2] x) => (float[N,2] y)
        <float s = {0.5}, int8 z = {0}, int8[2,2] w = {1, 2, 3, 4}> {
            d = DequantizeLinear(w, s, z) y = MatMul(x, d)
        }"""
    )
    table = found(made)
    assert {n: r.kind for n, r in table.items() if n != "(graph)"} == {
        "w": "weight", "s": "quantization", "z": "quantization"
    }  # fmt: skip
    assert table["w"].reason == "quantized in the input model"


def test_rows_survive_a_report() -> None:
    table = list(found(*compiled()).values())
    assert read_rows({"ledger": json_value(table)}) == table
    assert all(dataclasses.is_dataclass(r) for r in table)


def products(body: str) -> Graph:
    """Integer products of uint8 [2, 4] by int8, a constant one and data."""
    return parse(
        f"g (uint8[2,4] x, int8[4,4] v) => (float y) {{ {body} }}",
        w=np.ones((4, 4), np.int8),
        **{name: np.array(0.5, np.float32) for name in "stu"},
        z=np.array(1, np.uint8),
        o=np.array(0, np.int8),
        r=np.array(2, np.uint8),
        c=np.arange(4, dtype=np.int32),
    )


@pytest.mark.parametrize(
    ("body", "parameters"),
    [
        ("y = QLinearMatMul(x, s, z, w, t, o, u, r)", "stuzor"),
        ("y = com.microsoft.QGemm(x, s, z, w, t, o, c, u, r)", "stuzorc"),
        ("y = com.microsoft.QLinearMul(x, s, z, x, t, z, u, r)", "stuzr"),
    ],
)
def test_scales_zero_points_and_integer_biases(body: str, parameters: str) -> None:
    table = found(products(body))
    kinds = {name: row.kind for name, row in table.items()}
    assert {name for name, kind in kinds.items() if kind == "quantization"} == set(parameters)
    assert kinds.get("w", "weight") == "weight"


def test_count_activation_matmuls_have_no_constant_operand() -> None:
    made = products(
        """a = MatMulInteger(x, w, z) b = MatMulInteger(x, v, z)
        d = com.microsoft.QGemm(x, s, z, v, t, o) e = com.microsoft.QGemm(x, s, z, w, t, o)
        f = QLinearMatMul(x, s, z, v, t, o, u, r)
        g = com.microsoft.MatMulIntegerToFloat(x, v, s, t) y = Mul(d, g)"""
    )
    assert count_activation_matmuls(onnx.ModelProto.FromString(serialize(made))) == 4
