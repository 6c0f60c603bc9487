"""Skips padding: operators that handle each position separately run on real tokens only.

    x[B,S,H] → LayerNorm, linears, GELU, sums → y[B,S,H]
        →   x → rows where attention_mask → the same on [T,H] → rows back in their places

T is the number of real tokens in the batch. Attention needs the sequence: query, key and value are
unpacked before it, and its result is packed again. A position that is selected, such as the first
one for a classifier, is read from the packed rows directly. The positions are computed once from
the mask: NonZero gives the real positions, CumSum the packed row of each. A padded position gets
the row of the last real token before it; real positions do not depend on it, since attention masks
it.

Pooling over positions reads the rows of real tokens (``planning/packed_pooling.py``), so nothing is
unpacked for it. The mask and what the first layer reads may have one row, or one position, for all:
both are used in the shape to which they are broadcast.

Batches without padding pay for the copies, about one percent. Refuses models where another operator
reads across positions, where attention has no mask, or where shapes do not show which axes are
positions. Source: Effective Transformer (ByteDance 2020); ONNX Runtime's own RemovePadding runs
only on CUDA.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from qcompile.ir import (
    Graph,
    Node,
    Refusal,
    Tensor,
    Variable,
    is_constant,
    is_op,
    rank,
    scalar,
    shape_of,
)
from qcompile.ir.analysis.data_path import MASK, derived_from
from qcompile.ir.analysis.token_axes import POINTWISE, PRODUCTS, by_position, find_token_axes
from qcompile.ir.graph import reads
from qcompile.ir.operators import ATTENTION, MASKING, NORMALIZATIONS
from qcompile.ir.pooling import reduced
from qcompile.planning import Context
from qcompile.planning.packed_pooling import Rows, pool_rows, poolings_of
from qcompile.rewriting import Numerics, Pass, Stage

_SINCE = 12  # Max of integers
_LINEAR = (
    "MatMul", "com.microsoft.DynamicQuantizeMatMul", "com.microsoft.MatMulIntegerToFloat",
    "com.microsoft.MatMulNBits",
)  # fmt: skip
_LAST_AXIS = (*NORMALIZATIONS, "Concat", "Gather")
_MOVERS = ("Reshape", "Transpose")


@dataclass(frozen=True)
class RemovePadding(Pass):
    """Run position-wise layers on real tokens only."""

    name: ClassVar[str] = "remove-padding"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.ROUNDING
    after: ClassVar[tuple[str, ...]] = (
        "lower-linears", "lower-products", "hoist-quantize", "fuse-requantize",
        "lower-weight-only", "unfuse-skip-layernorm", "fuse-key-transpose",
    )  # fmt: skip

    def run(self, graph: Graph, ctx: Context) -> bool:
        mask = next((t for t in graph.inputs if t.name == MASK), None)
        if mask is None:
            return False
        finder = _Finder(graph)
        region = finder.run()
        refusal = _obstacle(graph, mask, region)
        if refusal is not None:
            ctx.skip(graph.name, refusal.reason)
            return False
        if region.nodes:
            by_token = [t.name for t in graph.outputs if t.name in finder.tokens]
            if by_token:
                ctx.remarks["padding-skipped"] = _remark(by_token)
            _apply(graph, mask, region)
        return bool(region.nodes)


def _remark(outputs: list[str]) -> str:
    """What users of outputs with one row per token should know."""
    names = ", ".join(map(repr, outputs))
    return (
        f"padded positions are skipped: there, {names} repeats the last real token before, unlike "
        "in the float model. Ignore these positions by attention_mask, as pooling does, or compile "
        "with --keep-padding-rows"
    )


_PREFIX = "padding/"


@dataclass
class _Region:
    """Nodes that will process real tokens only, in order; ``entries`` and ``exits``: the tensors
    that they read from, and that they pass to, other nodes."""

    nodes: list[Node] = field(default_factory=list)
    entries: list[Tensor] = field(default_factory=list)
    exits: list[Tensor] = field(default_factory=list)


class _Finder:
    """Finds position-wise nodes by forward propagation from tensors [batch, sequence, …]."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.tokens = {name for name, known in find_token_axes(graph).items() if by_position(known)}

    def run(self) -> _Region:
        """All such nodes that are connected to a linear layer."""
        candidates = [
            n for n in self.graph.nodes if self._visit(n) and n.outputs[0].name in self.tokens
        ]
        nodes = _with_linears(candidates)
        inside = {id(n) for n in nodes}
        region = _Region(nodes)
        for node in nodes:
            for tensor in node.inputs:
                producer = self.graph.producer(tensor)
                packed = tensor.name in self.tokens
                if packed and (producer is None or id(producer) not in inside):
                    region.entries.append(tensor)
            for tensor in node.outputs:
                readers = self.graph.consumers(tensor)
                leaves = self.graph.is_output(tensor) or any(id(r) not in inside for r in readers)
                if tensor.name in self.tokens and leaves:
                    region.exits.append(tensor)
        region.entries = list({t.name: t for t in region.entries}.values())
        return region

    def _visit(self, node: Node) -> bool:
        """True where a node can work on packed rows: it handles each position separately."""
        data = [t for t in node.inputs if t.name in self.tokens]
        return bool(data) and self._is_positionwise(node, data)

    def _is_positionwise(self, node: Node, data: list[Tensor]) -> bool:
        others = [t for t in node.inputs if t.name and t.name not in self.tokens]
        if is_op(node, *_LINEAR):
            weight = node.inputs[1]
            return len(data) == 1 and data[0] is node.inputs[0] and is_constant(weight)
        if is_op(node, *_LAST_AXIS):
            axis = node.attrs.get("axis", -1 if not is_op(node, "Gather", "Concat") else 0)
            rows = data[0] is node.inputs[0] and all(is_constant(t) for t in others)
            return axis in (-1, 2) and rows
        per_axis = is_op(node, "QuantizeLinear", "DequantizeLinear") and any(
            (rank(t) or 0) > 0 and scalar(t) is None for t in others
        )
        small = all(rank(t) == 0 or (is_constant(t) and (rank(t) or 0) <= 1) for t in others)
        return is_op(node, *POINTWISE) and small and not per_axis


