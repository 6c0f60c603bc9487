"""What was decided for every tensor, before any node is edited.

The plan is the contract between analysis and insertion: passes of the plan stage write it,
``insert-qdq`` carries it out, and the ledger reports it. A decision to stay float is a decision
too, with its reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from qcompile.quant.affine import Array, QParams, QSpec, Range

_TAIL_ROWS = 8
FEWEST_ROWS = 4 * _TAIL_ROWS  # samples with fewer say nothing of single channels
Kind = Literal["weight", "activation"]


@dataclass(frozen=True)
class Use:
    """One input slot of one node."""

    node: str
    index: int


@dataclass(frozen=True)
class Decision:
    """What becomes of one tensor at the given uses; ``spec`` None means that it stays float.

    ``maker``: a node that runs in integers only where its result, this tensor, becomes integers.
    """

    tensor: str
    kind: Kind
    spec: QSpec | None
    reason: str
    uses: tuple[Use, ...] = ()
    maker: str = ""


@dataclass
class Plan:
    """Decisions in the order in which they were made, at most one for each use."""

    decisions: list[Decision] = field(default_factory=list)

    def decide(self, decision: Decision) -> None:
        """Record a decision; uses of one tensor with the same spec are joined, the first reason
        stands."""
        for i, old in enumerate(self.decisions):
            same = (old.tensor, old.kind, old.spec) == (
                decision.tensor,
                decision.kind,
                decision.spec,
            )
            if same:
                uses = old.uses + tuple(u for u in decision.uses if u not in old.uses)
                self.decisions[i] = replace(old, uses=uses, maker=old.maker or decision.maker)
                return
        self.decisions.append(decision)

    def quantized(self, kind: Kind | None = None) -> Iterator[Decision]:
        """Decisions that make a tensor an integer."""
        for decision in self.decisions:
            if decision.spec is not None and kind in (None, decision.kind):
                yield decision

    def move(self, uses: tuple[Use, ...], tensor: str) -> None:
        """Uses read another tensor now: what was decided for them goes with them."""
        for decision in list(self.decisions):
            moved = tuple(u for u in decision.uses if u in uses)
            if not moved:
                continue
            left = tuple(u for u in decision.uses if u not in uses)
            at = self.decisions.index(decision)
            self.decisions[at : at + 1] = [replace(decision, uses=left)] if left else []
            self.decide(replace(decision, tensor=tensor, uses=moved))

    def forget(self, node: str) -> None:
        """Drop what was decided for a node that is gone."""
        for decision in list(self.decisions):
            left = tuple(u for u in decision.uses if u.node != node)
            if len(left) < len(decision.uses):
                at = self.decisions.index(decision)
                self.decisions[at : at + 1] = [replace(decision, uses=left)] if left else []

    def claim(self, uses: tuple[Use, ...]) -> None:
        """These uses become integers after all: what was decided for them as floats is void."""
        for decision in [d for d in self.decisions if d.spec is None]:
            left = tuple(u for u in decision.uses if u not in uses)
            if len(left) < len(decision.uses):
                at = self.decisions.index(decision)
                self.decisions[at : at + 1] = [replace(decision, uses=left)] if left else []

    def release(self, node: str, reason: str) -> None:
        """Leave all operands of one node float; other readers keep what was decided for them."""
        for decision in list(self.quantized()):
            mine = tuple(u for u in decision.uses if u.node == node)
            if not mine:
                continue
            others = tuple(u for u in decision.uses if u.node != node)
            self.decisions.remove(decision)
            if others:
                self.decisions.append(replace(decision, uses=others))
            self.decide(replace(decision, spec=None, reason=reason, uses=mine))

    def rename(self, old: str, new: str) -> None:
        """Follow a tensor whose readers read another in its place."""
        self.decisions[:] = [
            replace(d, tensor=new) if d.tensor == old else d for d in self.decisions
        ]


@dataclass(frozen=True)
class StatRequest:
    """A statistic that a pass asks for: the range of one tensor, per tensor or along an axis."""

    tensor: str
    spec: QSpec

    @property
    def axis(self) -> int | None:
        return self.spec.axis if self.spec.granularity == "channel" else None


@dataclass
class Ranges:
    """Calibrated ranges by tensor name, filled once by the collector."""

    found: dict[str, Range] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # tensor -> why it has no range

    def get(self, tensor: str) -> Range | None:
        """The range of a tensor, None where none was collected."""
        return self.found.get(tensor)

    def set(self, tensor: str, span: Range) -> None:
        self.found[tensor] = span

    def drop(self, tensor: str) -> None:
        """Forget a range whose tensor is gone or changed."""
        self.found.pop(tensor, None)


@dataclass(frozen=True)
class ChannelStats:
    """One tensor's channels (last axis): extrema over all data, and a sample of rows.

    Shapes: ``lo`` and ``hi`` (channels,), ``rows`` (n, channels), float32; a row is one position
    (token). Rows that ``attention_mask`` marks as padding are not among them. ``reach``: extrema
    over text beside the data, lowest and highest, (channels,) each; they count where unseen values
    are foreseen, and nowhere else.
    """

    lo: Array
    hi: Array
    rows: Array
    reach: tuple[Array, Array] | None = None

    @property
    def width(self) -> Array:
        """Largest magnitude of each channel, (channels,)."""
        widest: Array = np.maximum(-self.lo, self.hi)
        return widest

    @property
    def tail(self) -> Array:
        """How heavy each channel's tail is, (channels,): its maximum grows as ``n ** tail``.

        Hill's estimator (1975) over the largest rows of the sample. Few rows say little about one
        channel, so the mean of all channels is a bound and half of the estimate: what hardly moves,
        as an outlier with one value, keeps a short tail. A handful of rows says nothing.
        """
        count = _TAIL_ROWS
        if len(self.rows) < FEWEST_ROWS:
            return np.zeros(len(self.lo))
        sizes = np.abs(self.rows)
        largest = np.sort(np.partition(sizes, -count - 1, axis=0)[-count - 1 :], axis=0)
        largest = largest.astype(np.float64)
        logs = np.log(np.maximum(largest, np.finfo(np.float32).tiny))
        own = np.clip((logs[1:] - logs[0]).mean(0), 0, 1)
        common = own.mean()
        tail: Array = (np.minimum(own, common) + common) / 2
        return tail

    def foreseen(self, doublings: float) -> ChannelStats:
        """Extrema to expect once the data has doubled so many times; the sample as it is.

        Text beside the data stands for half of the doublings: what is new in unseen text, it has
        mostly shown (docs/accuracy.md has what that gains).
        """
        left = doublings if self.reach is None else doublings / 2
        margin = (2.0 ** (self.tail * left)).astype(np.float32)
        lo, hi = self.lo * margin, self.hi * margin
        if self.reach is not None:
            lo, hi = np.minimum(lo, self.reach[0]), np.maximum(hi, self.reach[1])
        return ChannelStats(lo, hi, self.rows)

    def scaled(self, factor: Array) -> ChannelStats:
        """The statistics of ``x * factor``, a positive factor for each channel."""
        reach = self.reach and (self.reach[0] * factor, self.reach[1] * factor)
        return ChannelStats(self.lo * factor, self.hi * factor, self.rows * factor, reach)

    def permuted(self, order: Array) -> ChannelStats:
        """The statistics of ``x[..., order]``."""
        reach = self.reach and (self.reach[0][order], self.reach[1][order])
        return ChannelStats(self.lo[order], self.hi[order], self.rows[:, order], reach)


@dataclass(frozen=True)
class Rounded:
    """A weight as integers, in the shape of the weight, and what they stand for."""

    values: Array
    params: QParams
