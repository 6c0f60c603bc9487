"""What graphsurgeon would lose of an ONNX file, kept as it was read.

graphsurgeon drops the rarer kinds of attribute, forgets the type of an empty list, fails on strings
that are no text, and writes subgraphs anew without their optional, sequence and map types. Such
attributes are taken out of the nodes before it reads them and put back afterwards.
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
    """An empty list attribute, which remembers what it is a list of."""

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
    stored = stored_proto(constant)
    if stored is None:
        target.CopyFrom(onnx.numpy_helper.from_array(values_of(constant), constant.name))
        return
    target.CopyFrom(stored)
    target.name = constant.name
    if is_stored(constant):
        target.raw_data = values_of(constant).tobytes()


def element_type(dtype: Any) -> int:
    """ONNX's number for an element type, which graphsurgeon gives as numpy type or as number."""
    if isinstance(dtype, int):
        return dtype
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
