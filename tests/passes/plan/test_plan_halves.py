"""Extrema of float data are asked for, whatever the calibrator is."""

from __future__ import annotations

from typing import Any

import numpy as np

from qcompile.passes.plan.plan_halves import PlanHalves
from qcompile.rewriting.testing import context, normal, parse, run_pass

BODY = """g (float[B,8] x, int64[B,1] mask) => (float[B,8] y) {
    m = MatMul(x, w) r = Reshape(m, shape) f = Cast<to = 1>(mask) y = Mul(r, f)
}"""


def requested(mode: Any) -> list[tuple[str, bool]]:
    graph = parse(BODY, w=normal(8, 8), shape=np.array([-1, 8]))
    ctx = run_pass(graph, PlanHalves(), ctx=context("tensorrt", mode=mode))
    return [(request.tensor, request.extrema) for request in ctx.requests]


def test_data_is_asked_for_once_and_masks_are_not() -> None:
    assert requested("static") == [("m", True), ("x", True), ("y", True)]


def test_without_calibration_nothing_is_asked_for() -> None:
    assert requested("float") == []
