"""Leaves joined tensors float where one scale for all their branches would ruin one of them.

    boxes in 0 … 640, scores in 0 … 1:  Concat(DQ(boxes), DQ(scores)) in float, not quantized

A tensor from Concat, Where, ScatterND and the like has one scale, with a step s that follows from
its widest branch. Rounding to it adds noise of the variance s²/12. Values spread evenly from lo to
hi have the variance (hi - lo)²/12, so a branch keeps

    SQNR = 20 · log10((hi - lo) / s) dB

Refused below ``least_sqnr`` if the branch's own scale would be at least twice as fine. 24 dB are 16
steps; normal data, whose range is eight standard deviations, has 17 dB then, which is a correlation
of .99 with the float values: 1 / √(1 + 10^-1.7). A constant branch counts by its magnitude. Where
an integer product reads the tensor, the product stays float too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompile.ir import Graph, array, is_constant, is_op
from qcompile.ir.operators import CONVOLUTIONS, MATMULS
from qcompile.planning import Context, Decision
from qcompile.planning.joins import Branch, branches
from qcompile.quant import QSpec, Range, qparams
from qcompile.rewriting import Numerics, Pass, Stage

_PRODUCTS = (*CONVOLUTIONS, *MATMULS, "Gemm")
_FINER = 2.0  # a branch loses by the join where its own steps would be so many times finer


@dataclass(frozen=True)
class GuardJoins(Pass):
    """Leave joined tensors float whose branches have ranges far apart.

    least_sqnr: in dB, what rounding to the joint scale must leave of each branch.
    """

    least_sqnr: float = 24.0

    name: ClassVar[str] = "guard-joins"
    stage: ClassVar[Stage] = Stage.TRANSFORM
    numerics: ClassVar[Numerics] = Numerics.EXACT
    after: ClassVar[tuple[str, ...]] = (
        "widen-ranges",
        "migrate-scales",
        "split-outliers",
        "trim-ranges",
        "share-ranges",
        "group-scales",
    )

    def run(self, graph: Graph, ctx: Context) -> bool:
        tensors = graph.tensors()
        for decision in list(ctx.plan.quantized("activation")):
            span = ctx.ranges.get(decision.tensor)
            if span is None or decision.spec is None:
                continue
            whole, step = _whole(span), _step(span, decision.spec)
            for branch in branches(graph, tensors[decision.tensor]):
                part = _range(graph, ctx, branch, whole)
                loss = None
                if part is not None:
                    loss = self._loss(branch, part, whole, step, decision.spec)
                if loss is not None:
                    ctx.skip(decision.tensor, loss)
                    _leave_float(graph, ctx, decision, loss)
                    break
        return False

    def _loss(
        self, branch: Branch, part: Range, whole: Range, step: float, spec: QSpec
    ) -> str | None:
        """Why a branch needs another scale, None where it does not."""
        low, high = float(part.lo), float(part.hi)
        spread = high - low or abs(high)
        if not spread or step < _FINER * _step(part, spec):
            return None
        sqnr = 20 * np.log10(spread / step)
        if sqnr >= self.least_sqnr:
            return None
        return (
            f"it joins branches with very different ranges: {branch.tensor.name!r} has {low:.3g} "
            f"to {high:.3g}, all "
            f"together {float(whole.lo):.3g} to {float(whole.hi):.3g}; one scale would leave it "
            f"{sqnr:.1f} dB SQNR, {self.least_sqnr:g} are required"
        )


def _whole(span: Range) -> Range:
    """A range for all channels together."""
    return Range(span.lo.min(), span.hi.max())


def _step(span: Range, spec: QSpec) -> float:
    """The step of rounding; of several scales, the one that would add as much noise."""
    return float(np.sqrt(np.square(qparams(span, spec).scale).mean()))


def _range(graph: Graph, ctx: Context, branch: Branch, whole: Range) -> Range | None:
    """The range of a branch's values in the joined tensor, None where it is not known."""
    tensor = branch.tensor
    values = array(tensor) if is_constant(tensor) else np.empty(0)
    own = Range(values.min(), values.max()) if values.size else ctx.ranges.get(tensor.name)
    if own is None:
        return None
    own = _whole(own)
    after = branch.range_after(graph, ctx.evaluate, float(own.lo), float(own.hi))
    # no further than the joined tensor, from which a calibrator may have cut outliers off
    return None if after is None else Range(*np.clip(after, whole.lo, whole.hi))


def _leave_float(graph: Graph, ctx: Context, decision: Decision, reason: str) -> None:
    """Withdraw a decision; integer products that read the tensor are withdrawn as a whole, except
    on targets where each tensor has its own quantizer."""
    ctx.plan.replace(decision, spec=None, reason=reason, maker=None)
    if ctx.target.quantize_interior:
        return
    for use in decision.uses:
        if is_op(graph.find(use.node), *_PRODUCTS):
            ctx.plan.release(use.node, reason)
