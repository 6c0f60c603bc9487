"""What a target demands of the graph that is emitted for it: rows of a table, checked at the end.

A runtime does not say why it is slow: a node without a kernel runs elsewhere, a quantizer of the
wrong form is left unfused, or rejected when the engine is built, often on another machine. So each
target lists requirements; a graph that misses one is no result but an error that names the node.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from qcompile.errors import TargetError
from qcompile.ir import Graph

_SHOWN = 3


@dataclass(frozen=True)
class Fault:
    """Where a graph misses a requirement, with what was found and what was expected."""

    rule: str
    node: str
    what: str

    def __str__(self) -> str:
        return f"{self.rule}: node {self.node!r}: {self.what}"


@dataclass
class Findings:
    """What the requirements found: by rule how many nodes they looked at, and remarks."""

    checked: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


class Requirement(ABC):
    """One demand. Subclasses are frozen dataclasses, whose fields are what is demanded.

    ``rule`` is its name in messages and reports.
    """

    rule: ClassVar[str]

    @abstractmethod
    def faults(self, graph: Graph, found: Findings) -> Iterator[Fault]:
        """What misses the demand. Counts what was looked at in ``found.checked[self.rule]``."""


def examine(graph: Graph, requirements: tuple[Requirement, ...]) -> Findings:
    """Hold a sorted and typed graph to all requirements."""
    found = Findings()
    for requirement in requirements:
        found.checked[requirement.rule] = 0
        found.faults += requirement.faults(graph, found)
    return found


def require(graph: Graph, target: str, requirements: tuple[Requirement, ...]) -> Findings:
    """``examine``, where any fault is an error. Raises TargetError with the first few."""
    found = examine(graph, requirements)
    if found.faults:
        shown = "; ".join(map(str, found.faults[:_SHOWN]))
        more = len(found.faults) - _SHOWN
        rest = f"; and {more} more" if more > 0 else ""
        raise TargetError(f"target {target!r} cannot run what was compiled: {shown}{rest}")
    return found
