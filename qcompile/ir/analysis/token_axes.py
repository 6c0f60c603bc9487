"""Which tensors have one row per position of each sequence: [batch, sequence, channels].

ONNX inference loses the symbols of these two dimensions in shape arithmetic and knows nothing of
contrib operators, so there are two ways to find them, both from the attention mask: see
``find_token_axes``. Any other axis is unknown, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from qcompile.ir import Graph, Node, Shape, Tensor, array, is_constant, is_op, rank, shape_of
from qcompile.ir.analysis.data_path import MASK
from qcompile.ir.operators import ATTENTION, ELEMENTWISE, MATMULS, NORMALIZATIONS
from qcompile.ir.quantized_operators import QUANTIZED_MATMULS, QUANTIZERS, quantized_operator

BATCH, SEQUENCE = "batch", "sequence"
TOKENS = "tokens"  # batch and sequence in one axis
Axes: TypeAlias = tuple[str | None, ...]
# Returns shapes by tensor name, one mapping per probe (size of the graph's inputs).
Probe: TypeAlias = Callable[[], Sequence[Mapping[str, Shape]]]
FLAT = -1  # result of ``token_axis`` where batch and sequence are one axis, the first

# Matrix multiplications: the second operand is not broadcast elementwise.
PRODUCTS = (*MATMULS, *QUANTIZED_MATMULS)
POINTWISE = (*ELEMENTWISE, *QUANTIZERS)
# Operators whose result has the axes of the first operand, except for the last.
_KEEPING = (*NORMALIZATIONS, *ATTENTION, "Softmax")


def find_token_axes(graph: Graph, probe: Probe | None = None) -> dict[str, Axes]:
    """What is known of each tensor's axes, by name; tensors without a known axis are left out.

    Without ``probe`` the mask's axes are propagated from operator to operator, also contrib
    operators: for graphs that are being lowered. With it, an axis is known where its size agrees
    with the mask's in every probe, whatever shape arithmetic a reshape uses: for the float model in
    standard operators, as calibration runs it. Then batch and sequence may be one axis, ``TOKENS``.
    """
    mask = next((t for t in graph.inputs if t.name == MASK), None)
    if mask is None or rank(mask) != 2:
        return {}
    return _followed(graph, mask) if probe is None else _observed(probe())


def by_position(known: Axes | None) -> bool:
    """True for [batch, sequence, channels]."""
    return known is not None and len(known) == 3 and known[:2] == (BATCH, SEQUENCE)


def token_axis(known: Axes | None) -> int | None:
    """The axis with one entry per token: ``FLAT``, or one between the batch and the channels.

    None where the first axis is neither the batch nor all tokens, or no other is the sequence.
    """
    if not known or known[0] not in (BATCH, TOKENS):
        return None
    if known[0] == TOKENS:
        return FLAT
    return known.index(SEQUENCE, 1, -1) if SEQUENCE in known[1:-1] else None


# ---- by sizes


def _observed(probes: Sequence[Mapping[str, Shape]]) -> dict[str, Axes]:
    masks = [p.get(MASK) or () for p in probes]
    if not all(masks):
        return {}
    sizes = [{BATCH: m[0], SEQUENCE: m[1], TOKENS: _product_of(m)} for m in masks]
    found = {}
    for name in probes[0]:
        shapes = [shape for p in probes if (shape := p.get(name))]
        if len(shapes) == len(probes):
            found[name] = _agreeing(shapes, sizes)
    return {name: known for name, known in found.items() if any(known)}


def _agreeing(shapes: Sequence[Shape], sizes: Sequence[Mapping[str, object]]) -> Axes:
    """Axes of one tensor whose size is that of batch, sequence or both in every probe."""

    def named(axis: int) -> str | None:
        for name in (TOKENS, BATCH) if axis == 0 else (SEQUENCE,):
            if all(s[axis] == of[name] for s, of in zip(shapes, sizes, strict=True)):
                return name
        return None

    return tuple(named(axis) for axis in range(min(map(len, shapes))))


def _product_of(shape: Shape) -> int:
    return int(np.prod([d if isinstance(d, int) else -1 for d in shape], dtype=np.int64))


# ---- by operators


def _followed(graph: Graph, mask: Tensor) -> dict[str, Axes]:
    """Propagate the mask's axes through all nodes."""
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


def _axes(node: Node, found: dict[str, Axes]) -> Axes | None:
    """Axes of a node's first output, None where nothing is known."""
    operands = [found.get(t.name) for t in node.inputs]
    first = operands[0] if operands else None
    if is_op(node, *POINTWISE):
        return _broadcast([k for k in operands if k is not None])
    if is_op(node, "Gather"):
        return _looked_up(node, operands)
    if is_op(node, "com.microsoft.GatherBlockQuantized") and node.attrs.get("gather_axis", 0) == 0:
        rows = operands[1]
        return None if rows is None else (*rows, None)
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
    """Axes of rows looked up in a constant table, or of constant channels of data."""
    table, indices = node.inputs[:2]
    axis = node.attrs.get("axis", 0)
    if is_constant(table) and operands[1] is not None and axis == 0:
        return (*operands[1], *(None,) * ((rank(table) or 1) - 1))
    data = operands[0]
    last = data is not None and axis in (-1, len(data) - 1)
    return data if last and is_constant(indices) and rank(indices) == 1 else None


def _product(node: Node, left: Axes, found: dict[str, Axes]) -> Axes | None:
    """Axes of a matrix multiplication: rows of the left operand, columns of the right."""
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
