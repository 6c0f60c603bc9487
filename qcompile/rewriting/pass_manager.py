"""Runs passes in order, with instruments around each.

The manager sorts the graph, infers types again where a pass changed it, and checks what the pass
returned: a change that was not reported, or reported without a change, is a PassError.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qcompile.errors import ModelError, PassError, QCompileError
from qcompile.ir import Graph
from qcompile.ir.analysis import shape_inference
from qcompile.ir.printer import fingerprint
from qcompile.planning import Context
from qcompile.rewriting.instruments import Instrument
from qcompile.rewriting.pass_base import Pass
from qcompile.rewriting.pipeline_spec import spell


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
            reported = item.run(graph, ctx)
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
        if reported != changed:
            raise PassError(
                f"pass {item.name!r} returned {reported}, but the graph "
                f"{'changed' if changed else 'did not change'}"
            )
        if changed:
            shape_inference.infer(graph)
        for instrument in self.instruments:
            instrument.after(item, graph, ctx, changed)
        return changed
