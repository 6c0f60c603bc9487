"""Adds the mean error of each quantized linear layer to its bias.

    b   →   b + mean(x) (W - Wq s) + mean(x - Q(x)) Wq s

Rounding weights shifts the mean of each output (Nagel et al. 2019, section 4.2); a bias corrects a
shift at no cost. The mean of x is that of all rows of the data and of the general text where they
were added up, as for weights of few bits, else that of the calibration sample. On text of another
kind it differs, and the correction then adds an error. docs/accuracy.md has measurements of both;
no target does it by default. Refuses linear groups without a sample or a range.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from qcompile.ir import Graph, array
from qcompile.planning import Context, QuantizedLinear, add_to_bias, linear_groups
from qcompile.quant import Array, dequantize, qparams, quantize, real
from qcompile.quant.rounding import nearest
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
                ctx.skip(site.data, "its sample or its range is missing: biases are not corrected")
                continue
            params = qparams(span, site.spec)
            errors = stats.rows - dequantize(quantize(stats.rows, params), params)
            mean = stats.rows.mean(0) if stats.mean is None else stats.mean
            for linear in site.linears:
                add_to_bias(graph, linear, _shift(ctx, linear, mean, errors.mean(0)))
                changed = True
        return changed


def _shift(ctx: Context, linear: QuantizedLinear, mean: Array, error: Array) -> Array:
    """Mean of the float outputs minus that of the quantized ones, (outputs,).

    mean: of the data. error: mean of what rounding takes from it. Both (inputs,).
    """
    weight = array(linear.weight)
    rounded = real(ctx.rounded_as(linear.weight.name, linear.spec) or nearest(weight, linear.spec))
    if linear.transposed:
        weight, rounded = weight.T, rounded.T
    shift: Array = mean @ (weight - rounded) + error @ rounded
    return shift
