"""Topological order of nodes, subgraphs' reads included."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_graphsurgeon as gs

from qcompile.errors import ModelError
from qcompile.ir.subgraph import subgraphs


def in_order(nodes: Sequence[gs.Node]) -> list[gs.Node]:
    """The nodes sorted, stable: they keep their order where the data allows.

    Raises ModelError on a cycle.
    """
    makers = Makers(nodes)
    done: set[int] = set()
    ordered: list[gs.Node] = []
    for root in nodes:
        _visit(root, makers, done, ordered)
    return ordered


class Makers:
    """Which nodes a node needs: by identity for its inputs, by name for what subgraphs read."""

    def __init__(self, nodes: Sequence[gs.Node]) -> None:
        self._place = {id(n): i for i, n in enumerate(nodes)}
        self._made = {id(t): n for n in nodes for t in n.outputs}
        self._named = {t.name: n for n in nodes for t in n.outputs if t.name}

    def before(self, node: gs.Node) -> list[gs.Node]:
        """Makers of all that ``node`` reads, each once, in the order in which they stand."""
        found = [self._made.get(id(t)) for t in node.inputs]
        found += [self._named.get(name) for body in subgraphs(node) for name in body.reads]
        unique = {id(n): n for n in found if n is not None}
        return sorted(unique.values(), key=lambda n: self._place[id(n)])


def _visit(root: gs.Node, makers: Makers, done: set[int], ordered: list[gs.Node]) -> None:
    """Depth first with an explicit stack: graphs are deeper than Python's recursion limit."""
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
