"""Replaces values known at compile time by constants: of nodes, and fixed dimensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from qcompile.ir import Graph, Node, Refusal, Shape, Tensor, array, has_subgraph, is_constant, is_op
from qcompile.ir.analysis.prequantized import keeps_integers
from qcompile.ir.operators import RANDOM
from qcompile.ir.quantized_operators import QUANTIZERS
from qcompile.quant import Array

# Runs nodes that depend only on constants: returns their outputs by name, or a Refusal. The
# compiler passes it in, since passes and this module must not import the runtime.
Evaluator = Callable[[Graph, Sequence[Node]], dict[str, Array] | Refusal]

# Not evaluated: random operators, and quantizers, because a weight's DequantizeLinear must stay (so
# must the Cast of int8 weights). QuantizeLinear of a weight is evaluated: integers are smaller.
_KEPT = {*RANDOM, *QUANTIZERS, "Constant"}
_EVALUATED_INTEGERS = (np.int8, np.uint8, np.int16, np.uint16)


def evaluable(graph: Graph, accept: Callable[[Node], bool]) -> list[Node]:
    """Nodes that depend only on constants and that ``accept`` returns True for, in order."""
    known: set[str] = set()
    nodes = []
    for node in graph.nodes:
        kept = node.op in _KEPT and not _quantizes(node)
        if kept or not node.inputs or has_subgraph(node) or keeps_integers(node):
            continue
        if graph.is_custom(node):
            continue
        inputs = [t for t in node.inputs if t.name]
        if all(is_constant(t) or t.name in known for t in inputs) and accept(node):
            known |= {t.name for t in node.outputs}
            nodes.append(node)
    return nodes


def _quantizes(node: Node) -> bool:
    """True for a QuantizeLinear to integers that numpy has."""
    return is_op(node, "QuantizeLinear") and node.outputs[0].dtype in _EVALUATED_INTEGERS


def put_values(graph: Graph, nodes: Sequence[Node], values: dict[str, Array]) -> dict[str, str]:
    """Replace outputs of ``nodes`` by constants, but not graph outputs.

    Returns the names of the constants, by the names of the outputs.
    """
    names = {}
    for tensor in (t for n in nodes for t in n.outputs):
        if tensor.name in values and tensor.outputs and not graph.is_output(tensor):
            constant = graph.constant(f"{tensor.name}/folded", values[tensor.name])
            graph.replace_uses(tensor, constant)
            names[tensor.name] = constant.name
    return names


def fold_shape(graph: Graph, node: Node, shape: Shape | None) -> bool:
    """Replace a Shape node, or Gather and Slice after it, by constants where dimensions are fixed.

    Returns True where anything changed.
    """
    out = node.outputs[0]
    if shape is None or graph.is_output(out) or not out.outputs:
        return False
    dims = shape[slice(node.attrs.get("start", 0), node.attrs.get("end", len(shape)))]
    if all(isinstance(d, int) for d in dims):
        graph.replace_uses(out, graph.constant(f"{out.name}/dims", np.array(dims, np.int64)))
        return True
    changed = False
    for reader in graph.consumers(out):
        picked = _picked(reader, out, dims)
        if picked is not None and not graph.is_output(reader.outputs[0]):
            result = reader.outputs[0]
            graph.replace_uses(result, graph.constant(f"{result.name}/dims", picked))
            changed = True
    return changed


def _picked(reader: Node, dims_tensor: Tensor, dims: Shape) -> Array | None:
    """The dimensions that a Gather or Slice selects, int64; None unless all are fixed."""
    if not is_op(reader, "Gather", "Slice") or reader.inputs[0] is not dims_tensor:
        return None
    operands = [t for t in reader.inputs[1:] if t.name]
    if not operands or not all(is_constant(t) for t in operands):
        return None
    places = np.arange(len(dims))
    if is_op(reader, "Gather"):
        indices = array(operands[0])
        if not ((-len(dims) <= indices) & (indices < len(dims))).all():
            return None
        places = places[indices]
    elif len(reader.inputs) < 3 or any(t.name for t in reader.inputs[4:]):
        return None  # attributes of opset 9, or a step
    else:
        start, end = (array(t) for t in operands[:2])
        places = places[int(start.flat[0]) : int(end.flat[0])]
    values = [dims[i] for i in np.atleast_1d(places)]
    if not values or not all(isinstance(v, int) for v in values):
        return None
    return np.array(values, np.int64).reshape(np.shape(places))
