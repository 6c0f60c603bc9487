"""Weights with equal contents are stored once, also those that a pass derives for each reader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from qcompile.ir import Graph, array
from qcompile.ir.equal_constants import EqualConstants, is_weight
from qcompile.ir.model_io.read_model import load
from qcompile.quant import Array
from qcompile.rewriting.testing import (
    assert_equivalent,
    check,
    model_proto,
    normal,
    outputs,
    parse,
)

W = normal(16, 16)
TWO = "a = MatMul(x, v) y = MatMul(a, w)"


def graph(body: str = TWO, out: str = "float[N,16] y", **weights: Array) -> Graph:
    return parse(f"g (float[N,16] x, bool c) => ({out}) {{ {body} }}", **weights)


def changed(values: Array) -> Array:
    """The same but for its last value, which no sample of it holds."""
    new = values.copy()
    new[-1, -1] = np.nextafter(new[-1, -1], np.float32(9))
    return new


def test_equal_weights_become_one() -> None:
    model, before = graph(v=W, w=W.copy()), graph(v=W, w=W.copy())
    assert model.merge_weights()
    assert list(model.constants()) == ["v"]
    feed = {"x": normal(3, 16), "c": np.array(True)}
    assert_equivalent(outputs(before, feed), outputs(model, feed), atol=0)
    assert not model.merge_weights()


@pytest.mark.parametrize(
    "other",
    [changed(W), -W, W.astype(np.float64), W.reshape(16, 16, 1), normal(16, 16, seed=1)],
    ids=["last value", "sign", "type", "shape", "values"],
)
def test_different_weights_stay(other: Array) -> None:
    model = graph(
        "y = Identity(x) a = Abs(v) b = Abs(w)", "float[N,16] y, float a, float b", v=W, w=other
    )
    assert not model.merge_weights(transposed=True)


def test_zeros_of_both_signs_differ_and_nan_is_equal_to_itself() -> None:
    zeros, nan = np.zeros((16, 16), np.float32), np.full((16, 16), np.nan, np.float32)
    assert not graph(v=zeros, w=-zeros).merge_weights()
    assert graph(v=nan, w=nan.copy()).merge_weights()


def test_small_constants_and_vectors_stay() -> None:
    """A bias of zeros is no other layer's bias."""
    assert not is_weight((512,), 2048)
    assert not is_weight((1, 512), 2048)
    assert not is_weight((15, 17), 1020)
    assert is_weight((16, 16), 1024)
    model = graph(
        "a = Add(x, v) y = Add(a, w)", v=np.zeros(16, np.float32), w=np.zeros(16, np.float32)
    )
    assert not model.merge_weights()


def test_large_weights_are_compared_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.ir.equal_constants._CHUNK", 16)
    assert graph(v=W, w=W.copy()).merge_weights()
    assert not graph(v=W, w=changed(W)).merge_weights()


def test_weights_in_a_file_are_read_where_they_are_probably_equal(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(
        model_proto(
            f"g (float[N,16] x) => (float[N,16] y) {{ {TWO} }}", v=W, w=W
        ).SerializeToString()
    )
    model = load(path)
    assert model.merge_weights()
    assert list(model.constants()) == ["v"]


def test_what_a_subgraph_reads_keeps_its_name() -> None:
    branches = """ z = If (c) <
        then_branch = yes () => (float[16,16] p) { p = Neg(w) },
        else_branch = no () => (float[16,16] q) { q = Abs(w) }
    >"""
    model = graph(TWO + branches, "float[N,16] y, float[16,16] z", v=W, w=W)
    assert model.merge_weights()
    assert list(model.constants()) == ["w"]


def test_a_matrix_and_its_transpose_are_one() -> None:
    model, before = graph(v=W, w=W.T.copy()), graph(v=W, w=W.T.copy())
    assert not model.merge_weights()
    assert model.merge_weights(transposed=True)
    model.sort()
    assert list(model.constants()) == ["v"]
    check(
        model,
        "CHECK: [[T:%[^ ]+]] = Transpose(@v{{.*}}) {perm=[1, 0]}\nCHECK: %y = MatMul(%a, [[T]])",
    )
    feed = {"x": normal(3, 16), "c": np.array(True)}
    assert_equivalent(outputs(before, feed), outputs(model, feed), atol=0)


def test_of_transposed_integers_only_tables_are_one() -> None:
    """What looks for the int8 weight of a product expects a constant."""
    q = np.random.default_rng(0).integers(-9, 9, (16, 64), np.int8)
    body = "y = Gather(t, c8) z = MatMulInteger(x8, q)"
    text = f"g (int8[N,16] x8, int64[M] c8) => (int8[M,16] y, int32[N,64] z) {{ {body} }}"
    model = parse(text, q=q, t=q.T.copy())
    assert model.merge_weights(transposed=True)
    assert list(model.constants()) == ["q"]
    body = "y = MatMulInteger(c8, t) z = MatMulInteger(x8, q)"
    text = f"g (int8[N,16] x8, int8[M,64] c8) => (int32[M,16] y, int32[N,64] z) {{ {body} }}"
    assert not parse(text, q=q, t=q.T.copy()).merge_weights(transposed=True)


def test_a_weight_made_twice_in_a_pass_is_one_constant() -> None:
    model = graph(v=W, w=-W)
    first = model.constant("new", W * 2)
    assert model.constant("other", W * 2) is first
    assert model.constant("other", W * 3) is not first
    assert model.constant("bias", W[0]) is not model.constant("bias", W[0])


def test_the_next_pass_makes_its_own() -> None:
    """A pass that gives a weight new values that are the old ones has changed the graph."""
    model = graph(v=W, w=-W)
    first = model.constant("new", W)
    model.sort()
    assert model.constant("new", W) is not first


def test_a_kept_weight_is_found_too(tmp_path: Path) -> None:
    """Where memory is limited, new weights are in files."""
    found = EqualConstants()
    one = graph(v=W, w=-W).constants()["v"]
    found.add(one)
    assert found.find(W.copy()) is one
    assert found.find(array(one).T) is None


def test_integers_of_four_bits_with_and_without_a_sign_differ() -> None:
    """Numpy spells both types alike, and small numbers have the same bytes."""
    signed, unsigned = (
        onnx.helper.tensor_dtype_to_np_dtype(kind)
        for kind in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
    )
    values = np.arange(2048).reshape(32, 64) % 8
    known = EqualConstants()
    known.add(gs.Constant("w", values.astype(signed)))
    assert known.find(values.astype(signed)) is not None
    assert known.find(values.astype(unsigned)) is None
