"""The dump shows all that a graph computes, and the fingerprint moves with every edit."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx.parser
import pytest

from qcompile.ir import Graph
from qcompile.ir.model_io.from_proto import from_proto
from qcompile.ir.printer import dump, fingerprint
from qcompile.quant import Array
from qcompile.rewriting.testing import check


def graph(producer: str = "") -> Graph:
    text = """<ir_version: 8, opset_import: ["": 17], producer_name: "%s">
    g (float[N,4] x, int64[M] i) => (float[N,4] y, int64[M] j)
    <float s = {0.05}, float[2,2] w = {1, 2, 3, 4}, int64[2] n = {-1, 4}, float[4] v = {1,2,3,4}>
    {
        a = Reshape(x, n) b = Clip(a, , s) c = LeakyRelu<alpha = 0.1>(b)
        k = Cast<to = 6>(i) j = Cast<to = 7>(k)
        y = Add(c, v)
    }"""
    return from_proto(onnx.parser.parse_model(text % producer))


def test_every_form_of_line() -> None:
    made = graph()
    made.add("Gelu", [made.tensors()["x"]], ["e"], domain="com.microsoft")
    check(
        made,
        """
        CHECK: graph g(%x: f32[N,4], %i: i64[M]) -> (%y, %j) opset=17
        CHECK-NEXT: %a = Reshape(%x, @n:i64[2]=[-1, 4])
        CHECK-NEXT: %b = Clip(%a, none, @s:f32[]=0.05{{[0-9]*}})
        CHECK-NEXT: %c = LeakyRelu(%b) {alpha=0.100000001}
        CHECK-NEXT: %k = Cast(%i) {to=6}
        CHECK-NEXT: %j = Cast(%k) {to=7}
        CHECK-NEXT: %y = Add(%c, @v:f32[4]#[[H:[0-9a-f]+]])
        CHECK-NEXT: %e = com.microsoft.Gelu(%x)
        """,
    )


def test_no_producer_no_version_no_chance() -> None:
    assert dump(graph("one 1.0")) == dump(graph("two 2.0")) == dump(graph())


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        (np.float16(0.5), "f16[]=0.5"),
        (np.True_, "bool[]=True"),
        (np.array([True, False]), "bool[2]=[True, False]"),
        (np.array([1, 2], np.uint8), "u8[2]=[1, 2]"),
        (np.array([1, 2], ml_dtypes.int4), "i4[2]#"),
        (np.array([1, 2], ml_dtypes.bfloat16), "?[2]#"),
        (np.array(["a", "b"], object), "?[2]#"),
        (np.empty((0, 3), np.float32), "f32[0,3]#e3b0c4"),
    ],
)
def test_constants_of_every_type(values: Array, shown: str) -> None:
    made = graph()
    made.set_input(made.nodes[-1], 1, made.constant("new", np.asarray(values)))
    assert f"@new:{shown}" in dump(made)


def test_strings_are_shown_by_content() -> None:
    """Not by their addresses, which differ from run to run."""
    lines = []
    for tail in ("ne", "ne", "ther"):
        made = graph()
        text: Array = np.array(["o" + tail] * 2, object)
        made.set_input(made.nodes[-1], 1, made.constant("new", text))
        lines.append(dump(made))
    assert lines[0] == lines[1] != lines[2]


def test_contents_show_in_the_hash() -> None:
    made = graph()
    before = dump(made)
    old = made.nodes[-1].inputs[1]
    made.set_input(made.nodes[-1], 1, made.constant("v", np.array([1, 2, 3, 5], np.float32)))
    assert before.replace("@v:", "@v_1:")[:-8] in dump(made)
    assert dump(made) != before
    assert old.name == "v"


def rename(made: Graph) -> None:
    made.nodes[0].name = "other"


EDITS: dict[str, Callable[[Graph], object]] = {
    "add": lambda g: g.add("Neg", [g.tensors()["x"]], ["z"]),
    "set_input": lambda g: g.set_input(g.nodes[1], 0, g.tensors()["x"]),
    "set_constant": lambda g: g.set_constant(g.nodes[-1], 1, np.array([1, 2, 3, 4], np.float32)),
    "replace_uses": lambda g: g.replace_uses(g.tensors()["c"], g.tensors()["b"]),
    "import_domain": lambda g: g.import_domain("com.microsoft", 1),
    "opset": lambda g: g.import_domain("", 18),
    "attribute": lambda g: g.nodes[2].attrs.update(alpha=0.2),
    "name": rename,
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_every_edit_moves_the_fingerprint(edit: Callable[[Graph], object]) -> None:
    made = graph()
    before = fingerprint(made)
    assert before == fingerprint(made) == fingerprint(graph())
    edit(made)
    assert fingerprint(made) != before
