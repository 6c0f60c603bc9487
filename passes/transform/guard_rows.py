"""Leaves what a normalization reads float where small rows would drown in the steps of large ones.

    class token in ±0.1, patches in ±4:  LayerNormalization(DQ(x))  →  LayerNormalization(x)

A normalization divides each row by its own size, so rounding counts relative to the row, not to the
tensor. With steps s_c for the channels c, the noise of a row is Σ s_c² / 12, and it keeps

    SQNR = 10 · log10(Σ (x_c - mean)² / (Σ s_c² / 12)) dB

Scales differ by channel, never by row: positions of an image or a text share them. Refused where a
sampled row keeps less than ``least_sqnr``; 20 dB are noise of a tenth of the row. Rows of zeros
are exact. Leaves tensors alone that were not sampled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompile.ir import Graph, is_op
from qcompile.ir.analysis.data_path import layout_root
from qcompile.ir.operators import NORMALIZATIONS
from qcompile.planning import Context, Decision
from qcompile.planning.row_statistics import row_statistics
from qcompile.quant import Array, QSpec, Range, qparams
from qcompile.rewriting import Numerics, Pass, Stage


@dataclass(frozen=True)
class GuardRows(Pass):
    """Leave normalized tensors float where one scale would blur small rows.

    least_sqnr: in dB, what rounding must leave of each row.
    """

    least_sqnr: float = 20.0

    name: ClassVar[str] = "guard-rows"
    stage: ClassVar[Stage] = Stage.TRANSFORM
    numerics: ClassVar[Numerics] = Numerics.EXACT
    after: ClassVar[tuple[str, ...]] = ("widen-ranges", "group-scales")

    def wants(self, graph: Graph, ctx: Context) -> Iterable[str]:
        return (d.tensor for d in _normalized(graph, ctx))

    def run(self, graph: Graph, ctx: Context) -> bool:
        for decision in list(_normalized(graph, ctx)):
            stats, span = ctx.channels.get(decision.tensor), ctx.ranges.get(decision.tensor)
            if stats is None or span is None or decision.spec is None:
                continue
            kept = _least_sqnr(stats.rows, span, decision.spec)
            if kept < self.least_sqnr:
                reason = (
                    f"a normalization reads it: its scales would leave {kept:.1f} dB SQNR of its "
                    f"smallest row, {self.least_sqnr:g} are required"
                )
                ctx.skip(decision.tensor, reason)
                ctx.plan.replace(decision, spec=None, reason=reason)
        return False


def _normalized(graph: Graph, ctx: Context) -> Iterator[Decision]:
    """Decisions on tensors with channels that a normalization reads, on targets where each tensor
    has its own quantizer."""
    if not ctx.target.quantize_interior:
        return
    tensors, read = graph.tensors(), _read_by_norms(graph)
    for decision in ctx.plan.quantized("activation"):
        shape = tensors[decision.tensor].shape
        if decision.tensor in read and shape and isinstance(shape[-1], int) and len(shape) > 1:
            yield decision


def _read_by_norms(graph: Graph) -> set[str]:
    """What is normalized in one operator, or multiplied by or divided by the statistics of rows."""
    statistics = row_statistics(graph)
    found: set[str] = set()
    for node in graph.nodes:
        if is_op(node, *NORMALIZATIONS):
            found.add(layout_root(graph, node.inputs[0]).name)
        elif is_op(node, "Mul", "Div") and any(t.name in statistics for t in node.inputs):
            data = (t for t in node.inputs if t.name not in statistics)
            found |= {layout_root(graph, t).name for t in data}
    return found


def _least_sqnr(rows: Array, span: Range, spec: QSpec) -> float:
    """SQNR in dB of the row that rounding changes most, infinity where all are zero."""
    steps = np.broadcast_to(qparams(span, spec).scale, rows.shape[1]).astype(np.float64)
    centred = rows.astype(np.float64) - rows.mean(1, keepdims=True)
    power = np.square(centred).sum(1)
    smallest = power[power > 0].min(initial=np.inf)
    return float(10 * np.log10(smallest / (np.square(steps).sum() / 12)))
