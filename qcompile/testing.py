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

_DIRECTIVE = re.compile(r"^\s*(?://|#)?\s*CHECK(?P<kind>[-A-Z]*)(?P<colon>\s*:?)(?P<rest>.*)$")
_KINDS = {"", "-NEXT", "-NOT", "-DAG", "-SAME", "-LABEL", "-COUNT"}


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


def check(graph: Graph, directives: str) -> None:
    """FileCheck the dump of a graph. Raises AssertionError showing where it does not match."""
    filecheck(dump(graph), directives)


def filecheck(text: str, directives: str) -> None:
    """FileCheck any text; near misses such as ``CHECKNEXT:`` are an error, not a comment."""
    from filecheck.finput import FInput
    from filecheck.matcher import Matcher
    from filecheck.options import Options
    from filecheck.parser import Parser

    _reject_near_misses(directives)
    options = Options(match_filename="<test>")
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
    found = 0
    for line in directives.splitlines():
        match = _DIRECTIVE.match(line)
        if match is None:
            continue
        if match["kind"] not in _KINDS or match["colon"] != ":":
            raise AssertionError(f"not a FileCheck directive, and it would check nothing: {line!r}")
        found += 1
    if not found:
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
