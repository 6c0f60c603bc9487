"""Runs passes in order, with instruments around each.

The manager sorts the graph, refreshes types where a pass changed it, and holds each pass to its
word: a change that was not claimed, or a claim without a change, is a PassError.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from qcompile.analysis import shape_inference
from qcompile.errors import ModelError, PassError, QCompileError
from qcompile.ir.graph import Graph
from qcompile.ir.printer import dump, fingerprint
from qcompile.planning.context import Context, Pass, Stage
from qcompile.rewriting import graph_verifier
from qcompile.rewriting.pipeline_spec import spell


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
                graph_verifier.check(graph)
            except PassError as e:
                raise ModelError(f"the model that came in is not sound: {e}") from e
            self.started = True

    def after(self, item: Pass, graph: Graph, ctx: Context, changed: bool) -> None:
        # From insertion on, uses read Q/DQ outputs: the plan has been carried out.
        planned = ctx if item.stage < Stage.INSERT else None
        if not changed:
            return
        try:
            graph_verifier.check(graph, planned)
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
            (self.folder / "000_input.txt").write_text(dump(graph))

    def after(self, item: Pass, graph: Graph, ctx: Context, changed: bool) -> None:
        self._count += 1
        if changed:
            (self.folder / f"{self._count:03}_{item.name}.txt").write_text(dump(graph))


@dataclass(frozen=True)
class PassManager:
    """Passes and the instruments around them."""

    passes: tuple[Pass, ...]
    instruments: Sequence[Instrument] = ()

    def run(self, graph: Graph, ctx: Context, on_pass: Callable[[str], None] | None = None) -> bool:
        """Run all passes on ``graph``; True where any changed it. Raises PassError."""
        changed = False
        for item in self.passes:
            if on_pass is not None:
                on_pass(item.name)
            changed |= self._run_one(item, graph, ctx)
        return changed

    def _run_one(self, item: Pass, graph: Graph, ctx: Context) -> bool:
        for instrument in self.instruments:
            instrument.before(item, graph, ctx)
        ctx.running = item.name
        old = fingerprint(graph)
        try:
            claimed = item.run(graph, ctx)
            graph.sort()
        except PassError as e:
            raise type(e)(f"pass {item.name!r}: {e}") from e
        except ModelError as e:
            raise PassError(f"pass {item.name!r} broke the graph: {e}") from e
        except QCompileError:
            raise
        except Exception as e:
            raise PassError(
                f"pass {item.name!r} failed: {type(e).__name__}: {e} "
                f"(replay with --pipeline {spell(self.passes)!r})"
            ) from e
        changed = fingerprint(graph) != old
        if claimed != changed:
            raise PassError(
                f"pass {item.name!r} said changed={claimed}, but the graph "
                f"{'changed' if changed else 'is as it was'}"
            )
        if changed:
            shape_inference.infer(graph)
        for instrument in self.instruments:
            instrument.after(item, graph, ctx, changed)
        return changed
