"""Writes an Einsum of two operands as a matrix multiplication.

    Einsum(x, K) {"abc,cde->abde"} + b   →   Reshape(MatMul(x, K') + b', [0, 0, d, e])
    Einsum(q, k) {"abcd,aecd->acbe"}     →   MatMul(Transpose(q), Transpose(k))

With one constant operand, whose axes are permuted and joined here, it is a linear layer; a bias
over the joined axes moves in front of the Reshape. With two activations it is a product of stacks
of matrices, as in attention. Transposes are those that ONNX Runtime's Einsum does inside. Shapes
are copied from the input (0) or those of the constant, so nothing is assumed about sizes.

Refuses equations that a matrix multiplication cannot express: an axis that repeats in one operand
(diagonal) or is summed in one operand alone, products without a summed axis, constants that are
stacks of matrices, and several axes at once where only one fits. Source: ONNX Einsum-12.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import numpy as np

from qcompile.ir import (
    Graph,
    Node,
    Refusal,
    Tensor,
    array,
    is_constant,
    is_float,
    is_op,
    rank,
    shape_of,
)
from qcompile.planning import Context
from qcompile.rewriting import NodeRewrite, Numerics, Stage

# Axes of a tensor, one label each: letters, and .0, .1, ... for those of an ellipsis, from the end.
Axes: TypeAlias = tuple[str, ...]
_TYPES = (np.float32, np.float16)


@dataclass(frozen=True)
class _Linear:
    """An Einsum of data and a constant; the constant's axes are ``joined`` + ``made``.

    kept: axes of the data alone. joined: axes that are summed. made: axes of the constant alone.
    """

    node: Node
    data: Tensor
    kernel: Tensor
    axes: tuple[Axes, Axes, Axes]
    kept: Axes
    joined: Axes
    made: Axes

    @property
    def permutation(self) -> tuple[tuple[int, ...], int]:
        """The order of the constant's axes that MatMul needs, and how many of them are summed."""
        kernel = self.axes[1]
        return tuple(kernel.index(a) for a in (*self.joined, *self.made)), len(self.joined)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The constant's sizes in that order."""
        return tuple(self.kernel.shape[i] for i in self.permutation[0])


@dataclass(frozen=True)
class _Product:
    """An Einsum of two activations as ``left`` times ``right``, with the axes they need to have.

    axes: of left, right and result as they are; ordered: as MatMul reads and writes them.
    """

    node: Node
    operands: tuple[Tensor, Tensor]
    axes: tuple[Axes, Axes, Axes]
    ordered: tuple[Axes, Axes, Axes]

    @property
    def transposes(self) -> int:
        """How many of the three tensors have another order."""
        return sum(a != b for a, b in zip(self.axes, self.ordered, strict=True))


@dataclass(frozen=True)
class EinsumToMatmul(NodeRewrite[_Linear | _Product]):
    """Write Einsum as MatMul where it is one."""

    name: ClassVar[str] = "einsum-to-matmul"
    stage: ClassVar[Stage] = Stage.SIMPLIFY
    numerics: ClassVar[Numerics] = Numerics.ROUNDING
    ops: ClassVar[tuple[str, ...]] = ("Einsum",)

    def match(self, graph: Graph, ctx: Context, node: Node) -> _Linear | _Product | Refusal | None:
        if len(node.inputs) != 2:
            return Refusal(f"it has {len(node.inputs)} operands, expected 2")
        if not any(is_float(node.inputs[0], t) for t in _TYPES):
            return Refusal("its operands are not known to be float32 or float16")
        axes = _axes(node)
        if isinstance(axes, Refusal):
            return axes
        refusal = _obstacle(node, axes)
        if refusal is not None:
            return refusal
        constants = [i for i, t in enumerate(node.inputs) if is_constant(t)]
        if len(constants) == 1:
            return _linear(node, axes, constants[0])
        return _product(node, axes)

    def rewrite(self, graph: Graph, ctx: Context, match: _Linear | _Product) -> None:
        if isinstance(match, _Product):
            _write_product(graph, match)
            return
        matrix = _matrix(graph, match)
        for node in _readers(graph, match.kernel):  # one matrix for all, not a copy for each
            it = match if node is match.node else self.match(graph, ctx, node)
            if isinstance(it, _Linear) and it.permutation == match.permutation:
                _write_linear(graph, it, matrix)
        graph.remove_dead()


