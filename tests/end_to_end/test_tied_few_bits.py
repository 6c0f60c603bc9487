"""A table of few bits that is the weight of the output layer too is one tensor in every form."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

import qcompile
from qcompile import Gates, Options, Recipe, Result
from qcompile.planning.context import WeightBits
from qcompile.quant import Array
from qcompile.rewriting.testing import model_proto, normal

ROWS, N = 600, 64
TABLE = normal(ROWS, N) / 8
BYTES = ROWS * N
IDS = {"ids": np.random.default_rng(2).integers(0, ROWS, (4, 9))}
OFF = Gates(min_cosine=None, min_worst_cosine=None, min_r2=None)
PACKED = (("table", "packed"),)
TARGETS: dict[str, dict[str, Any]] = {
    "cpu static": {"mode": "static"},
    "cpu static packed": {"mode": "static", "forms": PACKED},
    "cpu dynamic": {"mode": "dynamic"},
    "cpu weight-only": {"mode": "weight-only"},
    "cpu weight-only packed": {"mode": "weight-only", "forms": PACKED},
    "qdq static": {"target": "qdq", "mode": "static"},
    "qdq weight-only": {"target": "qdq", "mode": "weight-only"},
}
TURNED = np.ascontiguousarray(TABLE.T)
# Nodes from the lookup to the output, and the constants that they read.
FORMS: dict[str, tuple[str, dict[str, Array]]] = {
    "Transpose": (
        "e = Gather(t, ids) h = Tanh(e) o = Transpose<perm = [1, 0]>(t) y = MatMul(h, o)",
        {"t": TABLE},
    ),
    "bias": (
        """e = Gather(t, ids) h = Tanh(e) o = Transpose<perm = [1, 0]>(t) m = MatMul(h, o)
        y = Add(m, b)""",
        {"t": TABLE, "b": normal(ROWS)},
    ),
    "lookup in a Transpose": (
        "t = Transpose<perm = [1, 0]>(o) e = Gather(t, ids) h = Tanh(e) y = MatMul(h, o)",
        {"o": TURNED},
    ),
    "stored twice": (
        "e = Gather(t, ids) h = Tanh(e) y = MatMul(h, o)",
        {"t": TABLE, "o": TURNED},
    ),
    "Gemm": (
        """e = Gather(t, ids) h = Tanh(e) f = Reshape(h, flat) g = Gemm<transB = 1>(f, t)
        y = Reshape(g, whole)""",
        {"t": TABLE, "flat": np.array([-1, N]), "whole": np.array([-1, 9, ROWS])},
    ),
}


def compiled(form: str, weights: WeightBits | None, table: WeightBits, **settings: Any) -> Result:
    body, constants = FORMS[form]
    text = f"g (int64[B,9] ids) => (float[B,9,{ROWS}] y) {{ {body} }}"
    recipe = Recipe(weight_bits=weights, embedding_bits=table, **settings)
    options = Options(bench=False, threads=1)
    model = model_proto(text, **constants)
    return qcompile.compile(model, [IDS], recipe=recipe, gates=OFF, options=options)


def tensors(result: Result) -> list[int]:
    """Bytes of each integer constant that can hold the table, 2 bits a value or more."""
    stored = onnx.load_from_string(result.model).graph.initializer
    real = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    return [
        len(t.raw_data) for t in stored if t.data_type not in real and len(t.raw_data) >= BYTES // 4
    ]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("target", TARGETS)
def test_it_is_stored_once_with_the_larger_number_of_bits(form: str, target: str) -> None:
    """Rounding of weights at 8 bits leaves a cosine of .9999, at 4 bits in blocks one of .99, with
    room for these small models, whose every output has the error of a single layer.
    """
    cases: tuple[tuple[WeightBits | None, WeightBits], ...] = ((4, 4), (None, 4), (4, 2))
    for weights, table in cases:
        result = compiled(form, weights, table, **TARGETS[target])
        bits = max(weights or 8, table)
        assert tensors(result) == [BYTES * bits // 8], (weights, table)
        notes = " ".join(result.report.note_texts)
        said = f"stored once, in {bits} bits, the more of {table} for tables and {weights or 8}"
        assert (said in notes) == (bits != table)
        assert result.report.verdict is not None
        (output,) = result.report.verdict.outputs
        assert output.worst_cosine > (0.999 if bits == 8 else 0.97)


def test_these_tests_see_a_table_that_is_stored_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.passes.transform.tie_tables.TieTables.run", lambda *_: False)
    assert len(tensors(compiled("Transpose", 4, 4, mode="static"))) == 2


def test_a_bound_on_the_bits_of_both_is_that_of_one_integer_matrix() -> None:
    """Rows that are looked up are the columns of the layer, in integers and in scale: with the
    identity as the lookup's reader, the outputs are a matrix and its transpose multiplied.
    """
    body = "e = Gather(t, ids) o = Transpose<perm = [1, 0]>(t) y = MatMul(x, o)"
    text = f"""g (int64[R] ids, float[{N},{N}] x) =>
        (float[R,{N}] e, float[{N},{ROWS}] y) {{ {body} }}"""
    feed = {"ids": np.arange(ROWS), "x": np.eye(N, dtype=np.float32)}
    recipe = Recipe(
        mode="weight-only", weight_bits=4, embedding_bits=2, forms=(("weight-only-data", "float"),)
    )
    options = Options(bench=False, threads=1)
    model = model_proto(text, t=TABLE)
    result = qcompile.compile(model, [feed], recipe=recipe, gates=OFF, options=options)
    found = qcompile.session(result.model).run(None, feed)
    np.testing.assert_allclose(found[0], found[1].T, rtol=1e-6)  # two roundings of float32
