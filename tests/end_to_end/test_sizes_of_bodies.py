"""The gate on size counts constants of bodies, before and after they are the model's."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

import qcompile
from qcompile import Options
from qcompile.compiler.stages.models import body_constants
from qcompile.rewriting.testing import model_proto, normal, parse

OPTIONS = Options(bench=False, threads=1)
FEEDS = [{"x": normal(4, 64, seed=k), "c": np.array(k % 2 == 0)} for k in range(6)]
OWN = """g (float[N,64] x, bool c) => (float[N,64] y) {
    y = If (c) <
        then_branch = yes () => (float[N,64] p) { k = Constant<value_float = 2.0>() p = Mul(x, k) },
        else_branch = no () => (float[N,64] q) <float[64,64] w = {W}> { q = MatMul(x, w) }
    >
}"""
TURNED = """g (float[N,64] x, bool c) => (float[N,64] y) {
    h = MatMul(x, w)
    y = If (c) <
        then_branch = yes () => (float[N,64] p) { p = MatMul(h, w) },
        else_branch = no () => (float[N,64] q) { t = Transpose<perm = [1, 0]>(w) q = MatMul(h, t) }
    >
}"""


def own() -> onnx.ModelProto:
    values = ", ".join(f"{v:.3f}" for v in normal(64, 64).reshape(-1) / 8)
    return model_proto(OWN.replace("{W}", f"{{{values}}}"))


@pytest.mark.parametrize("target", ["cpu", "qdq"])
def test_constants_of_bodies_are_no_growth(target: str) -> None:
    model = own()
    result = qcompile.compile(model, FEEDS, target=target, mode="float", options=OPTIONS)
    assert model.ByteSize() < len(result.model) < model.ByteSize() + 1024


def test_constants_of_bodies_count() -> None:
    text = OWN.replace("{W}", f"{{{', '.join(['1.0'] * 64 * 64)}}}")
    assert body_constants(parse(text.replace("value_float = 2.0", "value = float {2.0}"))) == {
        "w": 64 * 64 * 4,
        "k": 4,
    }


@pytest.mark.parametrize("target", ["cpu", "qdq"])
def test_a_weight_that_a_body_transposes_is_stored_once(target: Any) -> None:
    model = model_proto(TURNED, w=normal(64, 64) / 8)
    result = qcompile.compile(model, FEEDS, target=target, mode="float", options=OPTIONS)
    onnx.checker.check_model(result.model)
    assert len(result.model) < model.ByteSize() + 1024
    assert result.report.verdict is not None and result.report.verdict.worst_cosine > 0.9999
