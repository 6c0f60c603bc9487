"""A regression on features far from zero, whose answers become a constant in 8 and in 16 bits.

Its features have a spread that is small next to their offset: of 8 and of 16 bits, most are left
for the offset.
"""

from __future__ import annotations

import numpy as np
import pytest

import qcompile
from qcompile import Gates, Options, Recipe, RejectedError
from qcompile.data.feeds import Feed
from qcompile.quant import Array
from qcompile.rewriting.testing import model_proto
from qcompile.runtime.session import Session

OPTIONS = Options(bench=False, threads=1)
GATES = Gates(max_latency_ratio=None)
QDQ = Recipe(target="qdq")
_MEAN = np.repeat([2005.0, 101325.0], 4)
_STD = np.repeat([6.0, 0.7], 4)


def model() -> bytes:
    """Two layers, of which the first takes the features' offset off; the answer is 1000 ± 200."""
    rng = np.random.default_rng(3)
    first = rng.normal(size=(8, 32)) / np.sqrt(8)
    hidden = np.maximum(rng.normal(size=(4000, 8)) @ first, 0)
    last = rng.normal(size=(32, 1)) / np.sqrt(32)
    last *= 200 / (hidden @ last).std()
    text = """
      m (float[n, 8] features) => (float[n, 1] price) {
        h = Gemm(features, w1, b1)
        r = Relu(h)
        price = Gemm(r, w2, b2)
      }"""
    weights = {
        "w1": first / _STD[:, None],
        "b1": -(_MEAN / _STD) @ first,
        "w2": last,
        "b2": 1000 - (hidden @ last).mean(0),
    }
    floats = {name: weight.astype(np.float32) for name, weight in weights.items()}
    serialized: bytes = model_proto(text, **floats).SerializeToString()
    return serialized


def feeds(seed: int) -> list[Feed]:
    rng = np.random.default_rng(seed)
    rows: Array = (_MEAN + _STD * rng.normal(size=(128, 8))).astype(np.float32)
    return [{"features": part} for part in np.split(rows, 8)]


def test_it_is_refused_and_the_advice_works() -> None:
    with pytest.raises(RejectedError, match=r"R² .* is below 0.9 \(--min-single-r2\)") as caught:
        qcompile.compile(model(), feeds(0), recipe=QDQ, gates=GATES, options=OPTIONS)
    report = caught.value.result.report
    assert any("Options(search_time=300)" in text for text in report.note_texts)

    options = Options(bench=False, threads=1, search_time=60)
    made = qcompile.compile(model(), feeds(0), recipe=QDQ, gates=GATES, options=options)
    assert dict(made.report.recipe.precision)["features"] == "float"  # not 16 bits
    new = [{"features": feed["features"]} for feed in feeds(1)]
    old, compiled = (
        np.concatenate([session.run(feed)["price"] for feed in new])
        for session in (Session(model()), Session(made.model))
    )
    assert np.square(old - compiled).mean() < 0.1 * old.var()
