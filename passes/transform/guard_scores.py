"""Leaves attention's scores float where quantizing query and key would add too much noise.

A score is a sum over the d channels of one head, q · k. With steps s_q and s_k its rounding noise
has the variance

    (s_q² · Σ k_i² + s_k² · Σ q_i²) / 12        expected over positions

and softmax takes the exponential: noise of standard deviation e changes a probability by a factor
of about 1 ± e, which must be small relative to 1 and to the spread of the scores. One wide channel
makes the step coarse for all, so outliers matter most here. The worst head decides. Leaves matrix
multiplications alone whose operands were not sampled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompile.ir import Graph, Node, is_constant, is_op, shape_of
from qcompile.ir.analysis.data_path import movers_before
from qcompile.planning import Context, Decision, Use
from qcompile.quant import Array, qparams
from qcompile.rewriting import Numerics, Pass, Stage

_ROWS = 256  # positions to look at: 65,536 scores per head


@dataclass(frozen=True)
class _Score:
    """An int8 multiplication of query and key: the decisions on both, and the width of a head."""

    node: Node
    query: Decision
    key: Decision
    width: int | None


@dataclass(frozen=True)
class GuardScores(Pass):
    """Leave scores float where int8 would add too much noise.

    limit: accepted standard deviation of a score's rounding noise, relative to the standard
    deviation of the scores over keys, or to 1 where that is smaller.
    """

    name: ClassVar[str] = "guard-scores"
    stage: ClassVar[Stage] = Stage.TRANSFORM
    numerics: ClassVar[Numerics] = Numerics.EXACT

    limit: float = 1 / 20

    def __post_init__(self) -> None:
        if not self.limit >= 0:
            raise ValueError(f"limit is {self.limit}, expected 0 or more")

    def wants(self, graph: Graph, ctx: Context) -> Iterable[str]:
        return [d.tensor for s in _scores(graph, ctx) for d in (s.query, s.key)]

    def run(self, graph: Graph, ctx: Context) -> bool:
        for score in _scores(graph, ctx):
            noise = _relative_noise(ctx, score)
            if noise is not None and noise > self.limit:
                reason = (
                    f"rounding noise of the scores would be {noise:.3g} of their spread, "
                    f"{self.limit:.3g} is accepted"
                )
                for use in (*score.query.uses, *score.key.uses):
                    ctx.plan.release(use.node, reason)
        return False


def _scores(graph: Graph, ctx: Context) -> Iterator[_Score]:
    """Multiplications of query and key whose operands are both planned to be quantized."""
    planned = {u: d for d in ctx.plan.quantized("activation") for u in d.uses}
    for node in graph.nodes:
        if not is_op(node, "MatMul") or any(is_constant(t) for t in node.inputs):
            continue
        query, key = (planned.get(_use(graph, node, i)) for i in (0, 1))
        if query is not None and key is not None and not _is_probability(ctx, query):
            shape = shape_of(node.inputs[0])
            last = shape[-1] if shape else None
            yield _Score(node, query, key, last if isinstance(last, int) else None)


def _use(graph: Graph, node: Node, index: int) -> Use:
    """The place of the operand's quantizer: before the layout operators that move its values."""
    movers: list[Node] = movers_before(graph, node.inputs[index])
    return Use(movers[-1].name, 0) if movers else Use(node.name, index)


def _is_probability(ctx: Context, decision: Decision) -> bool:
    """True for probabilities: plan-products requests no range for them, it is [0, 1]."""
    return all(r.tensor != decision.tensor for r in ctx.requests)


def _relative_noise(ctx: Context, score: _Score) -> float | None:
    """Noise of the worst head's scores relative to their spread; None where it is not known."""
    operands = [(ctx.channels.get(d.tensor), _step(ctx, d)) for d in (score.query, score.key)]
    (query, q_step), (key, k_step) = operands
    if query is None or key is None or not len(query.rows) or not len(key.rows):
        return None
    if q_step is None or k_step is None or query.rows.shape[1] != key.rows.shape[1]:
        return None
    q, k = _heads(query.rows[:_ROWS], score.width), _heads(key.rows[:_ROWS], score.width)
    # variance of the noise by the formula above, per head: mean over positions of Σ k², Σ q²
    energies = (np.square(x).sum(-1).mean(-1) for x in (k, q))  # (heads,) each
    variance = sum(s**2 * e for s, e in zip((q_step, k_step), energies, strict=True)) / 12
    # standard deviation of each query's scores over all keys, averaged over queries
    spread = (q @ k.transpose(0, 2, 1)).std(-1).mean(-1)
    noise: Array = np.sqrt(variance) / np.clip(spread, np.finfo(np.float32).tiny, 1)
    return float(noise.max())


def _step(ctx: Context, decision: Decision) -> float | None:
    span = ctx.ranges.get(decision.tensor)
    if span is None or decision.spec is None:
        return None
    return float(qparams(span, decision.spec).scale)


def _heads(rows: Array, width: int | None) -> Array:
    """Rows (n, channels) by head, (heads, n, width); one head where its width is not known."""
    channels = rows.shape[1]
    width = channels if width is None or channels % width else width
    by_head: Array = rows.astype(np.float64).reshape(len(rows), -1, width).transpose(1, 0, 2)
    return by_head
