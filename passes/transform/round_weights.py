"""Chooses the integers of each weight so that the product's error is small, not the weight's.

Rounding to nearest minimizes the error of every weight alone. Rounding row by row and letting the
rows to come make up for the error of those before (GPTQ, Frantar et al. 2022) minimizes the error
of ``X W``. X is the calibration sample, each row divided by its length: the residual sum behind a
linear layer is normalized, so a token counts by its direction. Edits nothing: ``insert-qdq`` takes
the integers from the context. Refuses weights whose data was not sampled.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompile.ir import Graph, array
from qcompile.planning import Context, LinearGroup, QuantizedLinear, linear_groups
from qcompile.quant import Array, QParams, Rounded, compensated
from qcompile.rewriting import Numerics, Pass, Stage
from qcompile.system.threads import in_threads


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Round weights by the error of the product they are for.

    damping: how much of the mean channel energy is added to every channel's; ranges from few
    sentences say little about rare channels. max_inputs: longer weights cost too much to factor.
    """

    name: ClassVar[str] = "round-weights"
    stage: ClassVar[Stage] = Stage.TRANSFORM
    numerics: ClassVar[Numerics] = Numerics.EXACT
    after: ClassVar[tuple[str, ...]] = ("permute-channels", "migrate-scales", "split-groups")

    damping: float = 1.0
    max_inputs: int = 4096

    def wants(self, graph: Graph, ctx: Context) -> Iterable[str]:
        return (site.data for site in linear_groups(graph, ctx))

    def run(self, graph: Graph, ctx: Context) -> bool:
        tasks = [
            (site.data, linears)
            for site in linear_groups(graph, ctx)
            if self._is_sampled(ctx, site) and (linears := _unrounded(ctx, site))
        ]
        taken: set[str] = set()  # a weight that several sites share is rounded for the first
        for _, linears in tasks:
            linears[:] = [x for x in linears if x.weight.name not in taken]
            taken |= {x.weight.name for x in linears}
        for found in in_threads(lambda task: self._rounded(ctx, *task), tasks):
            ctx.rounded |= found
        return False

    def _is_sampled(self, ctx: Context, site: LinearGroup) -> bool:
        stats = ctx.channels.get(site.data)
        if stats is None:
            ctx.skip(site.data, "its rows were not sampled: weights are rounded to nearest")
        elif stats.rows.shape[1] > self.max_inputs:
            ctx.skip(site.data, f"more than {self.max_inputs} channels: rounded to nearest")
        else:
            return True
        return False

    def _rounded(
        self, ctx: Context, data: str, linears: list[QuantizedLinear]
    ) -> dict[str, Rounded]:
        """Weights of layers that read one tensor, by name."""
        if not linears:
            return {}
        gram, made = _gram(ctx.channels[data].rows), dict[str, Rounded]()
        for spec in dict.fromkeys(linear.spec for linear in linears):
            alike = [linear for linear in linears if linear.spec == spec]
            for linear, rounded in zip(alike, self._together(alike, gram), strict=True):
                made[linear.weight.name] = rounded
        return made

    def _together(self, linears: list[QuantizedLinear], gram: Array) -> list[Rounded]:
        """Layers that read one tensor side by side: its moments are factored once."""
        values = [array(linear.weight) for linear in linears]
        spec = linears[0].spec
        if spec.axis is None:  # one scale for each weight cannot be shared
            return [compensated(v, gram, spec, self.damping) for v in values]
        whole = compensated(np.concatenate(values, axis=1), gram, spec, self.damping)
        cuts = np.cumsum([v.shape[1] for v in values])[:-1]
        parts = (
            np.split(whole.values, cuts, axis=1),
            np.split(whole.params.scale, cuts),
            np.split(whole.params.zero_point, cuts),
        )
        return [
            Rounded(np.ascontiguousarray(v), QParams(s, z, spec))
            for v, s, z in zip(*parts, strict=True)
        ]


def _unrounded(ctx: Context, site: LinearGroup) -> list[QuantizedLinear]:
    """Layers of a site that are to be rounded here."""
    found = []
    for linear in site.linears:
        if linear.transposed:
            ctx.skip(linear.node, "the weight is transposed: rounded to nearest")
        elif linear.weight.name not in ctx.rounded:
            found.append(linear)
    return found


def _gram(rows: Array) -> Array:
    """Second moments of rows of length 1, (channels, channels)."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = rows / np.maximum(length, np.finfo(np.float32).tiny)
    moments: Array = unit.T @ unit
    return moments
