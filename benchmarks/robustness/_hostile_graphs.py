"""Hostile graphs: cyclic, too large, too deep, or with names that control a terminal."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper

from benchmarks.robustness._hostile_base import (
    ESCAPE,
    FLOAT,
    HUGE,
    hostile,
    linear,
    model_of,
    save,
    weight,
)


# ---- cyclic graphs
@hostile
def cycle(folder: Path) -> Path:
    nodes = [helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Relu", ["a"], ["b"])]
    nodes.append(helper.make_node("Add", ["a", "b"], ["y"]))
    return save(model_of(nodes), folder)


@hostile
def cycle_of_one(folder: Path) -> Path:
    return save(model_of([helper.make_node("Add", ["x", "y"], ["y"])]), folder)


@hostile
def cycle_through_a_body(folder: Path) -> Path:
    body = helper.make_graph(
        [helper.make_node("Relu", ["late"], ["inner"])],
        "b",
        [],
        [helper.make_tensor_value_info("inner", FLOAT, None)],
    )
    yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    nodes = [
        helper.make_node("If", ["yes"], ["early"], then_branch=body, else_branch=body),
        helper.make_node("Add", ["x", "early"], ["late"]),
        helper.make_node("Relu", ["late"], ["y"]),
    ]
    return save(model_of(nodes, [yes]), folder)


def _function(name: str, calls: list[str]) -> onnx.FunctionProto:
    names = ["a", *(f"t{i}" for i in range(len(calls)))]
    nodes = [
        helper.make_node(op, [names[i]], [names[i + 1]], domain="local")
        for i, op in enumerate(calls)
    ] or [helper.make_node("Relu", ["a"], ["t0"])]
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    return helper.make_function("local", name, ["a"], [nodes[-1].output[0]], nodes, imports)


@hostile
def function_calls_itself(folder: Path) -> Path:
    nodes = [helper.make_node("F", ["x"], ["y"], domain="local")]
    return save(model_of(nodes, functions=[_function("F", ["F"])]), folder)


@hostile
def functions_call_each_other(folder: Path) -> Path:
    nodes = [helper.make_node("F", ["x"], ["y"], domain="local")]
    both = [_function("F", ["G"]), _function("G", ["F"])]
    return save(model_of(nodes, functions=both), folder)


@hostile
def functions_multiply(folder: Path) -> Path:
    """Ten levels of ten calls each: 10^10 nodes once inlined."""
    last = 10
    made = [_function(f"F{i}", [f"F{i + 1}"] * 10) for i in range(last)]
    made.append(_function(f"F{last}", []))
    nodes = [helper.make_node("F0", ["x"], ["y"], domain="local")]
    return save(model_of(nodes, functions=made), folder)


@hostile
def function_defined_twice(folder: Path) -> Path:
    nodes = [helper.make_node("F", ["x"], ["y"], domain="local")]
    return save(model_of(nodes, functions=[_function("F", []), _function("F", [])]), folder)


# ---- bombs
@hostile
def bodies_nested_deep(folder: Path) -> Path:
    """As deep as protobuf allows."""
    return save(_nested(24), folder)


@hostile
def bodies_nested_deeper(folder: Path) -> Path:
    """Deeper than protobuf allows, so the bytes are composed here."""
    inner = b""
    for _ in range(2000):  # GraphProto{node{attribute{type: GRAPH, g: inner}}}
        attribute = _field(6, inner) + b"\xa0\x01\x05"
        inner = _field(1, _field(5, attribute))
    return _write(folder, _field(7, inner))


def _nested(depth: int) -> onnx.ModelProto:
    body = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["o0"])],
        "b",
        [],
        [helper.make_tensor_value_info("o0", FLOAT, None)],
    )
    for i in range(1, depth):
        node = helper.make_node("If", ["yes"], [f"o{i}"], then_branch=body, else_branch=body)
        if i > 8:  # only one branch from here on: two would give 2^depth bodies
            node = helper.make_node("If", ["yes"], [f"o{i}"], then_branch=body)
        outputs = [helper.make_tensor_value_info(f"o{i}", FLOAT, None)]
        body = helper.make_graph([node], "b", [], outputs)
    yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    node = helper.make_node("If", ["yes"], ["y"], then_branch=body, else_branch=body)
    return model_of([node], [yes])


def _field(number: int, data: bytes) -> bytes:
    """A length-delimited field of a protobuf message."""
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _write(folder: Path, data: bytes) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(data)
    return path


def _bomb(folder: Path, entry: bytes, count: int) -> Path:
    """A graph of one valid node and ``count`` copies of ``entry``."""
    node = helper.make_node("Relu", ["x"], ["y"]).SerializeToString()
    return _write(folder, _field(7, _field(1, node) + entry * count))


@hostile
def ten_million_empty_nodes(folder: Path) -> Path:
    return _bomb(folder, _field(1, b""), 10_000_000)


@hostile
def ten_million_empty_initializers(folder: Path) -> Path:
    return _bomb(folder, _field(5, b""), 10_000_000)


@hostile
def ten_million_empty_attributes(folder: Path) -> Path:
    return _bomb(folder, _field(1, _field(5, b"") * 10_000_000), 1)


@hostile
def ten_million_empty_inputs_of_a_node(folder: Path) -> Path:
    return _bomb(folder, _field(1, _field(1, b"") * 10_000_000), 1)


@hostile
def ten_million_dims(folder: Path) -> Path:
    return _bomb(folder, _field(5, _field(1, b"\x01" * 10_000_000)), 1)


@hostile
def ten_million_ints(folder: Path) -> Path:
    attribute = helper.make_attribute("axes", range(100)).SerializeToString()
    attribute += _field(8, b"\x01" * 10_000_000)
    return _bomb(folder, _field(1, _field(5, attribute)), 1)


@hostile
def ten_million_metadata(folder: Path) -> Path:
    node = helper.make_node("Relu", ["x"], ["y"]).SerializeToString()
    return _write(folder, _field(7, _field(1, node)) + _field(14, b"") * 10_000_000)


@hostile
def ten_million_unknown_fields(folder: Path) -> Path:
    return _write(folder, linear().SerializeToString() + _field(1000, b"") * 10_000_000)


@hostile
def types_nested_deep(folder: Path) -> Path:
    """sequence(sequence(… tensor)), as deep as protobuf allows."""
    kind = helper.make_tensor_type_proto(FLOAT, [1])
    for _ in range(40):
        kind = helper.make_sequence_type_proto(kind)
    model = linear()
    model.graph.input.append(helper.make_value_info("s", kind))
    return save(model, folder)


# ---- names
@hostile
def names_that_steer_a_terminal(folder: Path) -> Path:
    nodes = [helper.make_node("MatMul", ["x", ESCAPE], ["y"], name=ESCAPE)]
    return save(model_of(nodes, [weight(ESCAPE)]), folder)


@hostile
def operator_that_steers_a_terminal(folder: Path) -> Path:
    return save(model_of([helper.make_node(ESCAPE, ["x"], ["y"])]), folder)


@hostile
def missing_tensor_that_steers_a_terminal(folder: Path) -> Path:
    return save(model_of([helper.make_node("Add" + ESCAPE, ["x", ESCAPE], ["y"])]), folder)


@hostile
def domain_that_steers_a_terminal(folder: Path) -> Path:
    return save(model_of([helper.make_node("Relu", ["x"], ["y"], domain=ESCAPE)]), folder)


@hostile
def name_of_a_megabyte(folder: Path) -> Path:
    return save(model_of([helper.make_node("Foo", ["x", "n" * 1_000_000], ["y"])]), folder)


@hostile
def duplicate_names(folder: Path) -> Path:
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Relu", ["x"], ["y"])]
    return save(model_of(nodes), folder)


@hostile
def duplicate_attributes(folder: Path) -> Path:
    node = helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)
    node.attribute.extend(list(node.attribute))
    return save(model_of([node], [weight()]), folder)


# ---- versions and attributes
@hostile
def opset_2_40(folder: Path) -> Path:
    return save(
        model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], [weight()], opset=1 << 40), folder
    )


@hostile
def opset_negative(folder: Path) -> Path:
    return save(
        model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], [weight()], opset=-5), folder
    )


@hostile
def opset_zero(folder: Path) -> Path:
    return save(
        model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], [weight()], opset=0), folder
    )


@hostile
def ir_version_2_40(folder: Path) -> Path:
    model = linear()
    model.ir_version = 1 << 40
    return save(model, folder)


@hostile
def axis_2_60(folder: Path) -> Path:
    nodes = [helper.make_node("Softmax", ["x"], ["y"], axis=HUGE)]
    return save(model_of(nodes), folder)


@hostile
def perm_absurd(folder: Path) -> Path:
    nodes = [helper.make_node("Transpose", ["x"], ["y"], perm=[HUGE, -HUGE])]
    return save(model_of(nodes), folder)


@hostile
def attribute_of_the_wrong_kind(folder: Path) -> Path:
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm="wrong"),
        helper.make_node("Gemm", ["t", "w"], ["y"], alpha="x", transB=2.5),
    ]
    return save(model_of(nodes, [weight()]), folder)


@hostile
def node_without_outputs(folder: Path) -> Path:
    nodes = [helper.make_node("Relu", ["x"], []), helper.make_node("Relu", ["x"], ["y"])]
    return save(model_of(nodes), folder)


@hostile
def node_without_inputs(folder: Path) -> Path:
    nodes = [helper.make_node("MatMul", [], ["m"]), helper.make_node("Relu", ["x"], ["y"])]
    nodes.append(helper.make_node("Gemm", ["x"], ["g"]))
    nodes.append(helper.make_node("LayerNormalization", ["x"], ["l"]))
    return save(model_of(nodes), folder)


@hostile
def unknown_tensor_type(folder: Path) -> Path:
    model = linear()
    model.graph.initializer[0].data_type = 999
    return save(model, folder)


@hostile
def truncated(folder: Path) -> Path:
    return _write(folder, linear().SerializeToString()[:-40])


@hostile
def not_a_model(folder: Path) -> Path:
    return _write(folder, b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 64)


@hostile
def empty_file(folder: Path) -> Path:
    return _write(folder, b"")


@hostile
def chain_of_2_000_nodes(folder: Path) -> Path:
    """Deeper than Python's recursion limit, and harmless."""
    names = ["x", *(f"t{i}" for i in range(1999)), "y"]
    nodes = [helper.make_node("Neg", [names[i]], [names[i + 1]]) for i in range(2000)]
    return save(model_of(nodes), folder)
