"""A sum between integers becomes QLinearAdd."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.passes.lower.lower_sums import LowerSums
from qcompile.quant import Array
from qcompile.rewriting.testing import assert_refused, check, differential, parse, run_pass

F32 = np.float32
STEP = 0.05  # of the result: values half way between two integers may fall to either
PREFIX = """
    aq = QuantizeLinear(x, sa, za) ad = DequantizeLinear(aq, sa, za)
    bq = QuantizeLinear(k, sb, zb) bd = DequantizeLinear(bq, sb, zb)
"""
QUANTIZED = "q = QuantizeLinear({0}, so, zo) y = DequantizeLinear(q, so, zo)"


def total(body: str, out: str = "float[B,4,5,5] y", **changed: Array) -> Graph:
    weights: dict[str, Array] = {
        "sa": np.array(0.03, F32),
        "za": np.array(120, np.uint8),
        "sb": np.array(0.02, F32),
        "zb": np.array(130, np.uint8),
        "so": np.array(STEP, F32),
        "zo": np.array(128, np.uint8),
        **changed,
    }
    return parse(
        f"g (float[B,4,5,5] x, float[B,4,5,5] k) => ({out}) {{ {PREFIX} {body} }}", **weights
    )


def test_operands_and_result_are_integers() -> None:
    graph = total("s = Add(ad, bd) " + QUANTIZED.format("s"))
    differential(graph, LowerSums(), atol=STEP * 1.001)
    check(
        graph,
        "CHECK: %q/sum = com.microsoft.QLinearAdd(%aq, @sa{{[^,]+}}, @za{{[^,]+}}, %bq, @sb"
        "\nCHECK-NOT: {{ = Add}}",
    )


def test_relu_vanishes_where_the_integers_end_at_zero() -> None:
    body = "s = Add(ad, bd) r = Relu(s) " + QUANTIZED.format("r")
    graph = total(body, zo=np.array(0, np.uint8))
    differential(graph, LowerSums(), atol=STEP * 1.001)
    check(graph, "CHECK: QLinearAdd(\nCHECK-NOT: Relu")


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (total("y = Add(ad, bd)"), "not quantized, or has other readers"),
        (total("s = Add(ad, bd) r = Relu(s) " + QUANTIZED.format("r")), "clips more"),
        (
            total("s = Add(ad, bd) " + QUANTIZED.format("s"), zb=np.array(3, np.int8)),
            "an operand is not uint8",
        ),
        (
            total("s = Add(ad, bd) y = QuantizeLinear(s, so, zo)", "uint8[B,4,5,5] y"),
            "its quantized result is a graph output",
        ),
    ],
)
def test_what_the_operator_cannot_say_stays(graph: Graph, reason: str) -> None:
    assert_refused(graph, LowerSums(), reason)


def test_a_float_operand_is_no_refusal() -> None:
    graph = total("s = Add(ad, k) " + QUANTIZED.format("s"))
    assert run_pass(graph, LowerSums()).skips == []
