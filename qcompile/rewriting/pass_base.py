"""What a pass is: a name, a stage, a promise about numerics, and a run over the graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from enum import Enum, IntEnum
from typing import ClassVar

from qcompile.ir import Graph
from qcompile.planning import Context


class Stage(IntEnum):
    """Stages of a pipeline, in their order."""

    SIMPLIFY = 0
    PLAN = 1
    TRANSFORM = 2
    INSERT = 3
    LOWER = 4


class Numerics(Enum):
    """How a pass may change the model's outputs."""

    EXACT = "bit-equal"
    ROUNDING = "equal up to float rounding"
    LOSSY = "quantizing"


class Pass(ABC):
    """One rewrite. Subclasses are frozen dataclasses; their fields are the options. Those that work
    on one node at a time derive from ``NodeRewrite``.

    The graph is valid before and after ``run``, not necessarily during it. ``run`` returns True
    exactly where it changed the graph, which the manager checks. A pass that cannot handle a node
    reports that by ``ctx.skip`` and leaves it unchanged.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage]
    numerics: ClassVar[Numerics]
    after: ClassVar[tuple[str, ...]] = ()

    def wants(self, graph: Graph, ctx: Context) -> Iterable[str]:
        """Tensors whose channels the pass reads in ``ctx.channels``; called after planning."""
        return ()

    def wants_moments(self, graph: Graph, ctx: Context) -> Iterable[str]:
        """Tensors whose ``ctx.channels`` are to have second moments, which take time and memory."""
        return ()

    @abstractmethod
    def run(self, graph: Graph, ctx: Context) -> bool:
        """Rewrite ``graph`` in place; True where anything changed."""
