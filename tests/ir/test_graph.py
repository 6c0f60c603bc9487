"""The graph layer: edits keep names that the outside needs, and order, sharing and subgraphs."""

from __future__ import annotations

import numpy as np
import onnx.parser
import pytest

from qcompile.errors import InvariantError, ModelError
from qcompile.ir import Graph, array, has_subgraph, is_float, is_op, scalar
from qcompile.ir.analysis import shape_inference
from qcompile.ir.graph import reads
from qcompile.ir.model_io.from_proto import from_proto
from qcompile.ir.model_io.read_model import load
from qcompile.ir.model_io.to_proto import serialize
from qcompile.rewriting import graph_verifier
from qcompile.rewriting.testing import check, model_proto, outputs

X = {"x": np.array([-1.0, 2.0], np.float32)}


def graph_of(text: str) -> Graph:
    graph = from_proto(model_proto(text))
    shape_inference.infer(graph)
    return graph


def ops(graph: Graph) -> list[str]:
    return [n.op for n in graph.nodes]


def run(graph: Graph) -> list[float]:
    """Sorted and sound again, and the only output for X."""
    graph.sort()
    graph_verifier.verify_graph(graph)
    (y,) = outputs(graph, X).values()
    return [float(v) for v in y]


CHAIN = "g (float[2] x) => (float[2] y) { a = Neg(x) b = Abs(a) y = Exp(b) }"


def test_replace_uses_inside() -> None:
    graph = graph_of(CHAIN)
    tensors = graph.tensors()
    assert graph.replace_uses(tensors["b"], tensors["a"]) is tensors["a"]
    assert graph.remove_dead() == 1
    assert run(graph) == pytest.approx([np.e, np.exp(-2)])


def test_a_node_takes_the_name_of_the_one_it_replaces() -> None:
    graph = graph_of(CHAIN)
    old = graph.producer(graph.tensors()["b"])
    assert old is not None
    name = old.name
    new = graph.substitute(graph.tensors()["b"], "Relu", [graph.tensors()["a"]], "relu")
    graph.take_name(new, old)
    assert new.name == name != old.name
    graph.remove_dead()
    assert graph.find(name) is new
    assert run(graph) == pytest.approx([np.e, 1])


def test_substitute_names_a_node_s_result_after_what_it_stands_for() -> None:
    graph = graph_of("g (float[2] x) => (float[2] y) { h = Neg(x) y = Relu(h) }")
    h = graph.tensors()["h"]
    made = graph.substitute(h, "Abs", [graph.inputs[0]], "abs", name="node")
    assert [n.op for n in graph.consumers(made.outputs[0])] == ["Relu"]
    found = made.name, made.outputs[0].name, made.outputs[0].dtype, made.outputs[0].shape
    assert found == ("node", "h/abs", h.dtype, h.shape)


@pytest.mark.parametrize(
    ("ops", "maker", "reader"),
    [((), "Neg", "Relu"), (("Neg", "Abs"), "Neg", None), (("Abs", "Relu"), None, "Relu")],
)
def test_neighbours_of_certain_operators(
    ops: tuple[str, ...], maker: str | None, reader: str | None
) -> None:
    graph = graph_of("g (float[2] x) => (float[2] y) { h = Neg(x) y = Relu(h) }")
    h = graph.tensors()["h"]
    found = graph.producer(h, *ops), graph.only_consumer(h, *ops)
    assert [n and n.op for n in found] == [maker, reader]
    assert graph.producer(graph.inputs[0], *ops) is None


def test_replace_uses_of_a_graph_output_keeps_its_name() -> None:
    graph = graph_of("g (float[2] x) => (float[2] y) { a = Neg(x) b = Abs(a) y = Identity(b) }")
    tensors = graph.tensors()
    assert graph.replace_uses(tensors["y"], tensors["b"]) is tensors["y"]
    graph.remove_dead()
    check(graph, "CHECK: %a = Neg(%x)\nCHECK-NEXT: %y = Abs(%a)")
    assert run(graph) == [1, 2]


def test_readers_of_the_new_tensor_follow_the_output() -> None:
    graph = graph_of(
        "g (float[2] x) => (float[2] y, float[2] z) { b = Abs(x) y = Identity(b) z = Neg(b) }"
    )
    graph.replace_uses(graph.tensors()["y"], graph.tensors()["b"])
    graph.remove_dead()
    check(graph, "CHECK: %y = Abs(%x)\nCHECK-NEXT: %z = Neg(%y)")
    graph_verifier.verify_graph(graph)


@pytest.mark.parametrize("new", ["x", "c", "z"])
def test_an_output_takes_over_what_has_no_node_to_give_through_identity(new: str) -> None:
    """A graph input, a constant and another output: none can change its name."""
    graph = graph_of(
        """g (float[2] x) => (float[2] y, float[2] z) <float[2] c = {3, 4}> {
            z = Add(x, c) y = Neg(z)
        }"""
    )
    graph.replace_uses(graph.tensors()["y"], graph.tensors()[new])
    graph.remove_dead()
    graph.sort()
    graph_verifier.verify_graph(graph)
    found = outputs(graph, X)
    assert found["y"].tolist() == {"x": [-1, 2], "c": [3, 4], "z": [2, 6]}[new]
    assert found["z"].tolist() == [2, 6]


