"""What was decided for every tensor, before any node is edited.

The plan is the contract between analysis and insertion: passes of the plan stage write it,
``insert-qdq`` carries it out, and the ledger reports it. A decision to stay float is a decision
too, with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from qcompile.ir import Tensor
from qcompile.quant import QSpec

Kind = Literal["weight", "activation"]


@dataclass(frozen=True)
class Use:
    """One input slot of one node."""

    node: str
    index: int


def uses_of(tensor: Tensor) -> tuple[Use, ...]:
    """Every input slot that reads a tensor, each once."""
    slots = (Use(n.name, i) for n in tensor.outputs for i, t in enumerate(n.inputs) if t is tensor)
    return tuple(dict.fromkeys(slots))


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

    def replace(self, decision: Decision, **changes: Any) -> None:
        """Put a decision with other fields in the place of one that is here."""
        self.decisions[self.decisions.index(decision)] = replace(decision, **changes)

    def move(self, uses: tuple[Use, ...], tensor: str) -> None:
        """Uses read another tensor now: what was decided for them goes with them."""
        for decision in self._take(lambda _, use: use in uses):
            self.decide(replace(decision, tensor=tensor))

    def forget(self, node: str) -> None:
        """Drop what was decided for a node that is gone."""
        self._take(lambda _, use: use.node == node)

    def claim(self, uses: tuple[Use, ...]) -> None:
        """These uses become integers after all: what was decided for them as floats is void."""
        self._take(lambda decision, use: decision.spec is None and use in uses)

    def drop_activations(self) -> None:
        """Decisions for weights alone stay."""
        self.decisions[:] = [d for d in self.decisions if d.kind == "weight"]

    def release(self, node: str, reason: str) -> None:
        """Leave all operands of one node float; other readers keep what was decided for them."""
        for decision in list(self.quantized()):
            mine, others = _split(decision, lambda use: use.node == node)
            if mine is None:
                continue
            self.decisions.remove(decision)
            if others is not None:
                self.decisions.append(others)
            self.decide(replace(mine, spec=None, reason=reason))

    def _take(self, wanted: Callable[[Decision, Use], bool]) -> list[Decision]:
        """Take uses out of their decisions, which stay in place for the uses that are left."""
        parts = [_split(d, partial(wanted, d)) for d in self.decisions]
        self.decisions[:] = [others for _, others in parts if others is not None]
        return [mine for mine, _ in parts if mine is not None]

    def rename(self, old: str, new: str) -> None:
        """Follow a tensor whose readers read another in its place."""
        self.decisions[:] = [
            replace(d, tensor=new) if d.tensor == old else d for d in self.decisions
        ]


def _split(
    decision: Decision, wanted: Callable[[Use], bool]
) -> tuple[Decision | None, Decision | None]:
    """The decision for the uses that are wanted, None where none is; and for the others."""
    mine = tuple(u for u in decision.uses if wanted(u))
    if not mine:
        return None, decision
    others = tuple(u for u in decision.uses if u not in mine)
    return replace(decision, uses=mine), replace(decision, uses=others) if others else None