def _with_linears(nodes: list[Node]) -> list[Node]:
    """Nodes of the connected groups that contain a linear layer: others are not worth a copy."""
    group = {id(n): i for i, n in enumerate(nodes)}
    producers = {t.name: n for n in nodes for t in n.outputs}

    def merge(a: int, b: int) -> None:
        for key, value in group.items():
            if value == b:
                group[key] = a

    for node in nodes:
        for tensor in node.inputs:
            producer = producers.get(tensor.name)
            if producer is not None and group[id(producer)] != group[id(node)]:
                merge(group[id(producer)], group[id(node)])
    with_linear = {group[id(n)] for n in nodes if is_op(n, *_LINEAR)}
    return [n for n in nodes if group[id(n)] in with_linear]


def _obstacle(graph: Graph, mask: Tensor, region: _Region) -> Refusal | None:
    """Why the result at a real position might depend on padding, None where it cannot."""
    if not region.nodes:
        return None
    if graph.opset < _SINCE:
        return Refusal(f"opset {graph.opset} has no Max of integers, needs {_SINCE}")
    if np.dtype(mask.dtype).kind not in "biu":
        return Refusal(f"{MASK} is {np.dtype(mask.dtype)}: it may be additive")
    masks = derived_from(graph, MASK)
    for tensor in region.exits:
        if graph.in_subgraph(tensor):
            return Refusal(f"a subgraph reads {tensor.name!r}")
        inside = {id(n) for n in region.nodes}
        for reader in graph.consumers(tensor):
            if id(reader) not in inside:
                pooled = poolings_of(graph, tensor, reader)
                refusal = None if pooled else _mixes(graph, reader, masks)
                if refusal is not None:
                    return refusal
    for node in graph.nodes:
        if is_op(node, "Softmax") and _scores_without_mask(graph, node, masks):
            return Refusal(f"attention {node.name!r} has no mask")
    return None