# ---- what the equation says


def _axes(node: Node) -> tuple[Axes, Axes, Axes] | Refusal:
    """Axes of both operands and of the result."""
    left, arrow, right = str(node.attrs["equation"]).replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != 2:
        return Refusal(f"its equation has {len(terms)} terms, expected 2")
    operands = [_expanded(term, rank(t)) for term, t in zip(terms, node.inputs, strict=True)]
    for axes in operands:
        if axes is None:
            return Refusal("the rank of an operand with an ellipsis is not known, or does not fit")
    first, second = (axes or () for axes in operands)
    dots = max(([a for a in axes if a[0] == "."] for axes in (first, second)), key=len)
    if arrow:
        before, _, after = right.partition("...")
        result = (*before, *(dots if "..." in right else ()), *after)
    else:  # the ellipsis, then every letter that appears once, in alphabetical order
        counts = Counter(a for a in (*first, *second) if a[0] != ".")
        result = (*dots, *sorted(a for a, n in counts.items() if n == 1))
    return first, second, result


def _expanded(term: str, dims: int | None) -> Axes | None:
    """The axes of one term, None where its ellipsis stands for an unknown number of axes."""
    before, ellipsis, after = term.partition("...")
    if not ellipsis:
        return tuple(term) if dims is None or dims == len(term) else None
    more = -1 if dims is None else dims - len(before) - len(after)
    if more < 0:
        return None
    return (*before, *(f".{i}" for i in reversed(range(more))), *after)


def _obstacle(node: Node, axes: tuple[Axes, Axes, Axes]) -> Refusal | None:
    """Why no matrix multiplication computes it, None where one may."""
    first, second, result = axes
    if any(len(set(side)) < len(side) for side in axes):
        return Refusal("an axis repeats within one operand (a diagonal)")
    alone = set(first) ^ set(second)
    if not alone <= set(result):
        return Refusal("an axis is summed in one operand alone")
    summed = [a for a in first if a in second and a not in result]
    if not summed:
        return Refusal("no axis is summed: it is no matrix multiplication")
    sizes = [dict(zip(side, shape_of(t) or (), strict=False))
             for side, t in zip((first, second), node.inputs, strict=True)]  # fmt: skip
    for axis in summed:
        found = [size.get(axis) for size in sizes]
        if 1 in found and found != [1, 1]:
            return Refusal("a summed axis of size 1 may be broadcast, which MatMul does not")
    return None


def _linear(node: Node, axes: tuple[Axes, Axes, Axes], slot: int) -> _Linear | Refusal:
    data, kernel, result = axes[1 - slot], axes[slot], axes[2]
    if any(a in data and a in result for a in kernel):
        return Refusal("its constant is a stack of matrices, one for each slice of the data")
    kept = tuple(a for a in data if a not in kernel)
    joined = tuple(a for a in data if a in kernel)
    made = tuple(a for a in result if a in kernel)
    if not kept or not made:
        return Refusal("the data or the constant is only summed: it is no matrix multiplication")
    tensors = node.inputs[1 - slot], node.inputs[slot]
    return _Linear(node, *tensors, (data, kernel, result), kept, joined, made)


def _product(node: Node, axes: tuple[Axes, Axes, Axes]) -> _Product | Refusal:
    """The order of operands that needs fewer transposes."""
    first, second = node.inputs
    found = [
        it
        for a, b, ops in (
            (axes[0], axes[1], (first, second)),
            (axes[1], axes[0], (second, first)),
        )
        if (it := _ordered(node, ops, (a, b, axes[2]))) is not None
    ]
    if not found:
        return Refusal("several axes of both operands would have to be joined, or one has no rows")
    return min(found, key=lambda it: it.transposes)


