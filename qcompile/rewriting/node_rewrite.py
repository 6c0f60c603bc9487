"""A pass that rewrites what it finds around single nodes: the loop that all of these share."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Generic, TypeVar, final

from qcompile.ir import Graph, Node, Refusal, is_op
from qcompile.planning import Context
from qcompile.rewriting.pass_base import Pass

M = TypeVar("M")


class NodeRewrite(Pass, Generic[M]):
    """Subclasses say what they look for, and what takes its place; ``M``: what a match consists of.

    Nodes are visited once, in the order of the graph, each right before it would be rewritten.
    Those that a rewrite adds are not visited, those that one has removed are passed over.
    ``ops``: the operators to look at, spelled as for ``is_op``; none is all.
    """

    ops: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def match(self, graph: Graph, ctx: Context, node: Node) -> M | Refusal | None:
        """What there is to rewrite around a node, None where it is not this pattern.

        A Refusal where it looks like the pattern but cannot be handled: users read its reason in
        the report. Edits nothing.
        """

    @abstractmethod
    def rewrite(self, graph: Graph, ctx: Context, match: M) -> None:
        """Put something else in the place of what was matched. What is then dead goes at the end;
        ``graph.remove_dead()`` drops it at once where it would stop the next match."""

    @final
    def run(self, graph: Graph, ctx: Context) -> bool:
        """Rewrite every match; True where there was one, or where dead nodes were removed."""
        changed = bool(graph.remove_dead())  # what they read has one reader more than it seems
        nodes = graph.nodes
        present = {id(n) for n in nodes}
        for node in nodes:
            if id(node) not in present or (self.ops and not is_op(node, *self.ops)):
                continue
            found = self.match(graph, ctx, node)
            if isinstance(found, Refusal):
                ctx.skip(node, found.reason)
            elif found is not None:
                self.rewrite(graph, ctx, found)
                present = {id(n) for n in graph.nodes}
                changed = True
        return bool(graph.remove_dead()) or changed
