"""Integers that were dequantized and quantized alike pass as they are."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.passes.lower.fusion.cancel_requantize import CancelRequantize
from qcompile.quant import Array
from qcompile.rewriting.testing import assert_refused, check, differential, outputs, parse, run_pass

F32 = np.float32


def again(body: str, out: str = "float[B,5] y", **changed: Array) -> Graph:
    weights: dict[str, Array] = {
        "s": np.array(0.03, F32),
        "z": np.array(120, np.uint8),
        "t": np.array(0.03, F32),
        "u": np.array(120, np.uint8),
        **changed,
    }
    return parse(
        f"""g (float[B,5] x) => ({out}) {{
            q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) {body} }}""",
        **weights,
    )


def test_equal_parameters_under_other_names() -> None:
    graph = again("r = QuantizeLinear(d, t, u) y = DequantizeLinear(r, t, u)")
    differential(graph, CancelRequantize(), atol=0.0)
    check(graph, "CHECK: %q = QuantizeLinear(\nCHECK-NOT: {{ = QuantizeLinear}}")


def test_every_integer_comes_back_for_any_scale() -> None:
    """What the pass rests on: no scale and no integer exists for which the pair is no identity."""
    rng = np.random.default_rng(0)
    every = np.arange(256, dtype=F32)
    for scale in np.exp(rng.uniform(-20, 20, 50)).astype(F32):
        graph = again("r = QuantizeLinear(d, t, u) y = Cast<to = 1>(r)", s=scale, t=scale)
        values = ((every - 120) * scale).reshape(-1, 1).repeat(5, axis=1)
        np.testing.assert_array_equal(outputs(graph, {"x": values})["y"][:, 0], every)


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (
            again("r = QuantizeLinear(d, t, u) y = Cast<to = 1>(r)", t=np.array(0.031, F32)),
            "it requantizes",
        ),
        (
            again("r = QuantizeLinear(d, t, u) y = Cast<to = 1>(r)", u=np.array(120, np.int8)),
            "it requantizes",
        ),
        (again("r = QuantizeLinear(d, t) y = Cast<to = 1>(r)"), "left out, or not constant"),
        (again("y = QuantizeLinear(d, t, u)", "uint8[B,5] y"), "graph output"),
    ],
)
def test_what_is_no_identity_stays(graph: Graph, reason: str) -> None:
    assert_refused(graph, CancelRequantize(), reason)


def test_other_quantizers_are_no_refusal() -> None:
    graph = again("n = Neg(d) r = QuantizeLinear(n, t, u) y = DequantizeLinear(r, t, u)")
    assert run_pass(graph, CancelRequantize()).skips == []
