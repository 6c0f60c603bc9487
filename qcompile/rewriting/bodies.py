"""Compiles the bodies of If, Loop and Scan, after the graph around them.

A body goes through the same passes as a graph of its own, with the outer tensors that it reads as
inputs and constants. Ranges are not calibrated in bodies, which run many times or not at all: in
mode static, bodies are compiled in the target's mode that needs no ranges. The opset is that of the
model, so no body raises it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qcompile.ir import Graph, is_float, rank
from qcompile.ir.analysis import shape_inference
from qcompile.ir.equal_constants import EqualConstants
from qcompile.ir.model_io.bodies import Body, opened, outer_constants
from qcompile.planning import Context, Decision, Plan, uses_of
from qcompile.quant import Ranges
from qcompile.rewriting.instruments import Verify
from qcompile.rewriting.pass_base import Pass, Stage
from qcompile.rewriting.pass_manager import PassManager
from qcompile.targets.target import Mode, Target

NOT_INSERTED = "planned, but no pass of the pipeline inserts quantizers"
_WITHOUT_RANGES: tuple[Mode, ...] = ("dynamic", "weight-only", "float")  # best first
_OF_THE_MODEL = ("raise-opset",)


def mode_of_bodies(target: Target, mode: Mode) -> Mode:
    """The mode for bodies: the model's, or in place of static the target's best without ranges."""
    if mode != "static":
        return mode
    return next(m for m in _WITHOUT_RANGES if m in target.modes)


@dataclass(frozen=True)
class BodyCompiler:
    """Compiles bodies with ``passes``, except for those that only suit a whole model."""

    passes: Sequence[Pass]

    def run(self, graph: Graph, ctx: Context) -> None:
        """Compile every body in the graph, and those in them; ``ctx.plan`` gets their decisions.

        Raises ModelError where a body is malformed.
        """
        known: EqualConstants | None = None
        for body in opened(graph):
            known = known or outer_constants(graph)
            self._compile(body, known, ctx)
        if known is not None:
            graph.remove_dead()  # nodes whose results only the old bodies read
            graph.sort()

    def _compile(self, body: Body, known: EqualConstants, ctx: Context) -> None:
        own = _context(ctx, body)
        shape_inference.infer(body.graph)
        checks = [Verify()]
        self._run(lambda stage: stage <= Stage.PLAN, checks, body.graph, own)
        if not any(p.stage is Stage.INSERT for p in self.passes):
            own.release_all(NOT_INSERTED)
        if own.choices.mode == "float" != ctx.choices.mode:
            _stay_float(body, own)
        self._run(lambda stage: stage > Stage.TRANSFORM, checks, body.graph, own)
        self.run(body.graph, own)
        for old, new in body.put_back(known).items():
            own.plan.rename(old, new)
            if old in ctx.origins:  # which all contexts share
                ctx.origins[new] = ctx.origins.pop(old)
        for decision in own.plan.decisions:
            ctx.plan.decide(_explained(decision, body, ctx.choices.mode, own.choices.mode))

    def _run(
        self, wanted: Callable[[Stage], bool], checks: list[Verify], graph: Graph, ctx: Context
    ) -> None:
        mine = (p for p in self.passes if wanted(p.stage) and p.name not in _OF_THE_MODEL)
        PassManager(tuple(mine), checks).run(graph, ctx)


def _context(ctx: Context, body: Body) -> Context:
    """A plan of the body's own; refusals and origins are those of the model."""
    mode = mode_of_bodies(ctx.target, ctx.choices.mode)
    settings = replace(ctx.choices, mode=mode, attention="float")
    return replace(
        ctx, choices=settings, plan=Plan(), ranges=Ranges(), requests=[], body_of=body.node.name
    )


def _stay_float(body: Body, ctx: Context) -> None:
    """Record why the weights of a body stay float where the target has no mode without ranges."""
    why = f"target {ctx.target.name!r} quantizes with calibrated ranges only"
    for tensor in body.graph.constants().values():
        if is_float(tensor) and (rank(tensor) or 0) > 1:
            ctx.plan.decide(Decision(tensor.name, "weight", None, why, uses_of(tensor)))


def _explained(decision: Decision, body: Body, asked: Mode, mode: Mode) -> Decision:
    """The decision, with the mode of bodies in its reason where that is not the model's."""
    if asked == mode or (decision.spec is None and mode != "float"):
        return decision
    where = f"in the body of {body.node.op} {body.node.name!r}, where no ranges are calibrated"
    what = f"{decision.reason}; " if decision.reason else ""
    return replace(decision, reason=f"{what}mode {mode} {where}")
