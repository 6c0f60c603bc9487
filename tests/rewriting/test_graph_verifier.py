"""Every invariant, once held and once broken: a check never seen to fail checks nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from qcompile.errors import InvariantError
from qcompile.ir import Graph
from qcompile.ir.model_io.from_proto import from_proto
from qcompile.planning import Context, Decision, Use
from qcompile.quant import QSpec
from qcompile.rewriting import graph_verifier
from qcompile.rewriting.testing import context, model_proto

TEXT = """g (float[2] x, bool c) => (float[2] y)
<float s = {0.5}, uint8 z = {3}, float[2] w = {1, 2}> {
    [first] a = Mul(x, w)
    [quantize] q = QuantizeLinear(a, s, z)
    [dequantize] d = DequantizeLinear(q, s, z)
    [if] y = If (c) <
        then_branch = t () => (float[2] p) { p = Neg(d) },
        else_branch = e () => (float[2] r) { r = Add(d, w) }
    >
}"""
UINT8 = QSpec("uint8", symmetric=False)


def graph_of(text: str = TEXT, opset: int = 17) -> Graph:
    return from_proto(model_proto(text, opset))


def holds(graph: Graph, ctx: Context | None = None) -> bool:
    try:
        graph_verifier.verify_graph(graph, ctx)
    except InvariantError:
        return False
    return True


def test_a_sound_graph_passes_every_check() -> None:
    for rule in graph_verifier.GRAPH_CHECKS:
        rule(graph_of())


def second_tensor(graph: Graph) -> None:
    graph.set_input(graph.find("quantize"), 0, gs.Variable("x"))


def made_twice(graph: Graph) -> None:
    graph.add("Neg", [graph.tensors()["x"]], [graph.tensors()["a"]])


def two_nodes(graph: Graph) -> None:
    graph.find("quantize").name = "first"


def dangling(graph: Graph) -> None:
    graph.set_input(graph.find("quantize"), 0, gs.Variable("gone"))


def too_late(graph: Graph) -> None:
    late = graph.add("Neg", [graph.tensors()["x"]], ["late"]).outputs[0]
    graph.set_input(graph.find("quantize"), 0, late)


def dangling_in_subgraph(graph: Graph) -> None:
    graph.find("dequantize").outputs = [gs.Variable("other")]


def lost_output(graph: Graph) -> None:
    graph.find("if").outputs = [gs.Variable("other")]


def no_import(graph: Graph) -> None:
    graph.find("first").domain = "org.example"


def too_new(graph: Graph) -> None:
    graph.find("first").op = "Gelu"


def too_many_inputs(graph: Graph) -> None:
    graph.find("first").inputs.append(graph.tensors()["x"])


def scale(value: float) -> Callable[[Graph], None]:
    return lambda g: void(g.set_constant(g.find("quantize"), 1, np.array(value, np.float32)))


def zero_of_other_shape(graph: Graph) -> None:
    graph.set_constant(graph.find("quantize"), 2, np.zeros(2, np.uint8))


def pair_of_two_scales(graph: Graph) -> None:
    graph.set_constant(graph.find("dequantize"), 1, np.array(0.25, np.float32))


def pair_of_two_zeros(graph: Graph) -> None:
    graph.set_constant(graph.find("dequantize"), 2, np.array(4, np.uint8))


def pair_of_one_zero(graph: Graph) -> None:
    del graph.find("dequantize").inputs[2]


def void(_: object) -> None:
    return None


@pytest.mark.parametrize(
    ("rule", "breaks", "said"),
    [
        ("names_are_unique", second_tensor, "'quantize' refers to a second tensor called 'x'"),
        ("names_are_unique", made_twice, "tensor 'a' is made twice"),
        ("names_are_unique", two_nodes, "two nodes are called 'first'"),
        ("inputs_come_first", dangling, r"'quantize' \(QuantizeLinear\) reads tensor 'gone'"),
        ("inputs_come_first", too_late, "reads tensor 'late', produced later"),
        ("inputs_come_first", dangling_in_subgraph, r"'if' \(If\) reads tensor 'd'"),
        ("inputs_come_first", lost_output, "output 'y' is not produced by any node"),
        ("operators_exist", no_import, "needs domain 'org.example', not imported"),
        ("operators_exist", too_new, "uses Gelu, new in opset 20, but .* declares opset 17"),
        ("operators_exist", too_many_inputs, "gives Mul 3 inputs, at most 2 expected"),
        ("quantizers_are_sound", scale(0), "scale of node 'quantize' is not positive"),
        ("quantizers_are_sound", scale(-1), "not positive"),
        ("quantizers_are_sound", scale(np.inf), "not positive and finite"),
        ("quantizers_are_sound", scale(np.nan), "not positive and finite"),
        ("quantizers_are_sound", zero_of_other_shape, r"scale \(\) but zero point \(2,\)"),
        ("pairs_agree", pair_of_two_scales, "'dequantize' and 'quantize' differ: 's_1' and 's'"),
        ("pairs_agree", pair_of_one_zero, "differ: None and 'z'"),
        ("pairs_agree", pair_of_two_zeros, "differ: 'z_1' and 'z'"),
    ],
)
def test_a_broken_graph_fails_its_check(
    rule: str, breaks: Callable[[Graph], None], said: str
) -> None:
    graph = graph_of()
    breaks(graph)
    with pytest.raises(InvariantError, match=f"{rule.replace('_', '-')}: .*{said}"):
        getattr(graph_verifier, rule)(graph)
    assert not holds(graph)


def test_every_check_was_seen_to_fail() -> None:
    (mark,) = test_a_broken_graph_fails_its_check.pytestmark  # type: ignore[attr-defined]
    assert {case[0] for case in mark.args[1]} == {r.__name__ for r in graph_verifier.GRAPH_CHECKS}


def test_scale_and_zero_point_of_one_element_agree_whatever_their_rank() -> None:
    graph = graph_of()
    graph.set_constant(graph.find("quantize"), 2, np.array([3], np.uint8))
    graph_verifier.quantizers_are_sound(graph)


def test_a_zero_point_left_out_is_zero() -> None:
    graph = graph_of(TEXT.replace("uint8 z = {3}", "uint8 z = {0}"))
    pair_of_one_zero(graph)
    assert holds(graph)


def test_operators_that_onnx_runtime_knew_first_may_be_older_than_onnx_says() -> None:
    body = "{ y = LayerNormalization(x, x) }"
    assert holds(graph_of(f"g (float[2] x) => (float[2] y) {body}", opset=12))


def test_a_models_own_functions_need_no_schema() -> None:
    text = """g (float[2] x) => (float[2] y) { y = Gelu(x) }
        <opset_import: ["": 17], domain: ""> Gelu (a) => (b) { b = Abs(a) }"""
    assert holds(graph_of(text))


def planned(use: Use, tensor: str = "x", spec: QSpec | None = UINT8) -> Context:
    ctx = context()
    ctx.plan.decide(Decision(tensor, "activation", spec, "because", (use,)))
    return ctx


def test_plans_refer_to_live_tensors() -> None:
    assert holds(graph_of(), planned(Use("first", 0)))
    assert holds(graph_of(), planned(Use("gone", 0), spec=None))


@pytest.mark.parametrize(
    ("use", "tensor", "said"),
    [
        (Use("gone", 0), "x", "input 0 of node 'gone', which is gone"),
        (Use("first", 7), "x", "input 7 of node 'first', which is gone"),
        (Use("first", 1), "x", "input 1 of node 'first' is 'w', expected 'x'"),
    ],
)
def test_plans_of_what_is_gone_fail(use: Use, tensor: str, said: str) -> None:
    with pytest.raises(InvariantError, match=f"plan: .*{said}"):
        graph_verifier.verify_graph(graph_of(), planned(use, tensor))
