"""Quantized products of two activations become ONNX Runtime's integer product."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.ir.model_io.to_proto import serialize, to_proto
from qcompile.passes.lower.lower_products import LowerProducts
from qcompile.quant import Array
from qcompile.rewriting.testing import assert_refused, check, differential, parse, run_pass
from qcompile.runtime.evaluation.int16_saturation import bound, linears
from qcompile.runtime.session import optimized_ops

# Integers are the same before and after: sums of K = 4 products are exact on one side and rounded
# K + 3 times on the other, with |a|, |b| <= 8 (a step of 0.05 and 255 steps are 12.75 at most).
ATOL = 2 * (4 + 3) * 2.0**-24 * (4 * 12.75**2)
PLAIN = """
    aq = QuantizeLinear(x, sa, za)
    a = DequantizeLinear(aq, sa, za)
    bq = QuantizeLinear(k, sb, zb)
    b = DequantizeLinear(bq, sb, zb)
"""
LEFT = "ar = Reshape(a, heads) at = Transpose<perm = [0, 2, 1, 3]>(ar)"
RIGHT = "br = Reshape(b, heads) bt = Transpose<perm = [0, 2, 3, 1]>(br)"
PRODUCT = f"{LEFT} {RIGHT} y = MatMul(at, bt)"
FOUR = "float[B,2,S,S] y"


def product(body: str, outputs: str = FOUR, prefix: str = PLAIN, **changed: Array) -> Graph:
    weights: dict[str, Array] = {
        "sa": np.array(0.05, np.float32),
        "za": np.array(120, np.uint8),
        "sb": np.array(0.04, np.float32),
        "zb": np.array(-3, np.int8),
        "heads": np.array([0, 0, 2, 4]),
        **changed,
    }
    return parse(
        f"g (float[B,S,8] x, float[B,S,8] k) => ({outputs}) {{ {prefix} {body} }}", **weights
    )


def test_integers_are_moved_and_multiplied() -> None:
    graph = product(PRODUCT)
    differential(graph, LowerProducts(), atol=ATOL)
    check(
        graph,
        """
        CHECK: %aq = QuantizeLinear(%x
        CHECK: %ar/quantized = Reshape(%aq
        CHECK: %at/quantized = Transpose(%ar/quantized)
        CHECK: %y = com.microsoft.MatMulIntegerToFloat(%at/quantized, %bt/quantized, @sa
        CHECK-NOT: DequantizeLinear
        """,
    )
    assert optimized_ops(serialize(graph))["com.microsoft.MatMulIntegerToFloat"] == 1


def test_operands_that_nothing_moves() -> None:
    graph = product(
        "bt = Transpose<perm = [0, 2, 1]>(b) y = MatMul(a, bt)", outputs="float[B,S,S] y"
    )
    # K = 8 products here
    differential(graph, LowerProducts(), atol=2 * (8 + 3) * 2.0**-24 * (8 * 12.75**2))
    check(graph, "CHECK: %y = com.microsoft.MatMulIntegerToFloat(%aq, %bt/quantized")


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (product(PRODUCT, zb=np.array(125, np.uint8)), "but uint8 is among them"),
        (
            product(PRODUCT, za=np.array(0, np.int8)),
            "operands are not uint8 and int8 but int8 is among them",
        ),
        (
            product(
                PRODUCT,
                prefix=PLAIN.replace("(k, sb", "<axis = 2>(k, sb").replace(
                    "(bq, sb", "<axis = 2>(bq, sb"
                ),
                sb=np.full(8, 0.04, np.float32),
                zb=np.zeros(8, np.int8),
            ),
            "an operand has a scale per channel",
        ),
    ],
)
def test_other_types_have_no_fast_kernel(graph: Graph, reason: str) -> None:
    assert_refused(graph, LowerProducts(), reason)


def test_an_operand_without_zero_point_is_left() -> None:
    prefix = """
        aq = QuantizeLinear(x, sa)
        a = DequantizeLinear(aq, sa)
        bq = QuantizeLinear(k, sb, zb)
        b = DequantizeLinear(bq, sb, zb)
    """
    assert_refused(product(PRODUCT, prefix=prefix), LowerProducts(), "no zero point")


def test_a_float_operand_is_no_refusal() -> None:
    graph = product(f"{RIGHT} xr = Reshape(x, heads) xt = Transpose<perm = [0, 2, 1, 3]>(xr) "
                    "y = MatMul(xt, bt)")  # fmt: skip
    assert run_pass(graph, LowerProducts()).skips == []


def test_a_key_of_seven_bits_stays_clipped_on_its_way() -> None:
    """Its bound, by which the sums fit into int16, is found behind what moves it."""
    clipped = PLAIN.replace(
        "b = DequantizeLinear(bq", "bc = Clip(bq, low, high) b = DequantizeLinear(bc"
    )
    low, high = np.array(-64, np.int8), np.array(64, np.int8)
    graph = product(PRODUCT, prefix=clipped, low=low, high=high)
    differential(graph, LowerProducts(), atol=ATOL)
    check(
        graph,
        """
        CHECK: %bc = Clip(%bq, @low{{.*}}=-64, @high{{.*}}=64)
        CHECK: %br/quantized = Reshape(%bc
        CHECK: %y = com.microsoft.MatMulIntegerToFloat(%at/quantized, %bt/quantized, @sa
        """,
    )
    assert [bound(x).can for x in linears(to_proto(graph))] == [0]
    wide = product(PRODUCT, prefix=clipped, low=low, high=np.array(65, np.int8))
    run_pass(wide, LowerProducts())
    assert [bound(x).can for x in linears(to_proto(wide))] == [1]
