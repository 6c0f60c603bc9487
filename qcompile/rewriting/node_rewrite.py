"""Base class of passes that rewrite a pattern around single nodes, with their common loop."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Generic, TypeVar, final

from qcompile.ir import Graph, Node, Refusal, is_op
from qcompile.planning import Context
from qcompile.rewriting.pass_base import Pass

M = TypeVar("M")


class NodeRewrite(Pass, Generic[M]):
    """Subclasses define ``match`` and ``rewrite``; ``M`` is the type of a match.

    Nodes are visited once, in the order of the graph, and matched right before the rewrite. Nodes
    that a rewrite adds are not visited, those that it removes are skipped. ``ops``: the operators
    to visit, spelled as for ``is_op``; all where empty.
    """

    ops: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def match(self, graph: Graph, ctx: Context, node: Node) -> M | Refusal | None:
        """The match at a node, None where it is not this pattern.

        A Refusal where it resembles the pattern but cannot be handled: the report shows its reason.
        Edits nothing.
        """

    @abstractmethod
    def rewrite(self, graph: Graph, ctx: Context, match: M) -> None:
        """Replace the match. Dead nodes are removed at the end of the pass; call
        ``graph.remove_dead()`` where they would prevent the next match.
        """

    @final
    def run(self, graph: Graph, ctx: Context) -> bool:
        """Rewrite every match; True where there was one, or where dead nodes were removed."""
        changed = bool(graph.remove_dead())  # dead nodes count as readers
        nodes = graph.nodes
        present = {id(n) for n in nodes}
        for node in nodes:
            if id(node) not in present or (self.ops and not is_op(node, *self.ops)):
                continue
            match = self.match(graph, ctx, node)
            if isinstance(match, Refusal):
                ctx.skip(node, match.reason)
            elif match is not None:
                self.rewrite(graph, ctx, match)
                present = {id(n) for n in graph.nodes}
                changed = True
        return bool(graph.remove_dead()) or changed
