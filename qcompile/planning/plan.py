"""The plan: a decision for every tensor, before any node is edited.

It is the contract between analysis and insertion: passes of the plan stage write it, ``insert-qdq``
carries it out, and the ledger reports it. Staying float is also a decision, with a reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from qcompile.ir import Tensor
from qcompile.quant import Array, QSpec

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
    """How one tensor is quantized at the given uses; ``spec`` None means that it stays float.

    ``maker``: the node that computes this tensor, where it runs in int8 only if the tensor is
    quantized. ``stacked``: of a weight with more than two axes, how many leading axes are joined to
    the rows that ``spec`` speaks of; the others are joined to columns.
    """

    tensor: str
    kind: Kind
    spec: QSpec | None
    reason: str
    uses: tuple[Use, ...] = ()
    maker: str | None = None
    stacked: int = 0

    def quantized_view(self, values: Array) -> Array:
        """The values of a weight in the shape in which they are quantized."""
        if not self.stacked:
            return values
        rows = math.prod(values.shape[: self.stacked])
        return values.reshape(rows, math.prod(values.shape[self.stacked :]))


@dataclass
class Plan:
    """Decisions in the order in which they were made, at most one for each use."""

    decisions: list[Decision] = field(default_factory=list)

    def decide(self, decision: Decision) -> None:
        """Record a decision; uses of one tensor with the same spec are joined (first reason)."""
        for i, old in enumerate(self.decisions):
            if _subject(old) == _subject(decision):
                uses = old.uses + tuple(u for u in decision.uses if u not in old.uses)
                self.decisions[i] = replace(old, uses=uses, maker=old.maker or decision.maker)
                return
        self.decisions.append(decision)

    def quantized(self, kind: Kind | None = None) -> Iterator[Decision]:
        """Decisions to quantize a tensor."""
        for decision in self.decisions:
            if decision.spec is not None and kind in (None, decision.kind):
                yield decision

    def replace(self, decision: Decision, **changes: Any) -> None:
        """Change fields of a decision in the plan."""
        self.decisions[self.decisions.index(decision)] = replace(decision, **changes)

    def move(self, uses: tuple[Use, ...], tensor: str) -> None:
        """Follow uses that read another tensor now, with their decisions."""
        for decision in self._take(lambda _, use: use in uses):
            self.decide(replace(decision, tensor=tensor))

    def forget(self, node: str) -> None:
        """Drop the decisions for a node that was removed."""
        self._take(lambda _, use: use.node == node)

    def claim(self, uses: tuple[Use, ...]) -> None:
        """Drop the decisions to stay float for uses that are quantized after all."""
        self._take(lambda decision, use: decision.spec is None and use in uses)

    def drop_activations(self) -> None:
        """Drop all decisions for activations."""
        self.decisions[:] = [d for d in self.decisions if d.kind == "weight"]

    def release(self, node: str, reason: str) -> None:
        """Keep all operands of one node float; decisions for other readers stay."""
        for decision in list(self.quantized()):
            mine, others = _split(decision, lambda use: use.node == node)
            if mine is None:
                continue
            self.decisions.remove(decision)
            if others is not None:
                self.decisions.append(others)
            self.decide(replace(mine, spec=None, reason=reason))

    def _take(self, wanted: Callable[[Decision, Use], bool]) -> list[Decision]:
        """Remove uses from their decisions, and return those parts as decisions."""
        parts = [_split(d, partial(wanted, d)) for d in self.decisions]
        self.decisions[:] = [others for _, others in parts if others is not None]
        return [mine for mine, _ in parts if mine is not None]

    def rename(self, old: str, new: str) -> None:
        """Follow a tensor that was replaced by another for all readers."""
        self.decisions[:] = [
            replace(d, tensor=new) if d.tensor == old else d for d in self.decisions
        ]


def _subject(decision: Decision) -> tuple[object, ...]:
    return decision.tensor, decision.kind, decision.spec, decision.stacked


def _split(
    decision: Decision, wanted: Callable[[Use], bool]
) -> tuple[Decision | None, Decision | None]:
    """The decision for the selected uses and that for the others, each None if it has no uses."""
    mine = tuple(u for u in decision.uses if wanted(u))
    if not mine:
        return None, decision
    others = tuple(u for u in decision.uses if u not in mine)
    return replace(decision, uses=mine), replace(decision, uses=others) if others else None
