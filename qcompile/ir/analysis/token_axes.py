"""Which tensors hold one row for each position of each sequence: [batch, sequence, channels].

ONNX inference loses the symbols of these two dimensions in shape arithmetic and knows nothing of
contrib operators, so here they are followed axis by axis from the attention mask, through the
operators of an encoder. An axis that comes from elsewhere is unknown, never guessed; where one
operand of a broadcast is known, so is the result.
"""

from __future__ import annotations

from qcompile.ir import Graph, Node, Tensor, array, is_constant, is_op, rank, shape_of
from qcompile.ir.analysis.data_path import MASK
from qcompile.ir.operators import ATTENTION, ELEMENTWISE, MATMULS, NORMALIZATIONS
from qcompile.ir.quantized_operators import QUANTIZED_MATMULS, QUANTIZERS, quantized_operator

BATCH, SEQUENCE = "batch", "sequence"
Axes = tuple[str | None, ...]

# Operators with a second operand that is multiplied, not broadcast.
PRODUCTS = (*MATMULS, *QUANTIZED_MATMULS)
POINTWISE = (*ELEMENTWISE, *QUANTIZERS)
# Operators whose result has the axes of the first operand, as long as the last alone changes.
_KEEPING = (*NORMALIZATIONS, *ATTENTION, "Softmax")


def axes(graph: Graph) -> dict[str, Axes]:
    """What is known of each tensor's axes, by name; tensors of which nothing is are left out."""
    mask = next((t for t in graph.inputs if t.name == MASK), None)
    if mask is None or rank(mask) != 2:
        return {}
    sizes = dict(zip(shape_of(mask) or (), (BATCH, SEQUENCE), strict=False))
    found: dict[str, Axes] = {}
    for tensor in graph.inputs:
        named = (d if isinstance(d, str) else None for d in shape_of(tensor) or ())
        found[tensor.name] = tuple(sizes.get(d) if d else None for d in named)
    found[MASK] = (BATCH, SEQUENCE)
    for node in graph.nodes:
        made = _axes(node, found)
        if made is not None and any(made):
            found[node.outputs[0].name] = made
    return found


def by_position(known: Axes | None) -> bool:
    """True for [batch, sequence, channels]."""
    return known is not None and len(known) == 3 and known[:2] == (BATCH, SEQUENCE)


def _axes(node: Node, found: dict[str, Axes]) -> Axes | None:
    """Axes of a node's first output, None where nothing is known."""
    operands = [found.get(t.name) for t in node.inputs]
    first = operands[0] if operands else None
    if is_op(node, *POINTWISE):
        return _broadcast([k for k in operands if k is not None])
    if is_op(node, "Gather"):
        return _looked_up(node, operands)
    if first is None:
        return None
    if is_op(node, *_KEEPING):
        return first
    if is_op(node, *PRODUCTS):
        return _product(node, first, found)
    if is_op(node, "Transpose") and len(node.attrs.get("perm", [])) == len(first):
        return tuple(first[i] for i in node.attrs["perm"])
    if is_op(node, "Reshape") and is_constant(node.inputs[1]) and not node.attrs.get("allowzero"):
        sizes = array(node.inputs[1]).tolist()
        copied = zip(sizes, range(len(sizes)), strict=True)
        return tuple(first[i] if s == 0 and i < len(first) else None for s, i in copied)
    if is_op(node, "Concat") and node.attrs.get("axis") in (-1, len(first) - 1):
        return first
    return None


def _broadcast(known: list[Axes]) -> Axes | None:
    if not known:
        return None
    longest = max(map(len, known))
    padded = [(None,) * (longest - len(k)) + k for k in known]
    return tuple(next((a for a in axis if a), None) for axis in zip(*padded, strict=True))


def _looked_up(node: Node, operands: list[Axes | None]) -> Axes | None:
    """Rows of a constant table by index, or constant channels of data."""
    table, indices = node.inputs[:2]
    axis = node.attrs.get("axis", 0)
    if is_constant(table) and operands[1] is not None and axis == 0:
        return (*operands[1], *(None,) * ((rank(table) or 1) - 1))
    data = operands[0]
    last = data is not None and axis in (-1, len(data) - 1)
    return data if last and is_constant(indices) and rank(indices) == 1 else None


def _product(node: Node, left: Axes, found: dict[str, Axes]) -> Axes | None:
    """Rows of the left operand, columns of the right."""
    right = found.get(_right(node).name)
    column = None
    if right is not None and len(right) > 1:
        column = right[-2] if node.attrs.get("transB") else right[-1]
    if node.attrs.get("transA") or any(k.startswith("transBatch") for k in node.attrs):
        return None
    return (*left[:-1], column)


def _right(node: Node) -> Tensor:
    row = quantized_operator(node)
    return node.inputs[1 if row is None else row.weights[0].value]