BRANCHES = """
    i = If (c) <
        then_branch = yes () => (float[2] p) { p = Add(a, w) },
        else_branch = no () => (float[2] q) { q = Identity(a) }
    >
"""


def if_graph(rest: str) -> Graph:
    return graph_of(
        f"""g (float[2] x, bool c) => (float[2] y) <float[2] w = {{10, 20}}> {{
            a = Neg(x) {BRANCHES} {rest}
        }}"""
    )


def test_what_a_subgraph_reads_keeps_its_name() -> None:
    graph = if_graph("b = Abs(a) y = Add(i, b)")
    tensors = graph.tensors()
    new = graph.add("Abs", [tensors["x"]], ["new"]).outputs[0]
    assert graph.is_output(tensors["a"]) and graph.only_consumer(tensors["a"]) is None
    graph.replace_uses(tensors["a"], new)
    graph.remove_dead()
    graph.sort()
    check(graph, "CHECK: %a = Abs(%x)\nCHECK-NEXT: If(%c)\nCHECK-NEXT: %b = Abs(%a)")
    for flag, expected in ((True, [12, 24]), (False, [2, 4])):
        assert outputs(graph, {**X, "c": np.array(flag)})["y"].tolist() == expected


def test_constants_that_subgraphs_alone_read_survive() -> None:
    graph = if_graph("y = Neg(i)")
    assert "w" in graph.constants()
    assert array(graph.constants()["w"]).tolist() == [10, 20]
    again = load(serialize(graph))
    assert outputs(again, {**X, "c": np.array(True)})["y"].tolist() == [-11, -18]


def test_a_constant_stays_for_the_subgraph_when_the_graph_stops_reading_it() -> None:
    graph = if_graph("b = Mul(i, w) y = Neg(b)")
    graph.set_constant(graph.find("Mul:b"), 1, np.array([1, 1], np.float32))
    assert array(graph.constants()["w"]).tolist() == [10, 20]
    assert outputs(graph, {**X, "c": np.array(True)})["y"].tolist() == [-11, -18]


def test_remove_dead_frees_what_only_a_dead_subgraph_read() -> None:
    graph = if_graph("y = Exp(x)")
    assert graph.remove_dead() == 2
    assert ops(graph) == ["Exp"]
    assert graph.constants() == {}
    assert graph.only_consumer(graph.tensors()["x"]) is not None


def test_remove_dead_keeps_what_a_live_subgraph_reads() -> None:
    graph = if_graph("y = Neg(i)")
    assert graph.remove_dead() == 0
    assert ops(graph) == ["Neg", "If", "Neg"]


def test_a_subgraph_may_return_an_outer_tensor() -> None:
    """ONNX forbids it, some exporters do it: the tensor is needed all the same."""
    graph = graph_of(
        """g (float[2] x, bool c) => (float[2] y) {
            a = Neg(x)
            y = If (c) <
                then_branch = yes () => (float[2] a) { unused = Exp(a) },
                else_branch = no () => (float[2] q) { q = Abs(x) }
            >
        }"""
    )
    assert graph.is_output(graph.tensors()["a"])
    assert graph.remove_dead() == 0
    graph.sort()
    assert ops(graph) == ["Neg", "If"]


def test_nested_subgraphs_read_through() -> None:
    graph = graph_of(
        """g (float[2] x, bool c) => (float[2] y) {
            y = If (c) <
                then_branch = yes () => (float[2] p) {
                    local = Exp(x)
                    p = If (c) <
                        then_branch = a () => (float[2] r) { r = Add(deep, local) },
                        else_branch = b () => (float[2] s) { s = Identity(local) }
                    >
                },
                else_branch = no () => (float[2] q) { q = Abs(x) }
            >
            deep = Neg(x)
        }"""
    )
    node = graph.nodes[-1]
    assert is_op(node, "If") and has_subgraph(node)
    assert set(reads(node)) == {"c", "x", "deep"}
    assert ops(graph) == ["Neg", "If"]  # sorted, although deep was written last


def test_remove_dead_does_not_mind_the_order_of_nodes() -> None:
    """Passes append what they make; a reader may stand before its input."""
    graph = graph_of(CHAIN)
    tensors = graph.tensors()
    made = graph.add("Neg", [tensors["x"]], ["late"]).outputs[0]
    graph.set_input(graph.nodes[1], 0, made)  # b = Abs(late)
    graph.replace_uses(tensors["b"], tensors["x"])
    assert graph.remove_dead() == 3
    assert ops(graph) == ["Exp"]


