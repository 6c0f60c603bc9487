"""The profile names every operator that ran, and sums what ONNX Runtime measured."""

from __future__ import annotations

import pytest

from qcompile.errors import ModelError
from qcompile.ir.model_io.to_proto import serialize
from qcompile.rewriting.testing import normal, parse
from qcompile.runtime.profiler import _summed, profile


def event(name: str, op: str, duration: float) -> dict[str, object]:
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": duration, "args": {"op_name": op}}


def test_nodes_count_by_their_median_and_sum_by_operator() -> None:
    runs = [*[100.0] * 5, 7.0, 9.0, 8.0]  # five to warm up
    events = [event("a", "MatMul", d) for d in runs] + [event("b", "MatMul", d) for d in runs]
    events += [event("c", "Add", 2.0) for _ in runs]
    events += [{"cat": "Session", "name": "model_run", "dur": 500, "args": {}}]
    found = _summed(events, warmup=5)
    assert [(o.op, o.nodes, o.ms) for o in found] == [("MatMul", 2, 0.016), ("Add", 1, 0.002)]


def test_operators_of_a_model_that_ran() -> None:
    graph = parse(
        "g (float[B,8] x) => (float[B,8] y) { m = MatMul(x, w) y = Tanh(m) }", w=normal(8, 8)
    )
    (found,) = profile([("one", serialize(graph))], {"x": normal(4, 8)}, threads=1, runs=3)
    assert {o.op: o.nodes for o in found.ops} == {"MatMul": 1, "Tanh": 1}
    assert found.total == pytest.approx(sum(o.ms for o in found.ops)) and found.total > 0
    assert found.to_dict()["ops"][0]["nodes"] == 1


def test_what_does_not_run_is_a_model_error() -> None:
    with pytest.raises(ModelError):
        profile([("none", b"no model")], {"x": normal(4, 8)}, threads=1, runs=1)