def _mixes(graph: Graph, node: Node, masks: set[str]) -> Refusal | None:
    """Why a reader outside the region may mix positions; attention is checked for its mask."""
    masked = is_op(node, "Mul", "Where", *ATTENTION) and any(t.name in masks for t in node.inputs)
    if masked or is_op(node, *PRODUCTS):
        return None
    fixed = all(is_constant(t) for t in node.inputs[1:])
    if is_op(node, "GatherND") or (is_op(node, "Gather", "Slice") and fixed):
        return None  # selects positions
    if is_op(node, "Shape", "Size"):
        return None  # shapes do not change
    if not is_op(node, *_MOVERS, *POINTWISE):
        return Refusal(f"{node.op} {node.name!r} may read across positions")
    readers = (r for t in node.outputs for r in graph.consumers(t))
    return next((why for r in readers if (why := _mixes(graph, r, masks)) is not None), None)


def _scores_without_mask(graph: Graph, softmax: Node, masks: set[str]) -> bool:
    """True for a softmax over a product of activations without a mask in between."""
    waiting = [softmax.inputs[0]]
    masked = product = False
    while waiting:
        node = graph.producer(waiting.pop())
        if node is None:
            continue
        masked |= is_op(node, *MASKING) and any(t.name in masks for t in node.inputs)
        if is_op(node, *PRODUCTS):
            product |= not any(is_constant(t) and (rank(t) or 0) >= 2 for t in node.inputs)
        elif is_op(node, *POINTWISE, *_MOVERS):
            waiting += [t for t in node.inputs if t.name not in masks]
    return product and not masked


def _apply(graph: Graph, mask: Tensor, region: _Region) -> None:
    first = {t.name: _sizes(graph, t) for t in _first_entries(graph, region)}
    rows = _rows(graph, mask, _common_sizes(graph, [*first.values()] or [_sizes(graph, mask)]))
    width = graph.constant(f"{_PREFIX}width", np.array([-1]))
    shape = graph.add("Concat", [rows.sizes, width], [f"{_PREFIX}shape"], {"axis": 0}).outputs[0]
    inside = {id(n) for n in region.nodes}
    for tensor in region.entries:
        own = first.get(tensor.name)
        real = rows.real if own is None else _broadcast(graph, own, rows)
        packed = _packed(graph, tensor, real)
        for node in {id(n): n for n in graph.consumers(tensor) if id(n) in inside}.values():
            for i, t in enumerate(node.inputs):
                if t is tensor:
                    graph.set_input(node, i, packed)
    exits = {t.name for t in region.exits}
    for node in region.nodes:
        if is_op(node, *_LAST_AXIS) and "axis" in node.attrs:
            node.attrs["axis"] = -1
        out = node.outputs[0]
        if out.name in exits:
            packed = _divert(graph, node, inside, rows)
            if not graph.consumers(out) and not graph.is_output(out):
                continue
            spread = graph.add("Gather", [packed, rows.row], [f"{out.name}/rows"], {"axis": 0})
            spread.outputs[0].dtype = out.dtype
            graph.add("Reshape", [spread.outputs[0], shape], [out])
        else:
            out.shape = None
    graph.remove_dead()


def _first_entries(graph: Graph, region: _Region) -> list[Tensor]:
    """Entries that are not computed from what the region computes, such as embeddings.

    All others have the common shape already.
    """
    made = {t.name for n in region.nodes for t in n.outputs}
    for node in graph.nodes:
        if any(name in made for name in reads(node)):
            made |= {t.name for t in node.outputs}
    return [t for t in region.entries if t.name not in made]


def _common_sizes(graph: Graph, sizes: list[Tensor]) -> Tensor:
    """[batch, sequence] to which tensors of these first two sizes are broadcast.

    Max also hides from ONNX Runtime how the sizes are called: it takes equal names for equal sizes,
    and lets tensors of one such shape reuse the memory of another.
    """
    none = graph.constant(f"{_PREFIX}none", np.array([0, 0]))
    made: Tensor = graph.add("Max", [none, *sizes], [f"{_PREFIX}common"]).outputs[0]
    return made


