"""Models that were calibrated on short rows, with attention that long rows spread thin."""

from __future__ import annotations

import numpy as np
import pytest

import qcompile
from qcompile import Gates, Options, Recipe
from qcompile.ir.model_io.to_proto import serialize
from qcompile.quant import Array
from qcompile.rewriting.testing import normal, parse
from qcompile.runtime.evaluation.closeness import cosine
from qcompile.runtime.session import Session, SessionOptions

WIDTH, LONG = 16, 700  # 1/700 is less than half of 1/255
SCORES = """
    q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)
    kt = Transpose<perm = [0, 2, 1]>(k) s = MatMul(q, kt)
"""
# Attention as exporters have it, with masked rows set to 0, as Softmax in parts, and pooling of
# tokens by weights.
FORMS = {
    "softmax": f"{SCORES} p = Softmax<axis = -1>(s) c = MatMul(p, v)",
    "masked": f"""{SCORES} r = Softmax<axis = -1>(s) nan = IsNaN(r) p = Where(nan, zero, r)
        c = MatMul(p, v)""",
    "scaled": f"{SCORES} r = Softmax<axis = -1>(s) p = Mul(r, half) c = MatMul(p, v)",
    "in parts": f"""{SCORES} top = ReduceMax<axes = [-1]>(s) d = Sub(s, top) e = Exp(d)
        sum = ReduceSum(e, last) p = Div(e, sum) c = MatMul(p, v)""",
    "pooling": """v = MatMul(x, wv) s = MatMul(x, ws) p = Softmax<axis = 1>(s) m = Mul(p, v)
        c = ReduceSum(m, tokens)""",
}


def model(form: str) -> bytes:
    """x[B,S,16] to y: rows are even for tokens close to their mean, and peaked for others."""
    thin = {n: normal(WIDTH, WIDTH, seed=i) / 40 for i, n in enumerate(("wq", "wk"))}
    graph = parse(
        f"g (float[B,S,{WIDTH}] x) => (float[B,T,{WIDTH}] y) {{ {form} y = MatMul(c, wo) }}",
        **thin,
        wv=normal(WIDTH, WIDTH, seed=3),
        ws=normal(WIDTH, 1, seed=4) / 4,
        wo=normal(WIDTH, WIDTH, seed=5),
        zero=np.array(0, np.float32),
        half=np.array(0.5, np.float32),
        last=np.array([-1]),
        tokens=np.array([1]),
    )
    return serialize(graph)


def tokens(length: int, seed: int, spread: float = 0.5) -> dict[str, Array]:
    """Tokens around a mean, so that the mean of many values is not 0."""
    mean = normal(1, 1, WIDTH, seed=9)
    return {"x": mean + spread * normal(1, length, WIDTH, seed=seed)}


def kept(form: str, recipe: Recipe) -> dict[int, float]:
    """Cosine to the float model by length of the rows; the data for calibration is short.

    It has even and peaked rows, so 8 bits are steps of 1/255.
    """
    float_model = model(FORMS[form])
    result = qcompile.compile(
        float_model,
        [tokens(8, seed, spread) for seed in range(4) for spread in (0.5, 8.0)],
        recipe=recipe,
        gates=Gates(min_cosine=None, min_worst_cosine=None, min_r2=None),
        options=Options(bench=False, threads=1),
    )
    sessions = [Session(m, SessionOptions(threads=1)) for m in (float_model, result.model)]
    found = {}
    for length in (8, LONG):
        before, after = (s.run(tokens(length, 99))["y"].ravel() for s in sessions)
        found[length] = cosine(before, after)
    return found


@pytest.mark.parametrize("form", FORMS)
def test_probabilities_of_rows_longer_than_the_data_are_not_rounded_to_zero(form: str) -> None:
    found = kept(form, Recipe(target="qdq"))
    assert found[8] > 0.98 and found[LONG] > 0.99


def test_that_is_what_8_bits_on_request_do() -> None:
    found = kept("softmax", Recipe(target="qdq", precision=(("*", 8),)))
    assert found[8] > 0.99 and found[LONG] < 0.5
