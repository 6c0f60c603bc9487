"""Rounds weights so that the error of the layer's outputs is small, not that of single weights.

Rounding to nearest minimizes the error of each weight separately. Rounding row by row, where later
rows compensate for the error of earlier ones (GPTQ, Frantar et al. 2022), minimizes the error of
``X W``. X is the calibration sample, each row divided by its length: the residual sum after a
linear layer is normalized, so only a token's direction counts. For weights of few bits, X is all
rows of the data and of the general text, since their larger errors would fit a sample too closely.
Edits nothing: ``insert-qdq`` takes the rounded values from the context. Refuses weights whose data
was not sampled.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompile.ir import Graph, array
from qcompile.planning import Context, LinearGroup, QuantizedLinear, linear_groups
from qcompile.quant import Array, ChannelStats, QParams, Rounded
from qcompile.quant.rounding import RoundingProblem, compensated, few_bits_rounded
from qcompile.rewriting import Numerics, Pass, Stage
from qcompile.system.threads import in_threads

METHODS = ("descent", "adaround")


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Round weights by the error of their layer's outputs.

    damping: share of the mean channel energy that is added to every channel's, since few sentences
    say little about rare channels; ``few_bits_damping`` for weights of under 8 bits, whose rounding
    errors are large enough to outweigh that. max_inputs: with more input channels, the
    factorization of the second moments would take too long. method: of weights of under 8
    bits, ``descent`` or ``adaround`` (Nagel et al. 2020), which takes some twenty times as long.
    """

    name: ClassVar[str] = "round-weights"
    stage: ClassVar[Stage] = Stage.TRANSFORM
    numerics: ClassVar[Numerics] = Numerics.EXACT
    after: ClassVar[tuple[str, ...]] = ("permute-channels", "migrate-scales", "split-groups")

    damping: float = 1.0
    few_bits_damping: float = 0.1
    max_inputs: int = 4096
    method: str = "descent"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}, expected {' or '.join(METHODS)}")

    def wants(self, graph: Graph, ctx: Context) -> Iterable[str]:
        return (site.data for site in linear_groups(graph, ctx))

    def wants_moments(self, graph: Graph, ctx: Context) -> Iterable[str]:
        """What layers with weights of few bits read."""
        for site in linear_groups(graph, ctx):
            few = [linear for linear in site.linears if linear.spec.width is not None]
            if any(linear.inputs <= self.max_inputs for linear in few):
                yield site.data

    def run(self, graph: Graph, ctx: Context) -> bool:
        tasks = [
            (site.data, linears)
            for site in _sites(graph, ctx)
            if self._is_sampled(ctx, site) and (linears := _unrounded(ctx, site))
        ]
        assigned: set[str] = set()  # a weight that several groups share is rounded for the first
        for _, linears in tasks:
            linears[:] = [x for x in linears if x.weight.name not in assigned]
            assigned |= {x.weight.name for x in linears}
        for rounded in in_threads(lambda task: self._rounded(ctx, *task), tasks):
            ctx.rounded |= rounded
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
        """Rounded weights, by name, of layers that read one tensor."""
        if not linears:
            return {}
        gram, by_name = _moments(ctx.channels[data]), dict[str, Rounded]()
        for spec in dict.fromkeys(linear.spec for linear in linears):
            same_spec = [linear for linear in linears if linear.spec == spec]
            if spec.width is not None:
                parts = [self._few_bits(ctx, linear, gram) for linear in same_spec]
            else:
                parts = self._together(same_spec, gram)
            for linear, rounded in zip(same_spec, parts, strict=True):
                by_name[linear.weight.name] = rounded
        return by_name

    def _few_bits(self, ctx: Context, linear: QuantizedLinear, gram: Array) -> Rounded:
        """One weight of few bits; the factors of its rows stay outside of what is rounded."""
        weight, factors = array(linear.weight), ctx.row_factors.get(linear.weight.name)
        if factors is not None:
            weight = weight / factors[:, None].astype(np.float32)
            gram = gram * np.outer(factors, factors).astype(np.float32)
        return few_bits_rounded(
            RoundingProblem(
                weight, linear.spec, gram, self.few_bits_damping, factors, self.method == "adaround"
            )
        )

    def _together(self, linears: list[QuantizedLinear], gram: Array) -> list[Rounded]:
        """Weights with one spec, concatenated, so that the second moments are factored once."""
        values = [array(linear.weight) for linear in linears]
        spec = linears[0].spec
        if spec.axis is None:  # one scale for each weight cannot be shared
            return [compensated(v, gram, spec, self.damping) for v in values]
        whole = compensated(np.concatenate(values, axis=1), gram, spec, self.damping)
        borders = np.cumsum([v.shape[1] for v in values])[:-1]
        parts = (
            np.split(whole.values, borders, axis=1),
            np.split(whole.params.scale, borders),
            np.split(whole.params.zero_point, borders),
        )
        return [
            Rounded(np.ascontiguousarray(v), QParams(s, z, spec))
            for v, s, z in zip(*parts, strict=True)
        ]


def _sites(graph: Graph, ctx: Context) -> list[LinearGroup]:
    """Groups whose weights are rounded by their data.

    Where data stays float, rounding 8 bits to nearest is close enough, and there is no sample.
    """
    found = linear_groups(graph, ctx)
    if ctx.choices.mode == "weight-only":
        found = [g for g in found if any(linear.spec.width for linear in g.linears)]
    return found


def _unrounded(ctx: Context, site: LinearGroup) -> list[QuantizedLinear]:
    """Layers of a linear group whose weights are not rounded yet."""
    found = []
    for linear in site.linears:
        if linear.transposed:
            ctx.skip(linear.node, "the weight is transposed: rounded to nearest")
        elif linear.weight.name not in ctx.rounded:
            found.append(linear)
    return found


def _moments(stats: ChannelStats) -> Array:
    """Second moments of all rows where they were added up, else those of the sample."""
    return _gram(stats.rows) if stats.moments is None else stats.moments


def _gram(rows: Array) -> Array:
    """Second moments of rows of length 1, (channels, channels)."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = rows / np.maximum(length, np.finfo(np.float32).tiny)
    moments: Array = unit.T @ unit
    return moments