def _sizes(graph: Graph, tensor: Tensor) -> Tensor:
    """The first two sizes of a tensor or of its shape."""
    shape = graph.add("Shape", [tensor], [f"{_PREFIX}shape"]).outputs[0]
    return _chain(graph, shape, "Slice", {}, np.array([0]), np.array([2]))


def _rows(graph: Graph, mask: Tensor, sizes: Tensor) -> Rows:
    """Add the nodes that compute them. The first position counts as real, so that at least one
    exists where all positions are padding; it belongs to no sentence then."""
    every = graph.add("Expand", [mask, sizes], [f"{_PREFIX}mask"]).outputs[0]
    marks = _chain(graph, every, "Cast", {"to": 9})  # bool: any value but 0 is real
    # More rows than the data: one row of it is for all of the mask's. More positions: an error.
    batch = _chain(graph, _sizes(graph, every), "Slice", {}, np.array([0]), np.array([1]))
    length = _chain(graph, sizes, "Slice", {}, np.array([1]), np.array([2]))
    sizes = graph.add("Concat", [batch, length], [f"{_PREFIX}sizes"], {"axis": 0}).outputs[0]
    flat = _chain(graph, marks, "Reshape", {}, np.array([-1]))
    one = graph.constant(f"{_PREFIX}first", np.array([True]))
    rest = _chain(graph, flat, "Slice", {}, np.array([1]), np.array([2**31 - 1]))
    flat = graph.add("Concat", [one, rest], [f"{_PREFIX}flat"], {"axis": 0}).outputs[0]
    where = graph.add("NonZero", [flat], [f"{_PREFIX}where"], name=f"{_PREFIX}NonZero").outputs[0]
    real = _chain(graph, where, "Reshape", {}, np.array([-1]))
    count = _chain(graph, flat, "Cast", {"to": 7})
    count = _chain(graph, count, "CumSum", {}, np.array(0))
    row = _chain(graph, count, "Sub", {}, np.array(1))
    starts, ends = _bounds(graph, marks, real)
    for tensor in (real, row, sizes, where, starts, ends):
        tensor.dtype = np.dtype(np.int64)
    return Rows(real, row, sizes, starts, ends)