def _ordered(
    node: Node, operands: tuple[Tensor, Tensor], axes: tuple[Axes, Axes, Axes]
) -> _Product | None:
    """Left [more, stack, rows, sum] by right [stack, sum, columns]; None where it does not fit."""
    left, right, result = axes
    summed = tuple(a for a in left if a in right and a not in result)
    stack = tuple(a for a in result if a in left and a in right)
    rows = tuple(a for a in result if a not in right)
    columns = tuple(a for a in result if a not in left)
    if len(summed) != 1 or len(columns) != 1 or not rows:
        return None
    ordered = (
        (*rows[:-1], *stack, rows[-1], *summed),
        (*stack, *summed, *columns),
        (*rows[:-1], *stack, rows[-1], *columns),
    )
    return _Product(node, operands, axes, ordered)


# ---- what is written instead


def _readers(graph: Graph, kernel: Tensor) -> list[Node]:
    """Einsums that read a constant, each once."""
    found = {id(n): n for n in graph.consumers(kernel) if is_op(n, "Einsum")}
    return list(found.values())


def _matrix(graph: Graph, it: _Linear) -> Tensor:
    """The constant as a matrix [summed, made]; the constant itself where it is one."""
    order, summed = it.permutation
    if order == (0, 1):
        return it.kernel
    values = array(it.kernel).transpose(order)
    width = int(np.prod(it.sizes[:summed], dtype=np.int64))
    return graph.constant(f"{it.kernel.name}/matrix", values.reshape(width, -1))


def _write_linear(graph: Graph, it: _Linear, matrix: Tensor) -> None:
    out, sizes = it.node.outputs[0], it.sizes[len(it.joined) :]
    data = _transposed(graph, it.data, it.axes[0], (*it.kept, *it.joined))
    if len(it.joined) > 1:
        data = _reshaped(graph, data, it.kept, (matrix.shape[0],))
    product = graph.add("MatMul", [data, matrix], [f"{out.name}/matmul"])
    graph.take_name(product, it.node)
    made, ordered = product.outputs[0], (*it.kept, *it.made)
    if len(it.made) > 1:
        add = graph.only_consumer(out, "Add") if ordered == it.axes[2] else None
        bias = None if add is None else _bias(graph, add, out, sizes)
        if add is not None and bias is not None:
            out = add.outputs[0]
            made = graph.add("Add", [made, bias], [f"{out.name}/joined"]).outputs[0]
        made = _reshaped(graph, made, it.kept, sizes)
    _replace(graph, out, _transposed(graph, made, ordered, it.axes[2]))


def _bias(graph: Graph, add: Node, out: Tensor, sizes: Sequence[int]) -> Tensor | None:
    """The constant that ``add`` adds, one value for each joined column; None for anything else."""
    other = next((t for t in add.inputs if t is not out), None)
    if other is None or not is_constant(other) or (rank(other) or 0) > len(sizes):
        return None
    values = array(other)
    if any(n not in (1, size) for n, size in zip(values.shape[::-1], sizes[::-1], strict=False)):
        return None
    return graph.constant(f"{other.name}/joined", np.broadcast_to(values, sizes).reshape(-1))


def _write_product(graph: Graph, it: _Product) -> None:
    out = it.node.outputs[0]
    operands = [
        _transposed(graph, t, axes, ordered)
        for t, axes, ordered in zip(it.operands, it.axes[:2], it.ordered[:2], strict=True)
    ]
    product = graph.add("MatMul", operands, [f"{out.name}/matmul"])
    graph.take_name(product, it.node)
    _replace(graph, out, _transposed(graph, product.outputs[0], it.ordered[2], it.axes[2]))


def _replace(graph: Graph, old: Tensor, new: Tensor) -> None:
    """Let readers read another tensor of the same type and shape, which the next match looks at."""
    new.dtype, new.shape = old.dtype, old.shape
    graph.replace_uses(old, new)


def _transposed(graph: Graph, tensor: Tensor, axes: Axes, wanted: Axes) -> Tensor:
    if axes == wanted:
        return tensor
    attrs = {"perm": [axes.index(a) for a in wanted]}
    return graph.add("Transpose", [tensor], [f"{tensor.name}/transposed"], attrs).outputs[0]


def _reshaped(graph: Graph, tensor: Tensor, kept: Axes, sizes: Sequence[int]) -> Tensor:
    """The leading axes as they are, the others of these sizes."""
    shape = graph.constant(f"{tensor.name}/shape", np.array([0] * len(kept) + [*sizes], np.int64))
    return graph.add("Reshape", [tensor, shape], [f"{tensor.name}/reshaped"]).outputs[0]
