"""Topological order of nodes, including the outer tensors that subgraphs read."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_graphsurgeon as gs

from qcompile.errors import ModelError
from qcompile.ir.subgraph import subgraphs


def topological_order(nodes: Sequence[gs.Node]) -> list[gs.Node]:
    """The nodes sorted topologically; the sort is stable.

    Raises ModelError on a cycle.
    """
    makers = Makers(nodes)
    done: set[int] = set()
    ordered: list[gs.Node] = []
    for root in nodes:
        _visit(root, makers, done, ordered)
    return ordered


class Makers:
    """The producers of a node's inputs (by identity) and of its subgraphs' reads (by name)."""

    def __init__(self, nodes: Sequence[gs.Node]) -> None:
        self._position = {id(n): i for i, n in enumerate(nodes)}
        self._producers = {id(t): n for n in nodes for t in n.outputs}
        self._producers_by_name = {t.name: n for n in nodes for t in n.outputs if t.name}

    def before(self, node: gs.Node) -> list[gs.Node]:
        """The producers of all that ``node`` reads, each once, in the order of the nodes."""
        found = [self._producers.get(id(t)) for t in node.inputs]
        found += [
            self._producers_by_name.get(name) for body in subgraphs(node) for name in body.reads
        ]
        unique = {id(n): n for n in found if n is not None}
        return sorted(unique.values(), key=lambda n: self._position[id(n)])


def _visit(root: gs.Node, makers: Makers, done: set[int], ordered: list[gs.Node]) -> None:
    """Depth-first with an explicit stack: graphs can be deeper than Python's recursion limit."""
    open_nodes: set[int] = set()
    stack = [(root, False)]
    while stack:
        node, finished = stack.pop()
        if finished:
            open_nodes.discard(id(node))
            done.add(id(node))
            ordered.append(node)
            continue
        if id(node) in done:
            continue
        if id(node) in open_nodes:
            raise ModelError(f"the graph has a cycle through node {node.name!r} ({node.op})")
        open_nodes.add(id(node))
        stack.append((node, True))
        waiting = [n for n in reversed(makers.before(node)) if id(n) not in done]
        stack.extend((n, False) for n in waiting)
