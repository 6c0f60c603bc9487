"""Which integer type a tensor gets: the target rule's, unless the user's precision differs.

8 means the type of the target's rule, 16 the target's wide type. A tensor for which 16 bits are
requested but not possible stays float, which is more precise, never 8 bits. 2 to 7 are for weights
that the rule has in int8 by channel: their values are few, so that they fit into that many bits
each. Where that is not possible they get 8 bits, and so do activations. Probabilities in rows
that the rule's type does not resolve stay float too, unless the user's precision says otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import numpy as np

from qcompile.ir import Graph, Refusal
from qcompile.planning.context import Context, PrecisionRule, WeightKind
from qcompile.planning.probabilities import OPEN
from qcompile.quant import Array, QSpec, out_of_scale
from qcompile.targets.target import WIDE_SINCE

# Steps of [0, 1] that each value of an even row of probabilities has to be. Rounding noise has a
# standard deviation of 1/sqrt(12) steps, 7 % of such a value; what a row weights is off by no more.
_STEPS_OF_A_PROBABILITY = 4
# Values that share a multiplier, by kind and bits; where there is none, only a channel's scale.
_BLOCKS: dict[WeightKind, dict[int, int]] = {
    "linear": {2: 16, 3: 32, 4: 32},
    "table": {2: 16, 3: 64, 4: 64},
}


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
    rule = ctx.choices.precision_of_data(names)
    choice = _choice(graph, ctx, rule, spec, ctx.target.wide, ranged=True)
    longest = _longest_row(spec)
    if row <= longest or rule is not None:
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


def of_weight(
    graph: Graph,
    ctx: Context,
    names: Iterable[str],
    spec: QSpec,
    kind: WeightKind | None = None,
) -> PrecisionChoice:
    """The choice for a constant with these names; 16 bits keep the rule's granularity.

    kind: None for a weight that cannot have few bits, such as a convolution's.
    """
    rule = ctx.choices.precision_of_weight(names, kind)
    if rule is not None and rule.has_few_bits:
        bits = int(rule.precision)
        narrow = few_bits(graph, ctx, spec, bits, kind)
        if isinstance(narrow, Refusal):
            return PrecisionChoice(spec, f"8 bits, not {bits} ({rule.origin}): {narrow.reason}")
        return PrecisionChoice(narrow, f"{_described(ctx, bits)} ({rule.reason or rule.origin})")
    dtype = ctx.target.wide_weight
    wide = None if dtype is None else replace(spec, dtype=dtype, reduced=False, paired=False)
    return _choice(graph, ctx, rule, spec, wide, ranged=False)


def few_bits(
    graph: Graph, ctx: Context, spec: QSpec, bits: int, kind: WeightKind | None
) -> QSpec | Refusal:
    """How 2 to 7 bits replace the rule's ``spec`` of a weight, or why they do not."""
    target, settings = ctx.target, ctx.choices
    if kind is None:
        return Refusal("few bits are for weights of linear layers and for tables")
    if spec.dtype != "int8" or not spec.symmetric or spec.axis is None:
        return Refusal(f"few bits are for int8 by channel, target {target.name!r} has {spec}")
    if bits not in target.few_bits:
        has = ", ".join(map(str, (*target.few_bits, 8)))
        return Refusal(f"target {target.name!r} stores weights in {has} bits")
    needed = target.few_bits[bits].needs
    if graph.opset < needed:
        return Refusal(f"{bits} bits need opset {needed}, the model stays at {graph.opset}")
    block = settings.weight_block
    if block is None:
        block = _BLOCKS[kind].get(bits, 0)
    bounds = {"narrow": False, "paired": False, "reduced": False}
    return replace(spec, width=bits, block=block or None, **bounds)


def _described(ctx: Context, bits: int) -> str:
    """Bits of a weight in the file, and what it is in a run."""
    stored, run = ctx.target.few_bits[bits].stored, ctx.target.few_bits_run.get(ctx.choices.mode)
    found = f"{stored} bits in the file" if stored == bits else f"{bits} bits, {stored} in the file"
    return found if run is None else f"{found}, {run} in the run"


def _choice(
    graph: Graph,
    ctx: Context,
    rule: PrecisionRule | None,
    spec: QSpec,
    wide: QSpec | None,
    *,
    ranged: bool,
) -> PrecisionChoice:
    if rule is None or rule.precision == 8:
        return PrecisionChoice(spec)
    if rule.precision == "float":
        by_user = f"kept float by {rule.origin}"
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
    return PrecisionChoice(wide, rule.reason or f"16 bits by {rule.origin}")
