"""HardSwish written out becomes one node, whatever the order of its factors."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.ir.printer import dump
from qcompile.passes.simplify.fuse_hardswish import FuseHardswish
from qcompile.rewriting.testing import assert_refused, check, differential, parse, run_pass

# Both forms: at most five operations on values below 5 + 3, each rounded by 2^-24 of them, and a
# sixth that differs by 2^-24 where it is written as a factor.
ATOL = 6 * 2.0**-24 * 8 * 5
CLIP = "a = Add(x, three) g = Clip(a, zero, six) "
SIGMOID = "g = HardSigmoid<alpha = 0.16666667, beta = 0.5>(x) "
CLIPPED = [
    "p = Mul(x, g) y = Div(p, six)",
    "p = Mul(g, x) y = Mul(sixth, p)",
    "p = Div(g, six) y = Mul(x, p)",
    "p = Mul(g, sixth) y = Mul(p, x)",
]


def hardswish(body: str, opset: int = 17, outputs: str = "float[N,4] y", **changed: float) -> Graph:
    scalars = {"three": 3.0, "six": 6.0, "zero": 0.0, "sixth": 1 / 6, "two": 2.0, **changed}
    return parse(
        f"g (float[N,4] x, float[N,4] z) => ({outputs}) {{ {body} }}",
        opset,
        **{name: np.array(value, np.float32) for name, value in scalars.items()},
    )


@pytest.mark.parametrize("body", [*(CLIP + order for order in CLIPPED), SIGMOID + "y = Mul(g, x)"])
@pytest.mark.parametrize("opset", [14, 17])
def test_it_is_one_node(body: str, opset: int) -> None:
    graph = hardswish(body, opset)
    differential(graph, FuseHardswish(), atol=ATOL)
    check(graph, "CHECK: graph g\nCHECK-NEXT: %y = HardSwish(%x){{$}}\nCHECK-NOT: %")


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (hardswish(CLIP + CLIPPED[0], 13), "ONNX has no HardSwish at opset 13, needs 14"),
        (hardswish(CLIP + "y = Mul(z, g)"), "not multiplied by x and 1/6"),
        (hardswish(CLIP + "y = Mul(x, g)"), "not multiplied by x and 1/6"),
        (hardswish(CLIP + "p = Mul(x, g) y = Mul(p, six)"), "not multiplied by x and 1/6"),
        (hardswish(CLIP + "p = Mul(x, g) y = Div(six, p)"), "not multiplied by x and 1/6"),
        (
            hardswish(
                CLIP + "p = Mul(x, g) y = Div(p, six) q = Neg(g)",
                outputs="float[N,4] y, float[N,4] q",
            ),
            "used elsewhere",
        ),
        (hardswish(SIGMOID + "y = Mul(g, z)"), "not multiplied by x"),
    ],
)  # fmt: skip
def test_what_is_none_stays(graph: Graph, reason: str) -> None:
    assert_refused(graph, FuseHardswish(), reason)


@pytest.mark.parametrize(
    "graph",
    [
        hardswish(CLIP + CLIPPED[0], three=2.5),
        hardswish("g = Clip(x, zero, six) p = Mul(x, g) y = Div(p, six)"),
        hardswish("a = Sub(x, three) g = Clip(a, zero, six) p = Mul(x, g) y = Div(p, six)"),
        hardswish(CLIP.replace("six", "two") + CLIPPED[0]),
        hardswish("g = HardSigmoid(x) y = Mul(g, x)"),
    ],
)
def test_other_activations_are_no_refusal(graph: Graph) -> None:
    before = dump(graph)
    assert run_pass(graph, FuseHardswish()).skips == [] and dump(graph) == before
