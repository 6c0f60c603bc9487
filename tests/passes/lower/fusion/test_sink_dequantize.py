"""Linear layers read dequantized data directly: layout operators move integers."""

from __future__ import annotations

import numpy as np

from qcompile.ir import Graph
from qcompile.ir.printer import dump
from qcompile.passes.lower.fusion.sink_dequantize import SinkDequantize
from qcompile.rewriting.testing import assert_refused, check, differential, normal, parse, run_pass


def flattened(body: str, channels: bool = False) -> Graph:
    steps = np.full(4, 0.03, np.float32) if channels else np.array(0.03, np.float32)
    return parse(
        f"""g (float[B,4,2] x) => (float[B,6] y) {{
            q = QuantizeLinear<axis = 1>(x, s, z)
            d = DequantizeLinear<axis = 1>(q, s, z)
            f = Flatten(d)
            {body}
        }}""",
        s=steps,
        z=np.full(steps.shape, 128, np.uint8),
        w=np.random.default_rng(0).integers(-127, 128, (6, 8), np.int8),
        t=np.full(6, 0.01, np.float32),
        v=normal(8, 6),
    )


LINEAR = "e = DequantizeLinear<axis = 0>(w, t) y = Gemm<transB = 1>(f, e)"


def test_golden() -> None:
    graph = flattened(LINEAR)
    differential(graph, SinkDequantize(), atol=0)
    check(
        graph,
        """
        CHECK: %q = QuantizeLinear(%x
        CHECK-NEXT: %f/quantized = Flatten(%q)
        CHECK: %f/dequantized = DequantizeLinear(%f/quantized, @s:f32[]={{.*}}, @z:u8[]=128)
        CHECK: Gemm(%f/dequantized, %e)
        """,
    )


def test_refuses_scales_per_channel() -> None:
    assert_refused(flattened(LINEAR, channels=True), SinkDequantize(), "scales per channel")


def test_layers_with_float_weights_stay() -> None:
    graph = flattened("y = MatMul(f, v)")
    before = dump(graph)
    run_pass(graph, SinkDequantize())
    assert dump(graph) == before
