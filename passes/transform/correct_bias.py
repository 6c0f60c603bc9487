"""Moves the mean error of quantized products into their biases.

    b   →   b + mean(x W - Q(x) Wq s)        over the rows of the calibration sample

Rounding weights shifts the mean of each output (Nagel et al. 2019, section 4.2); a bias undoes a
shift for free. The sample decides what the mean is: on text of another kind it is another, and the
correction is then an error of its own. docs/accuracy.md has it measured both ways; no target does
it by default. Refuses sites without a sample or a range.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from qcompile.ir import Graph, array
from qcompile.planning import Context, LinearGroup, QuantizedLinear, add_to_bias, linear_groups
from qcompile.quant import Array, dequantize, nearest, qparams, quantize, real
from qcompile.rewriting import Numerics, Pass, Stage


@dataclass(frozen=True)
class CorrectBias(Pass):
    """Correct biases by the mean error on the calibration sample."""

    name: ClassVar[str] = "correct-bias"
    stage: ClassVar[Stage] = Stage.TRANSFORM
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    after: ClassVar[tuple[str, ...]] = ("migrate-scales", "round-weights")

    def wants(self, graph: Graph, ctx: Context) -> Iterable[str]:
        return (site.data for site in linear_groups(graph, ctx))

    def run(self, graph: Graph, ctx: Context) -> bool:
        changed = False
        for site in linear_groups(graph, ctx):
            stats, span = ctx.channels.get(site.data), ctx.ranges.get(site.data)
            if stats is None or span is None or site.spec is None:
                ctx.skip(site.data, "its rows or its range are not known: biases stay")
                continue
            params = qparams(span, site.spec)
            seen = dequantize(quantize(stats.rows, params), params)
            for linear in site.linears:
                add_to_bias(graph, linear, _shift(ctx, site, linear, stats.rows, seen))
                changed = True
        return changed


def _shift(
    ctx: Context, site: LinearGroup, linear: QuantizedLinear, rows: Array, seen: Array
) -> Array:
    """Mean of the exact product less the quantized one, (outputs,)."""
    weight = array(linear.weight)
    rounded = real(ctx.rounded_as(linear.weight.name, linear.spec) or nearest(weight, linear.spec))
    if linear.transposed:
        weight, rounded = weight.T, rounded.T
    shift: Array = rows.mean(0) @ weight - seen.mean(0) @ rounded
    return shift
