"""What was decided for every tensor, before any node is edited.

The plan is the contract between analysis and insertion: passes of the plan stage write it,
``insert-qdq`` carries it out, and the ledger reports it. A decision to stay float is a decision
too, with its reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from qcompile.quant import QSpec

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
    maker: str | None = None


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
