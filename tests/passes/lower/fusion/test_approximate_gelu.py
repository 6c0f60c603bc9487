"""GELU by tanh: only where quantizers read the result, in steps that hide the difference."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.ir.printer import dump
from qcompile.passes.lower.fusion.approximate_gelu import DIFFERENCE, ApproximateGelu
from qcompile.quant import Array
from qcompile.rewriting.testing import assert_refused, check, differential, parse, run_pass

STEP = 0.02
QUANTIZED = "q = QuantizeLinear(g, s, z) y = DequantizeLinear(q, s, z)"


def gelu(body: str, outputs: str = "float[B,8] y", opset: int = 20, **changed: Array) -> Graph:
    weights: dict[str, Array] = {
        "s": np.array(STEP, np.float32),
        "narrow": np.array(15 * DIFFERENCE, np.float32),
        "steps": np.full(8, STEP, np.float32),
        "z": np.array(9, np.uint8),
        "zeros": np.full(8, 9, np.uint8),
        "bias": np.linspace(-1, 1, 8, dtype=np.float32),
        "low": np.array(-0.1, np.float32),
        "high": np.array(4, np.float32),
        **changed,
    }
    return parse(f"g (float[B,8] x) => ({outputs}) {{ {body} }}", opset, **weights)


def test_the_difference_to_erf_is_the_one_that_is_stated() -> None:
    x = np.linspace(-10, 10, 20001)
    by_erf = x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    by_tanh = x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    largest = np.abs(by_erf - by_tanh).max()
    assert 0.99 * DIFFERENCE < largest <= DIFFERENCE


@pytest.mark.parametrize("operator", ["Gelu(x)", "com.microsoft.Gelu(x)"])
def test_a_quantized_gelu_is_computed_by_tanh(operator: str) -> None:
    graph = gelu(f"g = {operator} {QUANTIZED}")
    # Both sides of the boundary between two steps.
    differential(graph, ApproximateGelu(), atol=STEP * 1.001)
    check(
        graph,
        """
        CHECK: %g/tanh = com.microsoft.FastGelu(%x)
        CHECK-NEXT: QuantizeLinear(%g/tanh,
        CHECK-NOT: Gelu
        """,
    )


def test_differences_are_followed_to_every_quantizer() -> None:
    graph = gelu(
        """h = Gelu(x) a = Add(h, bias) c = Clip(a, low, high) g = Transpose<perm = [1, 0]>(c)
           q = QuantizeLinear(g, s, z) y = DequantizeLinear(q, s, z)
           p = QuantizeLinear(h, s, z) w = DequantizeLinear(p, s, z)""",
        "float[8,B] y, float[B,8] w",
    )
    differential(graph, ApproximateGelu(), atol=STEP * 1.001)
    check(graph, "CHECK: com.microsoft.FastGelu(%x)\nCHECK-NOT: Gelu")


@pytest.mark.parametrize(
    ("body", "outputs", "reason"),
    [
        (f"g = Gelu(x) {QUANTIZED}", "float[B,8] y, float[B,8] g", "it is an output"),
        (f"g = Gelu(x) {QUANTIZED} w = Neg(g)", "float[B,8] y, float[B,8] w", "Neg reads it"),
        (f"h = Gelu(x) g = Mul(h, bias) {QUANTIZED}", "float[B,8] y", "Mul reads it"),
        (f"h = Gelu(x) g = Add(h, x) {QUANTIZED}", "float[B,8] y", "Add reads it"),
        ("g = Gelu(x) y = QuantizeLinear(g, narrow, z)", "uint8[B,8] y", "step 0.0071 would show"),
        (
            "g = Gelu(x) q = QuantizeLinear(g, s, z) y = DequantizeLinear(q, s, z) "
            "c = Clip(g, low, high) p = QuantizeLinear(c, narrow, z)",
            "float[B,8] y, uint8[B,8] p",
            "step 0.0071 would show",
        ),
        (
            "g = Gelu(x) y = QuantizeLinear<axis = 1>(g, steps, zeros)",
            "uint8[B,8] y",
            "no constant step for the whole tensor",
        ),
    ],
)
def test_refusals(body: str, outputs: str, reason: str) -> None:
    assert_refused(gelu(body, outputs), ApproximateGelu(), reason)


def test_what_is_tanh_already_stays_without_a_reason() -> None:
    graph = gelu(f'g = Gelu<approximate = "tanh">(x) {QUANTIZED}')
    before = dump(graph)
    assert run_pass(graph, ApproximateGelu()).skips == []
    assert dump(graph) == before


def test_the_limit_is_an_option() -> None:
    graph = gelu(f"g = Gelu(x) {QUANTIZED}")
    assert_refused(graph, ApproximateGelu(least_steps=100), "would show the difference")
