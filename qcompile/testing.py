"""Helpers for tests of passes: graphs from text, FileCheck on dumps, differential runs."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx.parser

from qcompile import invariants, registry, shapes
from qcompile.api import Choices, Context, Pass
from qcompile.export import serialize
from qcompile.graph import Graph
from qcompile.loading import from_proto
from qcompile.manager import PassManager, Verify
from qcompile.qtypes import Array
from qcompile.runtime import Session, SessionOptions, evaluate
from qcompile.text import dump

# What filecheck understands; it passes over everything else in silence.
_DIRECTIVE = re.compile(r"CHECK(-(NEXT|NOT|DAG|SAME|LABEL|COUNT-[1-9]\d*))?(\{LITERAL\})?:")


# Sizes of symbolic dimensions in differential runs: all one, and odd ones.
_DIMS = ((1, 1), (2, 5), (3, 17))


def normal(*shape: int, seed: int = 0) -> Array:
    """Standard normal float32 values, the same in every run."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def parse(text: str, **weights: Array) -> Graph:
    """A graph from ONNX text; ``weights`` become initializers of those names.

    The text declares a weight as a graph input; the value given here replaces it.
    """
    model = onnx.parser.parse_model(text)
    for name, values in weights.items():
        inputs = [i for i in model.graph.input if i.name != name]
        del model.graph.input[:]
        model.graph.input.extend(inputs)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    onnx.checker.check_model(model)
    graph = from_proto(model)
    shapes.infer(graph)
    return graph


def context(target: str = "cpu", **choices: Any) -> Context:
    """A context as the compiler would make it."""
    return Context(registry.target(target), evaluate, Choices(**choices))


def run_pass(graph: Graph, *items: Pass, ctx: Context | None = None) -> Context:
    """Run passes with the verifier on; returns the context with its skips."""
    ctx = ctx or context()
    PassManager(items, (Verify(),)).run(graph, ctx)
    invariants.check(graph)
    return ctx


def assert_refused(graph: Graph, item: Pass, reason: str, ctx: Context | None = None) -> Context:
    """A pass leaves the whole graph as it is, and says why in these words."""
    before = dump(graph)
    ctx = run_pass(graph, item, ctx=ctx)
    reasons = [s.reason for s in ctx.skips if s.pass_name == item.name]
    assert dump(graph) == before, f"{item.name} changed the graph:\n{dump(graph)}"
    assert any(reason in r for r in reasons), f"no reason with {reason!r} in {reasons}"
    return ctx


def differential(
    graph: Graph,
    *items: Pass,
    atol: float,
    rtol: float = 0.0,
    feeds: Sequence[Mapping[str, Array]] = (),
    ctx: Context | None = None,
) -> Context:
    """Run passes, which must change the graph, and compare answers before and after, unoptimized.

    Without ``feeds``: random ones of several sizes, batch and sequence of one among them.
    """
    feeds = feeds or [random_feed(graph, i, dims) for i, dims in enumerate(_DIMS)]
    text = dump(graph)
    before = [outputs(graph, feed) for feed in feeds]
    ctx = run_pass(graph, *items, ctx=ctx)
    assert dump(graph) != text, "nothing changed: this would compare the graph with itself"
    for feed, expected in zip(feeds, before, strict=True):
        assert_equivalent(expected, outputs(graph, feed), atol=atol, rtol=rtol)
    return ctx


def plan_text(ctx: Context) -> str:
    """Decisions, one a line: ``weight w: int8:sym:channel[1] at MatMul:y.1 because ...``."""
    lines = []
    for d in ctx.plan.decisions:
        uses = ", ".join(f"{u.node}.{u.index}" for u in d.uses)
        lines.append(f"{d.kind} {d.tensor}: {d.spec or 'float'} at {uses} because {d.reason}\n")
    return "".join(lines)


def check(graph: Graph, directives: str) -> None:
    """FileCheck the dump of a graph. Raises AssertionError showing where it does not match."""
    filecheck(dump(graph), directives)


def filecheck(text: str, directives: str) -> None:
    """FileCheck any text. Each line must be a directive: ``CHECKNEXT:`` would check nothing."""
    from filecheck.finput import FInput
    from filecheck.matcher import Matcher
    from filecheck.options import Options
    from filecheck.parser import Parser

    _reject_near_misses(directives)
    options = Options(match_filename="<test>", reject_empty_vars=True)
    parser = Parser(options, io.StringIO(directives), *_pattern(options))
    matcher = Matcher(options, FInput("<dump>", text), parser)
    captured = io.StringIO()
    matcher.stderr = captured
    if matcher.run() != 0:
        raise AssertionError(f"{captured.getvalue()}\n--- dump ---\n{text}")


def _pattern(options: Any) -> tuple[Any, ...]:
    from filecheck.parser import pattern_for_opts

    return tuple(pattern_for_opts(options))


def _reject_near_misses(directives: str) -> None:
    lines = [line.strip() for line in directives.splitlines() if line.strip()]
    for line in lines:
        if not _DIRECTIVE.match(line):
            raise AssertionError(f"not a FileCheck directive, and it would check nothing: {line!r}")
    if not lines:
        raise AssertionError("no CHECK directive: this would check nothing")


def outputs(graph: Graph, feed: Mapping[str, Array], optimize: bool = False) -> dict[str, Array]:
    """Run a graph in ONNX Runtime as written."""
    options = SessionOptions(threads=1, optimize=optimize)
    return Session(serialize(graph), options).run(feed)


def assert_equivalent(
    before: Mapping[str, Array], after: Mapping[str, Array], *, atol: float, rtol: float = 0.0
) -> None:
    """Outputs agree within explicit tolerances, which the caller derives; shapes and types too."""
    assert list(before) == list(after), f"outputs {list(after)}, expected {list(before)}"
    for name, old in before.items():
        new = after[name]
        assert old.dtype == new.dtype, f"{name}: {new.dtype}, expected {old.dtype}"
        assert old.shape == new.shape, f"{name}: {new.shape}, expected {old.shape}"
        np.testing.assert_allclose(new, old, atol=atol, rtol=rtol, err_msg=name)


def random_feed(graph: Graph, seed: int = 0, dims: Sequence[int] = (2, 5)) -> dict[str, Array]:
    """Standard normal floats for every float input; symbolic dimensions get ``dims`` in order."""
    rng = np.random.default_rng(seed)
    sizes: dict[str, int] = {}
    feed: dict[str, Array] = {}
    for tensor in graph.inputs:
        shape = []
        for d in tensor.shape:
            if isinstance(d, str):
                d = sizes.setdefault(d, dims[len(sizes) % len(dims)])
            shape.append(d)
        values = rng.standard_normal(shape)
        feed[tensor.name] = values.astype(tensor.dtype)
    return feed
