"""A deterministic, readable dump of a graph, and a cheap fingerprint that detects edits.

    graph g(%x: f32[N,4]) -> (%y) opset=17
      %q = QuantizeLinear(%x, @s:f32[]=0.05, @z:u8[]=3)
      %y = MatMul(%q, @w:f32[4,4]#58dda3)

Scalars are printed, arrays shown as type, shape and content hash. Attributes are sorted. Producer
and version are omitted, so that the text depends only on what the graph computes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from qcompile.ir.graph import Graph
from qcompile.ir.subgraph import Subgraph, digest
from qcompile.ir.tensor import Node, Tensor, array, is_constant, shape_of

_SHORT = {"float": "f", "int": "i", "uint": "u", "bool": "bool", "complex": "c"}


def dump(graph: Graph) -> str:
    """The graph as text, one node per line, in topological order."""
    inputs = ", ".join(f"%{t.name}: {_type(t)}" for t in graph.inputs)
    outputs = ", ".join(f"%{t.name}" for t in graph.outputs)
    head = f"graph {graph.name}({inputs}) -> ({outputs}) opset={graph.opset}"
    return "\n".join([head, *(f"  {_line(n)}" for n in graph.nodes)]) + "\n"


def _line(node: Node) -> str:
    results = ", ".join(f"%{t.name}" for t in node.outputs)
    operands = ", ".join(_operand(t) for t in node.inputs)
    attrs = ", ".join(f"{k}={_attribute(v)}" for k, v in sorted(node.attrs.items()))
    domain = f"{node.domain}." if node.domain else ""
    return f"{results} = {domain}{node.op}({operands})" + (f" {{{attrs}}}" if attrs else "")


def _operand(tensor: Tensor) -> str:
    if not tensor.name:
        return "none"
    if not is_constant(tensor):
        return f"%{tensor.name}"
    head = f"@{tensor.name}:{_type(tensor)}"
    values = array(tensor)
    if values.ndim == 0:
        return f"{head}={values.item()!r}"
    if values.size <= 8 and values.dtype.kind in "iub":
        return f"{head}={values.tolist()}"
    text = values.dtype.kind in "OUS"  # of object arrays, bytes are addresses
    data = repr(values.tolist()).encode() if text else np.ascontiguousarray(values).tobytes()
    return f"{head}#{hashlib.sha256(data).hexdigest()[:6]}"


def _type(tensor: Tensor) -> str:
    try:
        full = np.dtype(tensor.dtype).name
        kind = full.rstrip("0123456789")
        name = _SHORT[kind] + full[len(kind) :]
    except (TypeError, KeyError):
        name = "?"
    shape = shape_of(tensor)
    return f"{name}[{'?' if shape is None else ','.join(str(d) for d in shape)}]"


def _attribute(value: Any) -> str:
    if isinstance(value, Subgraph):
        return f"<graph of {len(value.proto.node)} nodes>#{value.digest}"
    if isinstance(value, onnx.AttributeProto):
        return f"<attribute>#{digest(value)}"
    if isinstance(value, gs.Tensor):
        return _operand(value)
    return f"{value:.9g}" if isinstance(value, float) else repr(value)


def fingerprint(graph: Graph) -> int:
    """A hash that changes with any edit made through Graph; it differs between processes.

    Of constants only names and types count: values never change in place, and new ones get fresh
    names.
    """
    return hash(_rows(graph))


def structure(graph: Graph) -> str:
    """Hex digest of what ``fingerprint`` covers, the same in every process."""
    return hashlib.sha256(repr(_rows(graph)).encode()).hexdigest()


def _rows(graph: Graph) -> tuple[Hashable, ...]:
    rows: list[Hashable] = [
        (
            node.op,
            node.domain,
            node.name,
            tuple((t.name, str(t.dtype)) if is_constant(t) else t.name for t in node.inputs),
            tuple(t.name for t in node.outputs),
            repr([(k, _attribute(v)) for k, v in sorted(node.attrs.items())]),
        )
        for node in graph.nodes
    ]
    rows.append(tuple(t.name for t in (*graph.inputs, *graph.outputs)))
    rows.append(tuple(sorted(graph.domains().items())))
    return tuple(rows)
