"""The runtime layer: faults are ModelErrors of one line, taps and counts tell what runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx.parser
import pytest

from qcompile.errors import ModelError
from qcompile.ir.model_io.from_proto import from_proto
from qcompile.quant import Array
from qcompile.rewriting.testing import model_proto
from qcompile.runtime.session import (
    Session,
    SessionOptions,
    evaluate,
    optimized_ops,
    record_types,
    threads,
    with_outputs,
)

TEXT = """g (float[N,2] x, float[N,2] w) => (float[N,2] y) {
    a = Add(x, w) g = com.microsoft.Gelu(a) i = Identity(g) y = Abs(i)
}"""
FEED = {"x": np.ones((3, 2), np.float32), "w": np.zeros((3, 2), np.float32)}


def model(text: str = TEXT) -> onnx.ModelProto:
    return model_proto(text)


def test_bytes_and_paths_run_with_named_inputs_and_outputs(tmp_path: Path) -> None:
    data = model().SerializeToString()
    (tmp_path / "m.onnx").write_bytes(data)
    for source in (data, tmp_path / "m.onnx"):
        session = Session(source, SessionOptions(threads=1))
        assert (session.inputs, session.outputs) == (["x", "w"], ["y"])
        found = session.run({**FEED, "unused": np.ones(1)})
        assert found["y"].shape == (3, 2)
        session.call(FEED)


def test_only_asked_outputs_are_fetched() -> None:
    session = Session(with_outputs(model(), ["a", "g", "x"]).SerializeToString())
    assert list(session.run(FEED, ["g"])) == ["g"]
    assert np.array_equal(session.run(FEED)["x"], FEED["x"])


@pytest.mark.parametrize(
    ("feed", "said"),
    [
        ({"x": FEED["x"]}, "no value was fed for input 'w'"),
        ({**FEED, "w": np.ones((3, 2))}, "failed on the model: .*INVALID_ARGUMENT"),
        ({**FEED, "w": np.ones((2, 2), np.float32)}, "failed on the model"),
        ({**FEED, "w": np.ones(2, np.float32)}, "failed on the model"),
    ],
)
def test_feeds_that_do_not_fit(feed: dict[str, Array], said: str) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        Session(model().SerializeToString()).run(feed)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", [b"no model", Path("gone.onnx")])
def test_what_cannot_be_loaded(source: bytes | Path) -> None:
    with pytest.raises(ModelError, match="ONNX Runtime cannot load the model"):
        Session(source)
    with pytest.raises(ModelError, match="cannot load the model"):
        optimized_ops(b"no model")


def test_operators_are_counted_after_optimization() -> None:
    assert optimized_ops(model().SerializeToString()) == {
        "Add": 1,
        "com.microsoft.Gelu": 1,
        "Abs": 1,
    }


def test_types_are_recorded_from_a_run() -> None:
    found = record_types(with_outputs(model(), ["a", "g"]).SerializeToString(), FEED)
    assert found == {"a": (np.float32, 2), "g": (np.float32, 2)}


def test_constants_are_evaluated_with_functions_and_external_operators() -> None:
    graph = from_proto(
        model(
            """<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1, "local": 1]>
            g (float[2] x) => (float[2] y) <float[2] c = {-1, 2}> {
                a = Neg(c) b = com.microsoft.Gelu(a) d = local.Twice(a) e = Add(b, d) y = Add(x, e)
            }
            <opset_import: ["": 21], domain: "local"> Twice (p) => (q) { q = Add(p, p) }"""
        )
    )
    found = evaluate(graph, graph.nodes[:-1])
    assert isinstance(found, dict)
    assert found["d"].tolist() == [2, -4]
    assert sorted(found) == ["a", "b", "d", "e"]


def test_why_constants_cannot_be_evaluated() -> None:
    text = "g (float[2] x) => (float[2] y) <float[2] c = {-1, 2}> { a = org.New(c) y = Add(x, a) }"
    graph = from_proto(model(text))
    assert "org:New" in str(evaluate(graph, graph.nodes[:1]))


def test_profiles_are_written(tmp_path: Path) -> None:
    session = Session(model().SerializeToString(), SessionOptions(profile=tmp_path / "p"))
    session.run(FEED)
    events = json.loads(session.end_profile().read_text())
    assert any(e.get("args", {}).get("op_name") == "Abs" for e in events)
    assert threads() >= 1


def test_bfloat16_arithmetic_is_refused_with_the_way_out() -> None:
    inside = "c = Cast<to = 16>(x) m = MatMul(c, c) y = Cast<to = 1>(m)"
    other = "y = other.library.Own(x)"
    model, unknown = (
        model_proto(f"g (float[2,2] x) => (float[2,2] y) {{ {body} }}").SerializeToString()
        for body in (inside, other)
    )
    with pytest.raises(ModelError, match=r"Could not find.* bfloat16.*: compile it, with --mode"):
        Session(model)
    with pytest.raises(ModelError) as raised:
        Session(unknown)
    assert "bfloat16" not in str(raised.value)
