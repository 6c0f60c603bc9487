"""A target's requirements on the emitted graph, checked at the end.

A runtime does not report why it is slow: a node without a kernel runs elsewhere, and an unsupported
quantizer is not fused, or rejected when the engine is built, often on another machine. So each
target lists requirements; a graph that violates one is an error that names the node.
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
    """A node that violates a requirement, with what was found and expected."""

    rule: str
    node: str
    what: str

    def __str__(self) -> str:
        return f"{self.rule}: node {self.node!r}: {self.what}"


@dataclass
class Findings:
    """Result of a check: number of nodes checked per rule, remarks and faults."""

    checked: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


class Requirement(ABC):
    """One requirement. Subclasses are frozen dataclasses; their fields are its parameters.

    ``rule`` is its name in messages and reports.
    """

    rule: ClassVar[str]

    @abstractmethod
    def faults(self, graph: Graph, found: Findings) -> Iterator[Fault]:
        """The violations. Counts checked nodes in ``found.checked[self.rule]``."""


def examine(graph: Graph, requirements: tuple[Requirement, ...]) -> Findings:
    """Check a sorted and typed graph against all requirements."""
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
