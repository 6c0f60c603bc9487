"""Which integer type a tensor gets: the target rule's, unless the user's precision differs.

8 means the type of the target's rule, 16 the target's wide type. A tensor for which 16 bits are
requested but not possible stays float, which is more precise, never 8 bits. Probabilities in rows
that the rule's type does not resolve stay float too, unless the user's precision says otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import numpy as np

from qcompile.ir import Graph, Refusal
from qcompile.planning.context import Context
from qcompile.planning.probabilities import OPEN
from qcompile.quant import Array, QSpec, out_of_scale
from qcompile.targets.target import WIDE_SINCE

# Steps of [0, 1] that each value of an even row of probabilities has to be. Rounding noise has a
# standard deviation of 1/sqrt(12) steps, 7 % of such a value; what a row weights is off by no more.
_STEPS_OF_A_PROBABILITY = 4


@dataclass(frozen=True)
class PrecisionChoice:
    """How a tensor is quantized, None for float; ``reason`` is None without a user's setting."""

    spec: QSpec | None
    reason: str | None = None


def of_activation(
    graph: Graph, ctx: Context, names: Collection[str], spec: QSpec, row: float = 0
) -> PrecisionChoice:
    """The choice for an activation with these names, for which the rule has ``spec``.

    row: length of its rows if it consists of probabilities (``probability_rows``), else 0.
    """
    choice = _choice(graph, ctx, names, spec, ctx.target.wide, ranged=True)
    longest = _longest_row(spec)
    if row <= longest or ctx.choices.precision_of(names) is not None:
        return choice
    found = "any length" if row == OPEN else f"{row:g}"
    return PrecisionChoice(
        None, f"probabilities in rows of {found}: {spec.bits} bits resolve rows of up to {longest}"
    )


def _longest_row(spec: QSpec) -> int:
    """Length up to which the values of an even row of probabilities, 1/n, are several steps."""
    low, high = spec.limits
    levels = high + 1 if spec.symmetric else high - low + 1
    return levels // _STEPS_OF_A_PROBABILITY


def unusable(values: Array) -> Refusal | None:
    """Why the values of a weight have no scale, None where they have one."""
    if values.size == 0:
        return Refusal("the weight is empty")
    if not np.isfinite(values).all():
        return Refusal("the weight holds NaN or infinity")
    extremes = out_of_scale(float(values.min()), float(values.max()))
    return None if extremes is None else Refusal(f"the weight holds {extremes}")


def of_weight(graph: Graph, ctx: Context, names: Iterable[str], spec: QSpec) -> PrecisionChoice:
    """The choice for a constant with these names; 16 bits keep the rule's granularity."""
    dtype = ctx.target.wide_weight
    wide = None if dtype is None else replace(spec, dtype=dtype, reduced=False, paired=False)
    return _choice(graph, ctx, names, spec, wide, ranged=False)


def _choice(
    graph: Graph,
    ctx: Context,
    names: Iterable[str],
    spec: QSpec,
    wide: QSpec | None,
    *,
    ranged: bool,
) -> PrecisionChoice:
    rule = ctx.choices.precision_of(names)
    if rule is not None and rule.precision in range(2, 8) and not ranged and spec.axis is not None:
        few = replace(
            spec,
            width=rule.precision,
            reduced=False,
            paired=False,
            block=32 if rule.precision < 5 and spec.axis == 1 else None,
        )
        return PrecisionChoice(few, rule.reason or f"by pattern {rule.pattern!r}")
    if rule is None or rule.precision in range(2, 9):
        return PrecisionChoice(spec)
    if rule.precision == "float":
        by_user = f"kept float by precision pattern {rule.pattern!r}"
        return PrecisionChoice(None, rule.reason or by_user)
    if wide is None:
        return PrecisionChoice(
            None, f"16-bit integers have no kernel on target {ctx.target.name!r}: left float"
        )
    if ranged and ctx.choices.mode == "dynamic":
        return PrecisionChoice(
            None, "16-bit integers need calibrated ranges, mode dynamic: left float"
        )
    if graph.opset < WIDE_SINCE:
        found = f"the model stays at {graph.opset}"
        return PrecisionChoice(
            None, f"16-bit integers need opset {WIDE_SINCE}, {found}: left float"
        )
    return PrecisionChoice(wide, rule.reason or f"16 bits by precision pattern {rule.pattern!r}")
