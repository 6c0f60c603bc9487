"""Ranges that two execution providers calibrate, and how far rounding may take them apart.

The bound: both providers multiply in float32 (TF32 is off) and add K products in orders of their
own. Roundings, each of at most u = 2^-24, are taken as independent with mean 0. Then two sums of K
terms differ by at most w·u·sqrt(2K) of the size of their terms, but for one element in exp(w²/2)/2
(Higham and Mary, "A New Approach to Probabilistic Rounding Error Analysis", 2019): w = 8, one in
4e13. Errors of consecutive sums add like independent ones, and the norm of a layer keeps their
relative size, so that all sums of the model count together: w·u·sqrt(2·ΣK). An extremum moves by no
more than the values do. TF32 rounds factors to u = 2^-11, and so goes beyond the bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qcompile import Options, Recipe
from qcompile.compiler.stages.calibrate import calibrate
from qcompile.compiler.stages.options import Request
from qcompile.compiler.stages.pipelines import pipeline_of
from qcompile.compiler.stages.prepare import prepare
from qcompile.compiler.stages.rewrite import context_of, run_passes
from qcompile.data.feeds import Feed
from qcompile.ir import Graph, Node, is_op, shape_of
from qcompile.quant import Range, Ranges
from qcompile.runtime.providers import Choice

_WIDTH, _UNIT = 8, 2.0**-24
_ROWS = ("MatMul", "Gemm", "LayerNormalization", "Softmax", "ReduceMean", "ReduceSum")


@dataclass(frozen=True)
class Found:
    """Ranges of the tensors that were asked for, and the bound for this model and its feeds."""

    ranges: Ranges
    asked: frozenset[str]
    bound: float


@dataclass(frozen=True)
class Move:
    """How far an end of a tensor's range lies from the other's, over the largest magnitude."""

    tensor: str
    share: float


def calibrated(model: Path, feeds: Sequence[Feed], provider: Choice) -> Found:
    """Extrema of everything that target qdq quantizes. Raises QCompileError."""
    recipe = Recipe(target="qdq", mode="static", calibrator="minmax", general_text=False)
    prepared = prepare(
        Request(model, [*feeds], recipe, options=Options(provider=provider, threads=1))
    )
    ctx, pipeline = context_of(prepared), pipeline_of(prepared)
    run_passes(prepared, ctx, pipeline.planning, [], "simplify and plan")
    longest = max(max(value.shape, default=1) for feed in feeds for value in feed.values())
    bound = bound_of(prepared.graph, longest)
    calibrate(prepared, ctx, pipeline)
    return Found(ctx.ranges, frozenset(r.tensor for r in ctx.requests), bound)


def bound_of(graph: Graph, longest: int) -> float:
    """How far ranges may move, over their largest magnitude. ``longest``: size of open axes."""
    terms = sum(_terms(node, longest) for node in graph.nodes)
    return _WIDTH * _UNIT * math.sqrt(2 * terms)


def _terms(node: Node, longest: int) -> int:
    """How many terms an element of the result is the sum of; 0 for other operators."""
    if is_op(node, "Conv"):
        return math.prod(_size(n, longest) for n in (shape_of(node.inputs[1]) or ())[1:])
    if not is_op(node, *_ROWS):
        return 0
    shape: tuple[object, ...] = shape_of(node.inputs[0]) or (None,)
    return _size(shape[0 if node.attrs.get("transA") else -1], longest)


def _size(size: object, longest: int) -> int:
    return size if isinstance(size, int) else longest


def moves(one: Found, other: Found) -> list[Move]:
    """The largest first; infinite where only one provider gave a range."""
    found = []
    for tensor in sorted(one.asked & other.asked):
        pair = one.ranges.found.get(tensor), other.ranges.found.get(tensor)
        if pair != (None, None):
            found.append(Move(tensor, _share(*pair)))
    return sorted(found, key=lambda move: -move.share)


def _share(one: Range | None, other: Range | None) -> float:
    if one is None or other is None:
        return math.inf
    ends = [np.asarray(span, np.float64) for span in (one.lo, one.hi, other.lo, other.hi)]
    moved = max(np.abs(ends[0] - ends[2]).max(), np.abs(ends[1] - ends[3]).max())
    return float(moved / (max(np.abs(end).max() for end in ends) or 1.0))


def in_another_order(model: Path, out: Path) -> Path:
    """The same model with the sums of its linear layers in another order, to rehearse."""
    proto = onnx.load(model)
    constants = {t.name: t for t in proto.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in proto.graph.node:
        weight = constants.get(node.input[1]) if node.op_type == "MatMul" else None
        nodes += [node] if weight is None else _reordered(node, weight, proto.graph)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    onnx.save(proto, out)
    return out


def _reordered(
    node: onnx.NodeProto, weight: onnx.TensorProto, graph: onnx.GraphProto
) -> Iterator[onnx.NodeProto]:
    """A MatMul after a Gather that permutes the columns of its data, as the weight's rows are."""
    values, stem = numpy_helper.to_array(weight), node.output[0]
    order = np.random.default_rng(0).permutation(values.shape[-2])
    names = f"{stem}/order", f"{stem}/data", f"{stem}/weight"
    graph.initializer.extend(
        numpy_helper.from_array(array, name)
        for name, array in zip(names[::2], (order, values[..., order, :]), strict=True)
    )
    yield helper.make_node("Gather", [node.input[0], names[0]], [names[1]], axis=-1)
    changed = onnx.NodeProto()
    changed.CopyFrom(node)
    changed.input[:] = names[1:]
    yield changed
