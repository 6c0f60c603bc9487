"""An integer product whose result is quantized writes integers itself."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.passes.lower.fusion.fuse_requantize import FuseRequantize
from qcompile.quant import Array
from qcompile.rewriting.testing import assert_refused, check, differential, parse

STEP = 0.1  # of the output: a value half way between two integers may fall to either
PRODUCT = "m = com.microsoft.MatMulIntegerToFloat(aq, bq, sa, sb, za, zb)"
QUANTIZED = "q = QuantizeLinear(m, so, zo) y = DequantizeLinear(q, so, zo)"
PREFIX = """
    aq = QuantizeLinear(x, sa, za)
    bt = Transpose<perm = [0, 2, 1]>(k)
    bq = QuantizeLinear(bt, sb, zb)
"""


def product(body: str, outputs: str = "float[B,S,S] y", **changed: Array) -> Graph:
    weights: dict[str, Array] = {
        "sa": np.array(0.05, np.float32),
        "za": np.array(120, np.uint8),
        "sb": np.array(0.04, np.float32),
        "zb": np.array(-3, np.int8),
        "so": np.array(STEP, np.float32),
        "zo": np.array(130, np.uint8),
        "bias": np.ones(3, np.float32),
        **changed,
    }
    return parse(
        f"g (float[B,S,8] x, float[B,S,8] k) => ({outputs}) {{ {PREFIX} {body} }}", **weights
    )


def test_product_and_quantizer_become_one_node() -> None:
    graph = product(f"{PRODUCT} {QUANTIZED}")
    differential(graph, FuseRequantize(), atol=STEP * 1.001)
    check(
        graph,
        """
        CHECK: %q/product = QLinearMatMul(%aq, @sa{{[^,]+}}, @za{{[^,]+}}, %bq, @sb
        CHECK-NOT: MatMulIntegerToFloat
        """,
    )


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (
            product(f"{PRODUCT} {QUANTIZED} z = Neg(m)", outputs="float[B,S,S] y, float[B,S,S] z"),
            "other readers",
        ),
        (
            product(
                "m = com.microsoft.MatMulIntegerToFloat(aq, bq, sa, sb, za, zb, bias) " + QUANTIZED
            ),
            "adds a bias",
        ),
        (
            product("m = com.microsoft.MatMulIntegerToFloat(aq, bq, sa, sb) " + QUANTIZED),
            "the matrix multiplication has no zero points",
        ),
        (
            product(f"{PRODUCT} {QUANTIZED}", zo=np.array(0, np.int8)),
            "not the type of the left operand",
        ),
    ],
)
def test_what_the_operator_cannot_say_stays(graph: Graph, reason: str) -> None:
    assert_refused(graph, FuseRequantize(), reason)