def test_set_constant_leaves_other_users_alone() -> None:
    graph = graph_of(
        """g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> {
            a = Mul(x, w) y = Add(a, w)
        }"""
    )
    mul, add = graph.nodes
    old = add.inputs[1]
    new = graph.set_constant(mul, 1, np.array([5, 5], np.float32))
    assert (add.inputs[1] is old, mul.inputs[1] is new) == (True, True)
    assert array(old).tolist() == [1, 2]
    assert run(graph) == [-4, 12]


def test_constants_keep_their_rank_and_their_own_values() -> None:
    graph = graph_of(CHAIN)
    for shape in ((), (1,), (2, 3)):
        values = np.ones(shape, np.float32).T
        made = graph.constant("c", values)
        assert array(made).shape == values.shape
        values *= 9
        assert (array(made) == 1).all()


def test_fresh_names_avoid_tensors_nodes_and_subgraphs() -> None:
    graph = if_graph("y = Neg(i)")
    taken = {*graph.tensors(), *(n.name for n in graph.nodes), "p", "q", "w"}
    made = [graph.fresh(name) for name in sorted(taken)]
    assert not taken & set(made)
    assert graph.fresh("new") == "new"
    assert [graph.fresh("new"), graph.fresh("new"), graph.fresh("")] == ["new_1", "new_2", "_1"]


def test_sort_is_stable_and_idempotent() -> None:
    graph = graph_of("g (float[2] x) => (float[2] y) { a = Neg(x) b = Abs(x) y = Add(b, a) }")
    assert ops(graph) == ["Neg", "Abs", "Add"]
    for place, op in enumerate(("Exp", "Sin")):
        late = graph.add(op, [graph.tensors()["x"]], [op])
        graph.set_input(graph.nodes[2], 1 - place, late.outputs[0])
    for _ in range(2):
        graph.sort()
        assert ops(graph) == ["Neg", "Abs", "Exp", "Sin", "Add"]


def test_a_cycle_is_a_model_error() -> None:
    graph = graph_of(CHAIN)
    graph.set_input(graph.nodes[0], 0, graph.tensors()["b"])
    with pytest.raises(ModelError, match=r"cycle through node '\w+:\w' \((Neg|Abs)\)"):
        graph.sort()


@pytest.mark.parametrize("backwards", [False, True])
def test_deep_chains(backwards: bool) -> None:
    count = 5000
    nodes = [onnx.helper.make_node("Neg", [f"t{i}"], [f"t{i + 1}"]) for i in range(count)]
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1])
        for name in ("t0", f"t{count}")
    ]
    proto = onnx.helper.make_graph(nodes[::-1] if backwards else nodes, "g", ends[:1], ends[1:])
    graph = from_proto(onnx.helper.make_model(proto, ir_version=8))
    assert shape_inference.infer(graph) == []
    assert [n.outputs[0].name for n in graph.nodes] == [f"t{i + 1}" for i in range(count)]
    assert graph.remove_dead() == 0
    assert len(load(serialize(graph)).nodes) == count


def test_optional_inputs_stay_in_place() -> None:
    graph = graph_of(CHAIN)
    top = graph.constant("top", np.array(1.5, np.float32))
    clip = graph.add("Clip", [graph.tensors()["x"], None, top], ["clipped"])
    graph.set_input(graph.nodes[0], 0, clip.outputs[0])
    assert list(reads(clip)) == ["x", "top"]
    check(graph, "CHECK: %clipped = Clip(%x, none, @top:f32[]=1.5)")
    assert run(graph) == pytest.approx([np.exp(1), np.exp(1.5)])


def test_consumers_count_uses() -> None:
    graph = graph_of("g (float[2] x) => (float[2] y) { a = Neg(x) y = Mul(a, a) }")
    a = graph.tensors()["a"]
    assert [n.op for n in graph.consumers(a)] == ["Mul", "Mul"]
    assert graph.only_consumer(a) is None
    assert graph.producer(graph.tensors()["x"]) is None


def test_contrib_operators_bring_their_domain() -> None:
    graph = graph_of(CHAIN)
    graph.add("Gelu", [graph.tensors()["x"]], ["gelu"], domain="com.microsoft")
    assert graph.domains() == {"": 17, "com.microsoft": 1}
    graph.import_domain("", 18)
    assert graph.opset == 18


def test_questions_about_tensors() -> None:
    graph = graph_of(
        """g (float[2] x) => (float[2] y) <float k = {2}, int64[1] n = {7}, float[2] v = {1, 2}> {
            s = SequenceConstruct(x) t = SequenceAt(s, n) u = Mul(t, k) y = Add(u, v)
        }"""
    )
    tensors = graph.tensors()
    assert [scalar(tensors[n]) for n in ("k", "n", "v", "x")] == [2, 7, None, None]
    assert [is_float(tensors[n]) for n in ("x", "k", "n", "s")] == [True, True, False, False]
    assert graph.find(graph.nodes[0].name) is graph.nodes[0]
    with pytest.raises(InvariantError, match="'gone' is not in the graph"):
        graph.find("gone")
