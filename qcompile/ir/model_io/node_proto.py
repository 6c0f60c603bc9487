"""Keeps attributes that graphsurgeon would lose, and converts its nodes to ONNX.

graphsurgeon drops rare kinds of attributes, forgets the type of an empty list, fails on strings
that are not text, and rebuilds subgraphs without their optional, sequence and map types. Such
attributes are removed from the nodes before it reads them and restored afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto

from qcompile.ir.lazy_values import is_stored, stored_proto, values_of
from qcompile.ir.subgraph import Subgraph

_LISTS = {
    AttributeProto.FLOATS: "floats", AttributeProto.INTS: "ints", AttributeProto.STRINGS: "strings"
}  # fmt: skip
_PLAIN = (AttributeProto.FLOAT, AttributeProto.INT, AttributeProto.TENSOR)


class Empty(list[Any]):
    """An empty list attribute that keeps the type of its items."""

    def __init__(self, kind: AttributeProto.AttributeType) -> None:
        super().__init__()
        self.kind = kind


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
        values = getattr(
            attribute, _LISTS[attribute.type]
        )  # a file may fill the list of another type
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
    """An attribute of a graphsurgeon node as AttributeProto."""
    if isinstance(value, AttributeProto):
        return value
    attribute = AttributeProto(name=name)
    if isinstance(value, Subgraph):
        attribute.type = AttributeProto.GRAPH
        attribute.g.CopyFrom(value.proto)
    elif isinstance(value, gs.Constant):
        attribute.type = AttributeProto.TENSOR
        fill_tensor(attribute.t, value)
    elif isinstance(value, Empty):
        attribute.type = value.kind
    else:
        return onnx.helper.make_attribute(name, value)
    return attribute


def node_proto(node: gs.Node) -> onnx.NodeProto:
    """A graphsurgeon node as NodeProto."""
    proto = onnx.NodeProto(op_type=node.op, name=node.name, domain=node.domain or "")
    proto.input.extend(t.name for t in node.inputs)
    proto.output.extend(t.name for t in node.outputs)
    proto.attribute.extend(attribute_proto(k, v) for k, v in node.attrs.items())
    return proto


def fill_tensor(target: onnx.TensorProto, constant: gs.Constant) -> None:
    """Write a constant into ``target``; values in the loaded file are copied from there."""
    stored = stored_proto(constant)
    if stored is None:
        target.CopyFrom(onnx.numpy_helper.from_array(values_of(constant), constant.name))
        return
    target.CopyFrom(stored)
    target.name = constant.name
    if is_stored(constant):
        target.raw_data = onnx.numpy_helper.from_array(values_of(constant)).raw_data


def element_type(dtype: Any) -> int:
    """ONNX's number of an element type, which in graphsurgeon is a numpy type or that number."""
    if isinstance(dtype, int):
        return dtype
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
