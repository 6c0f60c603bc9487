"""A body of an If, Loop or Scan as a graph of its own, opened and put back.

Opened, the outer tensors that it reads are its inputs too, and constants where they are constants
outside, so that passes edit it like any other graph. Put back, its large constants become those of
the graph around it: each is stored once, however many bodies read it, its data can be mapped, and
the report lists it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx

from qcompile.ir import (
    Constant,
    Graph,
    Node,
    Tensor,
    array,
    half_type,
    is_constant,
    is_op,
    shape_of,
)
from qcompile.ir.equal_constants import EqualConstants
from qcompile.ir.lazy_values import make_constant_like, nbytes
from qcompile.ir.model_io.from_proto import from_proto
from qcompile.ir.model_io.node_proto import element_type, fill_tensor
from qcompile.ir.model_io.to_proto import shell, typed
from qcompile.ir.subgraph import Subgraph, bodies

_LEAST = 1 << 10  # bytes of a constant that is stored outside
_WIDTH = 4  # bytes of an element, more or less
_COUNTED = 2  # first inputs of a Loop's body: the iteration and the condition


def outer_constants(graph: Graph) -> EqualConstants:
    """The constants of a graph for its bodies, so that each content is stored once."""
    known = EqualConstants(lambda _shape, _bytes: True)
    for constant in graph.constants().values():
        known.add(constant)
    return known


@dataclass(frozen=True)
class Body:
    """An opened body: ``graph`` is to be edited, ``outer`` is the graph around ``node``."""

    outer: Graph
    node: Node
    attribute: str
    graph: Graph

    @property
    def original(self) -> Subgraph:
        """The body as it is in the node."""
        body: Subgraph = self.node.attrs[self.attribute]
        return body

    def put_back(self, known: EqualConstants) -> dict[str, str]:
        """Replace the original body; returns new names of constants that became outer ones.

        ``known``: the outer graph's constants, to which these are added.
        """
        renamed = self._rename_retyped()
        renamed |= self._move_constants_out(known)
        renamed |= self._move_dequantizers_out()
        for inner in self.graph.nodes:
            for name, value in inner.attrs.items():
                if isinstance(value, Subgraph):
                    inner.attrs[name] = value.renamed(renamed)
        self.outer.replace_body(self.node, self.attribute, Subgraph(self._proto()))
        for domain, version in self.graph.domains().items():
            if domain not in self.outer.domains():
                self.outer.import_domain(domain, version)
        return renamed

    def _rename_retyped(self) -> dict[str, str]:
        """Give captured constants that have another type here names of their own (``retyped``)."""
        outer, renamed = self.outer.constants(), {}
        for name, constant in self.graph.constants().items():
            if name in outer and element_type(constant.dtype) != element_type(outer[name].dtype):
                constant.name = renamed[name] = self.outer.fresh(f"{name}/{constant.dtype}")
        return renamed

    def _move_constants_out(self, known: EqualConstants) -> dict[str, str]:
        with_weights = {t.name for n in self._dequantizers() for t in n.inputs}
        moved = [
            c
            for c in self._own_constants()
            if (_is_stored_outside(c) or c.name in with_weights)
            and not self.graph.is_output_of_graph(c)
        ]
        taken = self.outer.names_outside(self.original) if moved else set()
        renamed = {}
        for constant in moved:
            old = constant.name
            twin = known.find(array(constant))
            if twin is None:
                constant.name = self.outer.fresh(old) if old in taken else old
                twin = make_constant_like(constant)
                known.add(twin)
            constant.name = twin.name
            self.outer.add_hidden(twin)
            if constant.name != old:
                renamed[old] = constant.name
        return renamed

    def _move_dequantizers_out(self) -> dict[str, str]:
        """Dequantize outer constants outside, once for all bodies.

        ONNX Runtime fuses a DequantizeLinear with the MatMul that reads it, and fails where the
        weight is not a constant of the same graph (``TransposeDQWeightsForMatMulNBits``).
        """
        known, renamed = self.outer.constants(), {}
        for node in list(self._dequantizers()):
            out, operands = node.outputs[0], [t for t in node.inputs if t.name]
            if self.graph.is_output_of_graph(out) or any(t.name not in known for t in operands):
                continue
            twin = next((n for n in self.outer.nodes if _same_node(n, node)), None)
            if twin is None:
                inputs = [known[t.name] for t in operands]
                twin = self.outer.add(node.op, inputs, [out.name], node.attrs, like=out)
            renamed[out.name] = twin.outputs[0].name
            self.graph.remove(node)
            out.name = twin.outputs[0].name
        return renamed

    def _dequantizers(self) -> Iterator[Node]:
        """Those of weights of some size."""
        for node in self.graph.nodes:
            constant = is_op(node, "DequantizeLinear") and all(map(is_constant, node.inputs))
            if constant and _is_stored_outside(node.inputs[0]):
                yield node

    def _own_constants(self) -> Iterator[Constant]:
        reads = self.original.reads
        yield from (c for name, c in self.graph.constants().items() if name not in reads)

    def _proto(self) -> onnx.GraphProto:
        """The body as edited. Types of inner tensors are left out: the runtime infers them."""
        proto: onnx.GraphProto = shell(self.graph).graph
        outer = self.outer.tensors()
        for declared, original in (
            (proto.input, self.original.proto.input),
            (proto.output, self.original.proto.output),
        ):
            del declared[:]
            declared.extend(original)
        del proto.value_info[:]
        for constant in self._own_constants():
            if constant.name not in outer:
                fill_tensor(proto.initializer.add(), constant)
        return proto


def opened(outer: Graph) -> Iterator[Body]:
    """The bodies in a graph that hold or read weights, or bfloat16, which the CPU does not compute
    in; each is opened when its turn comes.

    Bodies inside these are found by opening the bodies of ``Body.graph``. Raises ModelError where a
    body is malformed.
    """
    wanted = {name for name, c in outer.constants().items() if _is_stored_outside(c)}
    wanted |= {name for name, t in outer.tensors().items() if half_type(t) == "bfloat16"}
    for node in outer.nodes:
        for attribute, body in list(node.attrs.items()):
            if not isinstance(body, Subgraph):
                continue
            if not wanted.isdisjoint(body.reads) or _holds_weights(body.proto):
                yield _open(outer, node, attribute)


def _holds_weights(graph: onnx.GraphProto) -> bool:
    """True where a body, or one in it, has a constant of some size."""
    values = (a.t for n in graph.node if n.op_type == "Constant" for a in n.attribute)
    tensors = (*graph.initializer, *values)
    if any(np.prod(t.dims, dtype=np.int64) * _WIDTH >= _LEAST for t in tensors):
        return True
    return any(_holds_weights(body) for node in graph.node for body in bodies(node))


def _open(outer: Graph, node: Node, attribute: str) -> Body:
    body: Subgraph = node.attrs[attribute]
    tensors = outer.tensors()
    captured = [tensors[name] for name in body.reads if name in tensors]
    imports = [onnx.helper.make_opsetid(d, v) for d, v in outer.domains().items()]
    model = onnx.ModelProto(ir_version=10, opset_import=imports, functions=outer.functions)
    model.graph.CopyFrom(body.proto)
    _declare_inputs(model.graph, node)
    model.graph.input.extend(typed(t, _symbols(t)) for t in captured)
    graph = from_proto(model)
    graph.keep = outer.keep
    graph.share_names(outer)
    inputs = {t.name: t for t in graph.inputs}
    for tensor in captured:
        if is_constant(tensor):
            graph.make_constant(inputs[tensor.name], tensor)
    return Body(outer, node, attribute, graph)


def _same_node(a: Node, b: Node) -> bool:
    """True for the same operator on tensors of the same names."""
    names = ([t.name for t in n.inputs if t.name] for n in (a, b))
    return (a.op, a.domain, a.attrs) == (b.op, b.domain, b.attrs) and next(names) == next(names)


def _is_stored_outside(constant: Constant) -> bool:
    """True for numbers that take some space; text has no bytes to compare."""
    is_text = element_type(constant.dtype) == onnx.TensorProto.STRING
    return not is_text and nbytes(constant) >= _LEAST


def _symbols(tensor: Tensor) -> set[str]:
    return {d for d in shape_of(tensor) or () if isinstance(d, str)}


def _declare_inputs(graph: onnx.GraphProto, node: Node) -> None:
    """Complete the types of the body's own inputs, as far as the node's operands show them.

    A Loop may change the shape of what it carries in each iteration, whatever its body declares.
    """
    loop = is_op(node, "Loop")
    for i, declared in enumerate(graph.input):
        operand = node.inputs[i] if i < len(node.inputs) else None
        kind = declared.type.tensor_type
        carried = not loop or i >= _COUNTED
        known = None if operand is None or operand.dtype is None else typed(operand, set())
        if carried and not declared.HasField("type") and known is not None:
            kind.elem_type = known.type.tensor_type.elem_type
        if loop and carried and declared.type.HasField("tensor_type"):
            for dim in kind.shape.dim:
                dim.Clear()
