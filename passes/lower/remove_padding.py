"""Skips padding: operators that handle each position separately run on real tokens only.

    x[B,S,H] → LayerNorm, linears, GELU, sums → y[B,S,H]
        →   x → rows where attention_mask → the same on [T,H] → rows back in their places

T is the number of real tokens in the batch. Attention needs the sequence: query, key and value are
unpacked before it, and its result is packed again. A position that is selected, such as the first
one for a classifier, is read from the packed rows directly. The positions are computed once from
the mask: NonZero gives the real positions, CumSum the packed row of each. A padded position gets
the row of the last real token before it; real positions do not depend on it, since attention masks
it.

Batches without padding pay for the copies, about one percent. Refuses models where another operator
reads across positions, where attention has no mask, or where shapes do not show which axes are
positions. Source: Effective Transformer (ByteDance 2020); ONNX Runtime's own RemovePadding runs
only on CUDA.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from qcompile.ir import Graph, Node, Refusal, Tensor, is_constant, is_op, rank, scalar, shape_of
from qcompile.ir.analysis.data_path import MASK, derived_from
from qcompile.ir.analysis.token_axes import POINTWISE, PRODUCTS, by_position, find_token_axes
from qcompile.ir.operators import ATTENTION, MASKING, NORMALIZATIONS
from qcompile.planning import Context
from qcompile.rewriting import Numerics, Pass, Stage

_SINCE = 11  # CumSum
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
        region = _Finder(graph).run()
        refusal = _obstacle(graph, mask, region)
        if refusal is not None:
            ctx.skip(graph.name, refusal.reason)
            return False
        if region.nodes:
            _apply(graph, mask, region)
        return bool(region.nodes)


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
        return Refusal(f"opset {graph.opset} has no CumSum, needs {_SINCE}")
    if np.dtype(mask.dtype).kind not in "biu":
        return Refusal(f"{MASK} is {np.dtype(mask.dtype)}: it may be additive")
    masks = derived_from(graph, MASK)
    for tensor in region.exits:
        if graph.in_subgraph(tensor):
            return Refusal(f"a subgraph reads {tensor.name!r}")
        inside = {id(n) for n in region.nodes}
        for reader in graph.consumers(tensor):
            if id(reader) not in inside:
                refusal = _mixes(graph, reader, masks)
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


@dataclass(frozen=True)
class _Places:
    """Tensors computed once from the mask, int64.

    ``real``: flat indices of real positions, (T,). ``row``: the packed row of each position,
    (B·S,). ``sizes``: [B, S]. ``shape``: [B, S, -1].
    """

    real: Tensor
    row: Tensor
    sizes: Tensor
    shape: Tensor


def _apply(graph: Graph, mask: Tensor, region: _Region) -> None:
    places = _places(graph, mask)
    inside = {id(n) for n in region.nodes}
    for tensor in region.entries:
        packed = _packed(graph, tensor, places)
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
            _restore(graph, node, out, inside, places)
        else:
            out.shape = None


def _places(graph: Graph, mask: Tensor) -> _Places:
    """Add the nodes that compute them. The first position counts as real, so that at least one
    exists where all positions are padding."""
    flat = _chain(graph, mask, "Cast", {"to": 9})  # bool: any value but 0 is real
    flat = _chain(graph, flat, "Reshape", {}, np.array([-1]))
    one = graph.constant(f"{_PREFIX}first", np.array([True]))
    rest = _chain(graph, flat, "Slice", {}, np.array([1]), np.array([2**31 - 1]))
    flat = graph.add("Concat", [one, rest], [f"{_PREFIX}flat"], {"axis": 0}).outputs[0]
    where = graph.add("NonZero", [flat], [f"{_PREFIX}where"], name=f"{_PREFIX}NonZero").outputs[0]
    real = _chain(graph, where, "Reshape", {}, np.array([-1]))
    count = _chain(graph, flat, "Cast", {"to": 7})
    count = _chain(graph, count, "CumSum", {}, np.array(0))
    row = _chain(graph, count, "Sub", {}, np.array(1))
    sizes = graph.add("Shape", [mask], [f"{_PREFIX}sizes"]).outputs[0]
    width = graph.constant(f"{_PREFIX}width", np.array([-1]))
    shape = graph.add("Concat", [sizes, width], [f"{_PREFIX}shape"], {"axis": 0}).outputs[0]
    for tensor in (real, row, shape, sizes, where):
        tensor.dtype = np.dtype(np.int64)
    return _Places(real, row, sizes, shape)


def _chain(graph: Graph, x: Tensor, op: str, attrs: dict[str, int], *operands: object) -> Tensor:
    inputs = [graph.constant(f"{_PREFIX}{op}", np.asarray(v, np.int64)) for v in operands]
    return graph.add(op, [x, *inputs], [f"{_PREFIX}{op}"], attrs).outputs[0]


def _packed(graph: Graph, tensor: Tensor, places: _Places) -> Tensor:
    """Rows of real positions, (T, channels)."""
    shape = shape_of(tensor)
    width = shape[-1] if shape and isinstance(shape[-1], int) else None
    flat = graph.constant(f"{_PREFIX}rows", np.array([-1, width if width else 0]))
    if width is None:  # the last of three dimensions, whatever it is
        flat = graph.constant(f"{_PREFIX}rows", np.array([0, -1]))
    rows = graph.add("Reshape", [tensor, flat], [f"{tensor.name}/rows"]).outputs[0]
    packed = graph.add("Gather", [rows, places.real], [f"{tensor.name}/real"], {"axis": 0})
    rows.dtype = packed.outputs[0].dtype = tensor.dtype
    result: Tensor = packed.outputs[0]
    return result


def _restore(graph: Graph, node: Node, out: Tensor, inside: Iterable[int], places: _Places) -> None:
    """Make a node's output packed; readers outside the region read an unpacked copy, ``out``."""
    readers = [r for r in graph.consumers(out) if id(r) in set(inside)]
    packed = graph.divert_output(node, "packed")
    for reader in readers:
        for i, tensor in enumerate(reader.inputs):
            if tensor is out:
                graph.set_input(reader, i, packed)
    for reader in [r for r in graph.consumers(out) if _selects_rows(r, out)]:
        _select(graph, reader, packed, places)
    if not graph.consumers(out) and not graph.is_output(out):
        return
    rows = graph.add("Gather", [packed, places.row], [f"{out.name}/rows"], {"axis": 0}).outputs[0]
    rows.dtype = out.dtype
    graph.add("Reshape", [rows, places.shape], [out])


def _selects_rows(node: Node, tensor: Tensor) -> bool:
    """True for a Gather of positions of [batch, sequence, channels], and a GatherND of one for each
    sample."""
    if is_op(node, "Gather"):
        return node.inputs[0] is tensor and node.attrs.get("axis", 0) == 1
    each = node.attrs.get("batch_dims", 0) == 1 and rank(node.inputs[1]) == 3
    return is_op(node, "GatherND") and node.inputs[0] is tensor and each


def _select(graph: Graph, node: Node, packed: Tensor, places: _Places) -> None:
    """Let a node's result be packed rows: of the positions that it selects so far."""
    grid = graph.add("Reshape", [places.row, places.sizes], [f"{_PREFIX}grid"]).outputs[0]
    attrs = {k: v for k, v in node.attrs.items() if k in ("axis", "batch_dims")}
    name = f"{node.outputs[0].name}/rows"
    rows = graph.add(node.op, [grid, node.inputs[1]], [name], attrs).outputs[0]
    grid.dtype = rows.dtype = np.dtype(np.int64)
    graph.substitute(node.outputs[0], "Gather", [packed, rows], "real", {"axis": 0})
    graph.remove(node)
