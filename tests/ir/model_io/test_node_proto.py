"""What graphsurgeon would lose comes back as it was: attributes, subgraphs, functions."""

from __future__ import annotations

import gc

import numpy as np
import onnx.parser
import pytest
from onnx import AttributeProto, TypeProto, helper

from qcompile.ir.model_io.from_proto import from_proto
from qcompile.ir.model_io.node_proto import Empty, attribute_proto, element_type
from qcompile.ir.model_io.read_model import load
from qcompile.ir.model_io.to_proto import to_proto
from qcompile.ir.printer import dump, fingerprint
from qcompile.ir.subgraph import Subgraph
from qcompile.rewriting.testing import model_proto, outputs


def attributes() -> list[AttributeProto]:
    """One of each kind, and the forms that are easily lost."""
    tensor = helper.make_tensor("t", onnx.TensorProto.FLOAT, [2], [1, 2])
    sparse = helper.make_sparse_tensor(tensor, helper.make_tensor("i", 7, [2], [0, 3]), [5])
    typed = helper.make_sequence_type_proto(helper.make_tensor_type_proto(1, None))
    graph = helper.make_graph([], "empty", [], [])
    lists = [
        AttributeProto(name=f"empty_{kind}", type=kind)
        for kind in (AttributeProto.FLOATS, AttributeProto.INTS, AttributeProto.STRINGS)
    ]
    values = {
        "f": 1.1, "i": -3, "s": "text", "binary": b"\xff\x00", "fs": [0.5, 2.0], "is": [1, 2],
        "ss": ["a", "b"], "binaries": [b"a", b"\xff"], "t": tensor, "g": graph,
        "gs": [graph, graph], "ts": [tensor, tensor], "sparse": sparse, "type": typed,
        "types": [typed],
    }  # fmt: skip
    return [*lists, *(helper.make_attribute(k, v) for k, v in values.items())]


def test_attributes_of_every_kind_come_back() -> None:
    node = helper.make_node("Custom", ["x"], ["y"], name="n", domain="local")
    node.attribute.extend(attributes())
    x, y = (helper.make_tensor_value_info(n, 1, [2]) for n in "xy")
    model = helper.make_model(
        helper.make_graph([node], "g", [x], [y]),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("local", 1)],
    )
    expected = {a.name: a.SerializeToString(deterministic=True) for a in node.attribute}
    graph = load(model)
    assert isinstance(graph.nodes[0].attrs["g"], Subgraph)
    assert graph.nodes[0].attrs["empty_7"] == []
    (written,) = to_proto(graph).graph.node
    found = {a.name: a.SerializeToString(deterministic=True) for a in written.attribute}
    assert found == expected


def test_empty_lists_and_unknown_ones_by_hand() -> None:
    empty = Empty(AttributeProto.STRINGS)
    assert attribute_proto("a", empty) == AttributeProto(name="a", type=AttributeProto.STRINGS)
    with pytest.raises(ValueError, match="infer"):
        attribute_proto("a", [])


def test_subgraphs_stay_as_they_were() -> None:
    """Constants, unnamed nodes, declared types and doc strings inside of them included."""
    model = model_proto(
        """g (float[2] x, bool c) => (float[2] y) {
            y = If (c) <
                then_branch = t () => (optional(float[2]) p) {
                    k = Constant<value_ints=[0]>() p = Optional(x)
                },
                else_branch = e () => (optional(float[2]) q) { q = Optional<type = float[2]>() }
            >
        }"""
    )
    before = model.graph.node[0].attribute[0].g.SerializeToString(deterministic=True)
    graph = load(model)
    after = to_proto(graph).graph.node[0].attribute[0].g.SerializeToString(deterministic=True)
    assert after == before
    body = graph.nodes[0].attrs["then_branch"]
    assert (body.reads, body.names) == (("x",), {"k", "p", ""})


def test_a_changed_subgraph_shows_in_dump_and_fingerprint() -> None:
    body = "y = If (c) <b = t () => (float p) { p = %s(x) }>"
    text = f"g (float[2] x, bool c) => (float[2] y) {{ {body} }}"
    one, two = (from_proto(model_proto(text % op)) for op in ("Neg", "Abs"))
    assert dump(one) != dump(two)
    assert fingerprint(one) != fingerprint(two)


def test_functions_are_kept_and_run() -> None:
    model = model_proto(
        """g (float[2] x) => (float[2] y) { y = local.Twice<by: float = 3.0>(x) }
        <opset_import: ["": 21], domain: "local">
        Twice <by> (a) => (b) { k = Constant<value_float: float = @by>() b = Mul(a, k) }""",
        21,
    )
    before = [f.SerializeToString() for f in model.functions]
    graph = load(model)
    del model
    gc.collect()
    assert [f.SerializeToString() for f in to_proto(graph).functions] == before
    assert outputs(graph, {"x": np.ones(2, np.float32)})["y"].tolist() == [3, 3]


def test_overloads_and_metadata_of_nodes_are_kept() -> None:
    model = model_proto("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    node = model.graph.node[0]
    node.overload = "second"
    node.metadata_props.add(key="namespace", value="encoder.layer.0")
    (written,) = to_proto(load(model)).graph.node
    assert written.overload == "second"
    assert [(p.key, p.value) for p in written.metadata_props] == [("namespace", "encoder.layer.0")]


@pytest.mark.parametrize("kind", ["sequence", "optional", "map"])
def test_inputs_and_outputs_keep_types_that_are_no_tensors(kind: str) -> None:
    inner = helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, [2])
    types = {
        "sequence": helper.make_sequence_type_proto(inner),
        "optional": helper.make_optional_type_proto(inner),
        "map": TypeProto(map_type=TypeProto.Map(key_type=7, value_type=inner)),
    }
    x, y = (helper.make_value_info(n, types[kind], "documented") for n in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    written = to_proto(load(helper.make_model(graph))).graph
    assert (list(written.input), list(written.output)) == ([x], [y])


def test_element_types() -> None:
    assert element_type(np.float32) == element_type(np.dtype("f4")) == element_type(1) == 1
