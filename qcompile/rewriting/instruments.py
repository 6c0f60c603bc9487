"""What watches passes as they run: graph verification, times, dumps."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from qcompile.errors import ModelError, PassError
from qcompile.ir import Graph
from qcompile.ir.printer import dump
from qcompile.planning import Context
from qcompile.rewriting import graph_verifier
from qcompile.rewriting.pass_base import Pass, Stage


class Instrument(Protocol):
    """Looks at the graph around passes; never edits it."""

    def before(self, item: Pass, graph: Graph, ctx: Context) -> None:
        """Called before each pass."""

    def after(self, item: Pass, graph: Graph, ctx: Context, changed: bool) -> None:
        """Called after each pass."""


@dataclass
class Verify:
    """Checks the invariants before the first pass and after each that changed the graph."""

    started: bool = False

    def before(self, item: Pass, graph: Graph, ctx: Context) -> None:
        if not self.started:
            try:
                graph_verifier.verify_graph(graph)
            except PassError as e:
                raise ModelError(f"the input model is not valid: {e}") from e
            self.started = True

    def after(self, item: Pass, graph: Graph, ctx: Context, changed: bool) -> None:
        # From insertion on, uses read Q/DQ outputs: the plan has been carried out.
        planned = ctx if item.stage < Stage.INSERT else None
        if not changed:
            return
        try:
            graph_verifier.verify_graph(graph, planned)
        except PassError as e:
            raise type(e)(f"after pass {item.name!r}: {e}") from e


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: nodes before and after, seconds, refusals."""

    name: str
    changed: bool
    seconds: float
    nodes_before: int
    nodes_after: int
    skips: int


@dataclass
class Time:
    """Records duration, node counts and refusals of each pass."""

    records: list[PassRecord] = field(default_factory=list)
    _start: float = 0.0
    _nodes: int = 0
    _skips: int = 0

    def before(self, item: Pass, graph: Graph, ctx: Context) -> None:
        self._nodes, self._skips = len(graph.nodes), len(ctx.skips)
        self._start = time.perf_counter()

    def after(self, item: Pass, graph: Graph, ctx: Context, changed: bool) -> None:
        seconds = time.perf_counter() - self._start
        skips = len(ctx.skips) - self._skips
        self.records.append(
            PassRecord(item.name, changed, seconds, self._nodes, len(graph.nodes), skips)
        )


@dataclass
class Dump:
    """Writes ``NNN_pass.txt`` after each pass, to read what it did."""

    folder: Path
    _count: int = 0

    def before(self, item: Pass, graph: Graph, ctx: Context) -> None:
        if self._count == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "000_input.txt").write_text(dump(graph), encoding="utf-8")

    def after(self, item: Pass, graph: Graph, ctx: Context, changed: bool) -> None:
        self._count += 1
        if changed:
            (self.folder / f"{self._count:03}_{item.name}.txt").write_text(
                dump(graph), encoding="utf-8"
            )
