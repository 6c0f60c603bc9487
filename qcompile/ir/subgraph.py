"""The bodies of If, Loop and Scan: the outer tensors that they read, and their digest."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property

import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto


class Subgraph(gs.Graph):  # type: ignore[misc]  # graphsurgeon has no types
    """The body of an If, Loop or Scan as loaded; for graphsurgeon an empty graph.

    ``reads``: outer tensors that it reads or returns, in order. ``names``: every name inside it.
    """

    def __init__(self, proto: onnx.GraphProto) -> None:
        super().__init__()
        self.proto = proto
        self.reads = tuple(dict.fromkeys(outer_reads(proto)))
        self.names = frozenset(_names(proto))

    def renamed(self, names: Mapping[str, str]) -> Subgraph:
        """This body, reading outer tensors under other names; itself where it reads none."""
        wanted = {old: new for old, new in names.items() if old in self.reads}
        if not wanted:
            return self
        proto = onnx.GraphProto()
        proto.CopyFrom(self.proto)
        _rename_reads(proto, wanted)
        return Subgraph(proto)

    @cached_property
    def digest(self) -> str:
        """Short content hash: a subgraph never changes."""
        return digest(self.proto)


def subgraphs(node: gs.Node) -> Iterator[Subgraph]:
    """The bodies of an If, Loop or Scan, none for other nodes."""
    yield from (v for v in node.attrs.values() if isinstance(v, Subgraph))


def constant_bytes(body: onnx.GraphProto) -> Counter[str]:
    """Bytes of the initializers and Constant nodes in a body and in the bodies in it, by name."""
    sizes = Counter({t.name: _bytes(t) for t in body.initializer})
    for node in body.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                sizes[node.output[0]] += _bytes(attribute.t)
        for inner in bodies(node):
            sizes += constant_bytes(inner)
    return sizes


def element_types(graph: onnx.GraphProto) -> set[int]:
    """Types of constants and results of Cast in a graph and in its bodies."""
    found = {int(t.data_type) for t in graph.initializer}
    for node in graph.node:
        found |= {int(a.t.data_type) for a in node.attribute if a.type == AttributeProto.TENSOR}
        if node.op_type == "Cast":
            found |= {int(a.i) for a in node.attribute if a.name == "to"}
        for inner in bodies(node):
            found |= element_types(inner)
    return found


def _bytes(tensor: onnx.TensorProto) -> int:
    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return int(math.prod(tensor.dims) * kind.itemsize)


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
    """Names of the tensors that a graph defines itself."""
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


def _rename_reads(proto: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Rename outer tensors in place; a graph that defines such a name itself means its own."""
    own = _made_in(proto)
    wanted = {old: new for old, new in names.items() if old not in own}
    for node in proto.node:
        node.input[:] = [wanted.get(name, name) for name in node.input]
        for body in bodies(node):
            _rename_reads(body, wanted)


def _names(proto: onnx.GraphProto) -> Iterator[str]:
    yield from _made_in(proto)
    for node in proto.node:
        yield node.name
        for body in bodies(node):
            yield from _names(body)
