"""Switches: all on is what insert-qdq makes, all off is the float graph, one is one tensor."""

from __future__ import annotations

import copy
from collections.abc import Collection

import numpy as np
import pytest

from qcompile.calibration.collector import collect, collector
from qcompile.compiler.search.fake_quantized import (
    FakeQuantizedModel,
    FakeQuantSwitch,
    build_fake_quantized,
    make_switches,
    record_float_linears,
)
from qcompile.compiler.stages.pipelines import PLAN
from qcompile.ir import Graph
from qcompile.ir.model_io.to_proto import serialize
from qcompile.passes.lower.insert_qdq import InsertQdq
from qcompile.planning import Context
from qcompile.rewriting import Numerics, Pass, registry
from qcompile.rewriting.pipeline_spec import parse as passes_of
from qcompile.rewriting.testing import context, encoder, normal, outputs, parse, run_pass
from qcompile.runtime.session import Session, SessionOptions, evaluate

OUTLIER = 5.0  # a few more columns hold it


def feeds(count: int = 3) -> list[dict[str, np.ndarray]]:
    """Token ids of several lengths, some padded, for ``encoder``."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(count):
        ids = rng.integers(0, 64, (2, 5 + i))
        mask = np.ones_like(ids)
        mask[1, 4:] = 0
        found.append({"ids": ids, "attention_mask": mask})
    return found


def planned(graph: Graph, target: str, *passes: Pass, mode: str = "static") -> Context:
    """The plan and the ranges, after these passes of the transform stage."""
    ctx = context(target, mode=mode)
    run_pass(graph, *passes_of(PLAN), ctx=ctx)
    if ctx.requests:
        wanted = [t for p in passes for t in p.wants(graph, ctx)]
        made = collector(
            graph, ctx.requests, registry.calibrators()["minmax"](), evaluate, watched=wanted
        )
        ctx.ranges, ctx.channels = collect(made, feeds()), made.channels()
    return ctx


def run(made: FakeQuantizedModel, feed: dict[str, np.ndarray], on: Collection[int]) -> np.ndarray:
    session = Session(made.proto, SessionOptions(threads=1, optimize=False))
    return session.run({**feed, **made.settings(on)})["out"]


def both(
    graph: Graph, target: str, text: str = "", mode: str = "static"
) -> tuple[FakeQuantizedModel, list[FakeQuantSwitch], bytes]:
    """The switched model, and the bytes that insert-qdq makes of the same plan."""
    passes = passes_of(text) if text else ()
    ctx = planned(graph, target, *passes, mode=mode)
    lossy = [p for p in passes if p.numerics is Numerics.LOSSY]
    run_pass(graph, *(p for p in passes if p not in lossy), ctx=ctx)
    plain = record_float_linears(graph, ctx)
    run_pass(graph, *lossy, ctx=ctx)
    other, twin = copy_of(graph), copy.copy(ctx)
    twin.plan = copy.deepcopy(ctx.plan)
    found = make_switches(ctx)
    made = build_fake_quantized(graph, ctx, found, plain)
    run_pass(other, InsertQdq(), ctx=twin)
    return made, found, serialize(other)


def copy_of(graph: Graph) -> Graph:
    return Graph(graph.surgeon.copy(), graph.header)


CASES = [
    ("qdq", "", "static"),
    ("qdq", "round-weights", "static"),
    ("qdq", "permute-channels", "static"),
    ("qdq", "group-scales,round-weights", "static"),
    ("cpu", "", "static"),
    ("cpu", "migrate-scales,round-weights", "static"),
    ("cpu", "", "dynamic"),
    ("cpu", "round-weights,split-outliers{least_channels=8,share=0.5}", "static"),
    ("qdq", "", "weight-only"),
    *((t, ",".join(registry.target(t).transform["static"]), "static") for t in ("cpu", "qdq")),
]


@pytest.mark.parametrize(("target", "text", "mode"), CASES)
def test_all_on_is_what_insert_qdq_makes(target: str, text: str, mode: str) -> None:
    graph = encoder(2, width=16, outlier=OUTLIER)
    made, found, inserted = both(graph, target, text, mode)
    assert len(found) > 8
    if "least_channels" in text:
        assert any("/split" in p.tensor for s in found for p in s.parts), "nothing was split"
    for feed in feeds():
        expected = Session(inserted, SessionOptions(threads=1, optimize=False)).run(feed)["out"]
        np.testing.assert_array_equal(run(made, feed, range(len(found))), expected)


@pytest.mark.parametrize(("target", "text", "mode"), CASES)
def test_all_off_is_the_float_graph(target: str, text: str, mode: str) -> None:
    """Bit-equal where no pass moves numbers; a product over more columns may round otherwise."""
    graph = encoder(2, width=16, outlier=OUTLIER)
    expected = [outputs(graph, feed)["out"] for feed in feeds()]
    made, _, _ = both(graph, target, text, mode)
    atol = 1e-4 if text else 0.0
    for feed, old in zip(feeds(), expected, strict=True):
        np.testing.assert_allclose(run(made, feed, ()), old, atol=atol, rtol=0)
        assert not np.array_equal(run(made, feed, range(len(made.switches))), old)


@pytest.mark.parametrize("mode", ["static", "weight-only"])
def test_weights_quantized_in_another_shape_are_switched_in_their_own(mode: str) -> None:
    """Those of an LSTM have a scale for each row of each direction."""
    graph = parse(
        """g (float[T,N,24] x) => (float out) {
            out = LSTM<hidden_size = 32, direction = "bidirectional">(x, w, r) }""",
        w=normal(2, 128, 24) / 4,
        r=normal(2, 128, 32) / 4,
    )
    feed = {"x": normal(3, 2, 24)}
    old = outputs(graph, feed)["out"]
    made, found, inserted = both(graph, "cpu", mode=mode)
    new = Session(inserted, SessionOptions(threads=1, optimize=False)).run(feed)["out"]
    assert len(found) == 1 and not np.array_equal(old, new)
    np.testing.assert_array_equal(run(made, feed, ()), old)
    np.testing.assert_array_equal(run(made, feed, (0,)), new)
