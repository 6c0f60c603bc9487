"""What graphsurgeon would lose of an ONNX file, kept as it was read.

graphsurgeon drops the rarer kinds of attribute, forgets the type of an empty list, fails on strings
that are no text, and writes subgraphs anew without their optional, sequence and map types. Such
attributes are taken out of the nodes before it reads them and put back afterwards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto

from qcompile.system.memory_map import FileValues

_LISTS = {
    AttributeProto.FLOATS: "floats", AttributeProto.INTS: "ints", AttributeProto.STRINGS: "strings"
}  # fmt: skip
_PLAIN = (AttributeProto.FLOAT, AttributeProto.INT, AttributeProto.TENSOR)


class Subgraph(gs.Graph):  # type: ignore[misc]  # graphsurgeon has no types
    """The body of an If, Loop or Scan as it was read; to graphsurgeon an empty graph.

    ``reads``: outer tensors that it reads or returns, in order. ``names``: every name inside it.
    """

    def __init__(self, proto: onnx.GraphProto) -> None:
        super().__init__()
        self.proto = proto
        self.reads = tuple(dict.fromkeys(outer_reads(proto)))
        self.names = frozenset(_names(proto))

    @cached_property
    def digest(self) -> str:
        """Short content hash: a subgraph never changes."""
        return digest(self.proto)


def subgraphs(node: gs.Node) -> Iterator[Subgraph]:
    """The bodies of an If, Loop or Scan, none for other nodes."""
    yield from (v for v in node.attrs.values() if isinstance(v, Subgraph))


class Empty(list[Any]):
    """An empty list attribute, which remembers what it is a list of."""

    def __init__(self, kind: AttributeProto.AttributeType) -> None:
        super().__init__()
        self.kind = kind


def digest(message: onnx.GraphProto | AttributeProto) -> str:
    """Short content hash of a message."""
    return hashlib.sha256(message.SerializeToString(deterministic=True)).hexdigest()[:6]


def bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The subgraphs of a node."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _made_in(proto: onnx.GraphProto) -> set[str]:
    """Names that a graph gives to tensors of its own."""
    own = {t.name for t in proto.input} | {t.name for t in proto.initializer}
    own |= {t.values.name for t in proto.sparse_initializer}
    return own | {name for n in proto.node for name in n.output}


def outer_reads(proto: onnx.GraphProto) -> Iterator[str]:
    """Names of outer tensors that a subgraph reads or returns."""
    own = _made_in(proto)
    for node in proto.node:
        inner = (name for body in bodies(node) for name in outer_reads(body))
        yield from (name for name in (*node.input, *inner) if name and name not in own)
    yield from (t.name for t in proto.output if t.name not in own)


def _names(proto: onnx.GraphProto) -> Iterator[str]:
    yield from _made_in(proto)
    for node in proto.node:
        yield node.name
        for body in bodies(node):
            yield from _names(body)


def take_out(nodes: Iterable[onnx.NodeProto]) -> list[list[AttributeProto]]:
    """Remove from each node the attributes that graphsurgeon cannot carry, and return them."""
    taken = []
    for node in nodes:
        others = [a for a in node.attribute if not _is_carried(a)]
        if others:
            carried = [a for a in node.attribute if _is_carried(a)]
            del node.attribute[:]
            node.attribute.extend(carried)
        taken.append(others)
    return taken


def _is_carried(attribute: AttributeProto) -> bool:
    if attribute.ref_attr_name or attribute.type == AttributeProto.UNDEFINED:
        return False
    if attribute.type == AttributeProto.STRING:
        return _is_text(attribute.s)
    if attribute.type in _LISTS:
        values = getattr(attribute, _LISTS[attribute.type])  # of its own type: a file may lie
        return len(values) > 0 and all(map(_is_text, attribute.strings))
    return attribute.type in _PLAIN


def _is_text(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def put_back(nodes: Sequence[gs.Node], taken: Sequence[Sequence[AttributeProto]]) -> None:
    """Give each node the attributes that ``take_out`` removed."""
    for node, attributes in zip(nodes, taken, strict=True):
        for attribute in attributes:
            node.attrs[attribute.name] = _value(attribute)


def _value(attribute: AttributeProto) -> Subgraph | Empty | AttributeProto:
    if attribute.type == AttributeProto.GRAPH:
        return Subgraph(attribute.g)
    if attribute.type in _LISTS and not attribute.strings:
        return Empty(attribute.type)
    return attribute


def attribute_proto(name: str, value: Any) -> AttributeProto:
    """The ONNX form of an attribute of a graphsurgeon node."""
    if isinstance(value, AttributeProto):
        return value
    made = AttributeProto(name=name)
    if isinstance(value, Subgraph):
        made.type = AttributeProto.GRAPH
        made.g.CopyFrom(value.proto)
    elif isinstance(value, gs.Constant):
        made.type = AttributeProto.TENSOR
        fill_tensor(made.t, value)
    elif isinstance(value, Empty):
        made.type = value.kind
    else:
        return onnx.helper.make_attribute(name, value)
    return made


def node_proto(node: gs.Node) -> onnx.NodeProto:
    """The ONNX form of a node."""
    made = onnx.NodeProto(op_type=node.op, name=node.name, domain=node.domain or "")
    made.input.extend(t.name for t in node.inputs)
    made.output.extend(t.name for t in node.outputs)
    made.attribute.extend(attribute_proto(k, v) for k, v in node.attrs.items())
    return made


def fill_tensor(target: onnx.TensorProto, constant: gs.Constant) -> None:
    """Write a constant; values that are still in the loaded file are copied from there."""
    values = constant._values
    if isinstance(values, gs.ir.tensor.LazyValues):
        target.CopyFrom(values.tensor)
        target.name = constant.name
        if isinstance(values, FileValues):
            target.raw_data = values.load().tobytes()
    else:
        target.CopyFrom(onnx.numpy_helper.from_array(np.asarray(values), constant.name))


def element_type(dtype: Any) -> int:
    """ONNX's number for an element type, which graphsurgeon gives as numpy type or as number."""
    if isinstance(dtype, int):
        return dtype
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
