"""Float weights between Q/DQ nodes stay float in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.ir.model_io.to_proto import serialize
from qcompile.passes.lower.fusion.shield_floats import ShieldFloats
from qcompile.quant import Array
from qcompile.rewriting.testing import check, differential, normal, outputs, parse, run_pass
from qcompile.runtime.session import Session, SessionOptions

F32 = np.float32
TEXT = """g (float[N,4,6,6] x) => (float[N,3,H,H] y) {{
    xq = QuantizeLinear(x, s, z) xd = DequantizeLinear(xq, s, z)
    c = {0}(xd, w, b) {1}
}}"""
QUANTIZED = "r = Relu(c) q = QuantizeLinear(r, s, z) y = DequantizeLinear(q, s, z)"


def layer(op: str, rest: str = QUANTIZED, **more: Array) -> Graph:
    """A weight with one large channel: one scale for all would round the others to nothing."""
    shape = (4, 3, 3, 3) if op == "ConvTranspose" else (3, 4, 3, 3)
    weight: Array = normal(*shape) / 40
    weight[(slice(None), 0) if op == "ConvTranspose" else 0] *= 1000
    parts: dict[str, Array] = {"s": np.array(0.02, F32), "z": np.array(0, np.uint8)}
    return parse(TEXT.format(op, rest), w=weight, b=np.full(3, 2, F32), **parts, **more)


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_the_runtime_leaves_the_weight_float(op: str) -> None:
    graph, feed = layer(op), {"x": abs(normal(2, 4, 6, 6))}
    exact = outputs(graph, feed)["y"]
    options = SessionOptions(threads=1)
    trap = Session(serialize(graph), options).run(feed)["y"]
    assert np.abs(trap - exact).max() > 0.1  # five steps: where this fails, the pass can go
    differential(graph, ShieldFloats(), atol=0)
    found = Session(serialize(graph), options).run(feed)["y"]
    np.testing.assert_allclose(found, exact, atol=0.0201)  # may round half way otherwise


def test_golden() -> None:
    graph = layer("ConvTranspose")
    run_pass(graph, ShieldFloats(), ShieldFloats())
    check(
        graph,
        """
        CHECK: %xd/shielded = Sum(%xd)
        CHECK: %c = ConvTranspose(%xd/shielded, @w
        CHECK-NOT: {{ = Sum}}
        """,
    )


@pytest.mark.parametrize("stored", ["Cast<to = 1>(v)", "DequantizeLinear(v, s)"])
def test_a_weight_that_is_made_at_load_is_float_too(stored: str) -> None:
    """Not one behind a dequantizer, which ONNX Runtime keeps."""
    text = TEXT.format("Conv", QUANTIZED).replace("c = ", f"w = {stored} c = ")
    parts: dict[str, Array] = {"s": np.array(0.02, F32), "z": np.array(0, np.uint8)}
    graph = parse(text, v=np.ones((3, 4, 3, 3), np.int8), b=np.ones(3, F32), **parts)
    run_pass(graph, ShieldFloats())
    assert any(n.op == "Sum" for n in graph.nodes) is stored.startswith("Cast")


@pytest.mark.parametrize("rest", ["y = Relu(c)", "y = Sigmoid(c)"])
def test_without_a_quantizer_next_nothing_is_needed(rest: str) -> None:
    graph = layer("Conv", rest)
    run_pass(graph, ShieldFloats())
    assert not any(n.op == "Sum" for n in graph.nodes)


@pytest.mark.parametrize("behind", ["BatchNormalization(c, f, o, o, f)", "Mul(c, g)", "Add(c, g)"])
def test_what_the_runtime_folds_into_the_weight_hides_no_quantizer(behind: str) -> None:
    used = {"f": np.ones(3, F32), "o": np.zeros(3, F32), "g": np.ones((3, 1, 1), F32)}
    used = {name: values for name, values in used.items() if f", {name}" in behind}
    graph = layer("Conv", f"n = {behind} {QUANTIZED.replace('(c)', '(n)')}", **used)
    feed, options = {"x": abs(normal(2, 4, 6, 6))}, SessionOptions(threads=1)
    exact = outputs(graph, feed)["y"]
    trap = Session(serialize(graph), options).run(feed)["y"]
    assert np.abs(trap - exact).max() > 0.1
    run_pass(graph, ShieldFloats())
    found = Session(serialize(graph), options).run(feed)["y"]
    np.testing.assert_allclose(found, exact, atol=0.0201)


def test_data_is_not_folded_into_a_weight() -> None:
    graph = layer("Conv", f"t = Neg(xd) n = Mul(c, t) {QUANTIZED.replace('(c)', '(n)')}")
    run_pass(graph, ShieldFloats())
    assert not any(n.op == "Sum" for n in graph.nodes)