def _bounds(graph: Graph, marks: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """First row of each sentence and the one after its last, (B, 1).

    Counted from the end: the first row belongs to no sentence if it is one of padding.
    """
    counts = _chain(graph, marks, "Cast", {"to": 7})
    counts = reduced(graph, "ReduceSum", counts, (1,), keepdims=1)
    after = _chain(graph, counts, "CumSum", {"reverse": 1, "exclusive": 1}, np.array(0))
    total = graph.add("Shape", [real], [f"{_PREFIX}total"]).outputs[0]
    ends = graph.add("Sub", [total, after], [f"{_PREFIX}ends"]).outputs[0]
    starts = graph.add("Sub", [ends, counts], [f"{_PREFIX}starts"]).outputs[0]
    return starts, ends


def _chain(graph: Graph, x: Tensor, op: str, attrs: dict[str, int], *operands: object) -> Tensor:
    inputs = [graph.constant(f"{_PREFIX}{op}", np.asarray(v, np.int64)) for v in operands]
    made: Tensor = graph.add(op, [x, *inputs], [f"{_PREFIX}{op}"], attrs).outputs[0]
    return made


def _broadcast(graph: Graph, own: Tensor, rows: Rows) -> Tensor:
    """Which rows of a tensor are those of real positions, where one may be for several, (T,).

    ``own``: its first two sizes.
    """
    count = _chain(graph, own, "ReduceProd", {"keepdims": 0})
    ends = [graph.constant(f"{_PREFIX}{v}", np.array(v)) for v in (0, 1)]
    every = graph.add("Range", [ends[0], count, ends[1]], [f"{_PREFIX}Range"]).outputs[0]
    places = graph.add("Reshape", [every, own], [f"{_PREFIX}places"]).outputs[0]
    spread = graph.add("Expand", [places, rows.sizes], [f"{_PREFIX}spread"]).outputs[0]
    flat = _chain(graph, spread, "Reshape", {}, np.array([-1]))
    found: Tensor = graph.add("Gather", [flat, rows.real], [f"{_PREFIX}rows"]).outputs[0]
    return found


def _packed(graph: Graph, tensor: Tensor, real: Tensor) -> Tensor:
    """Rows of real positions, (T, channels)."""
    shape = shape_of(tensor)
    width = shape[-1] if shape and isinstance(shape[-1], int) else None
    flat = graph.constant(f"{_PREFIX}rows", np.array([-1, width if width else 0]))
    if width is None:  # the last of three dimensions, whatever it is
        flat = graph.constant(f"{_PREFIX}rows", np.array([0, -1]))
    rows = graph.add("Reshape", [tensor, flat], [f"{tensor.name}/rows"]).outputs[0]
    packed = graph.add("Gather", [rows, real], [f"{tensor.name}/real"], {"axis": 0})
    rows.dtype = packed.outputs[0].dtype = tensor.dtype
    result: Tensor = packed.outputs[0]
    return result


def _divert(graph: Graph, node: Node, inside: set[int], rows: Rows) -> Variable:
    """Make a node's output packed, and let all readers use it that can.

    They are in the region, pool over positions, or want to know the shape. Others keep the tensor.
    """
    out = node.outputs[0]
    readers = {id(r): r for r in graph.consumers(out)}.values()
    outer = [r for r in readers if id(r) not in inside]
    poolings = [p for r in outer for p in poolings_of(graph, out, r)]
    packed = graph.divert_output(node, "packed")
    for pooling in poolings:
        pool_rows(graph, pooling, packed, rows)
    for reader in outer:
        if is_op(reader, "Shape") and not reader.attrs:
            channels = graph.add("Shape", [packed], [f"{_PREFIX}packed"]).outputs[0]
            channels = _chain(graph, channels, "Slice", {}, np.array([1]), np.array([2]))
            inputs = [rows.sizes, channels]
            graph.substitute(reader.outputs[0], "Concat", inputs, "sizes", {"axis": 0})
    for reader in (r for r in readers if id(r) in inside):
        for i, tensor in enumerate(reader.inputs):
            if tensor is out:
                graph.set_input(reader, i, packed)
    for reader in [r for r in graph.consumers(out) if _selects_rows(r, out)]:
        _select(graph, reader, packed, rows)
    return packed


def _selects_rows(node: Node, tensor: Tensor) -> bool:
    """True for a Gather of positions of [batch, sequence, channels], and for a GatherND of some for
    each sample: indices [batch, …, 1]."""
    if not is_op(node, "Gather", "GatherND") or node.inputs[0] is not tensor:
        return False
    if is_op(node, "Gather"):
        return bool(node.attrs.get("axis", 0) == 1)
    known = shape_of(node.inputs[1]) or ()
    return node.attrs.get("batch_dims", 0) == 1 and len(known) > 1 and known[-1] == 1


def _select(graph: Graph, node: Node, packed: Tensor, rows: Rows) -> None:
    """Let a node's result be packed rows: of the positions that it selects so far."""
    grid = graph.add("Reshape", [rows.row, rows.sizes], [f"{_PREFIX}grid"]).outputs[0]
    attrs = {k: v for k, v in node.attrs.items() if k in ("axis", "batch_dims")}
    name = f"{node.outputs[0].name}/rows"
    chosen = graph.add(node.op, [grid, node.inputs[1]], [name], attrs).outputs[0]
    grid.dtype = chosen.dtype = np.dtype(np.int64)
    graph.substitute(node.outputs[0], "Gather", [packed, chosen], "real", {"axis": 0})
    graph.remove(node)
