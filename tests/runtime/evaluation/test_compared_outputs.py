"""Models that select by values are compared in front of the selection and behind it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import qcompile
from qcompile import Gates, Options
from qcompile.errors import DataError
from qcompile.ir import Graph
from qcompile.ir.analysis import shape_inference
from qcompile.ir.model_io.from_proto import from_proto
from qcompile.quant import Array
from qcompile.rewriting.testing import model_proto, normal
from qcompile.runtime.evaluation.compared_outputs import (
    Selection,
    compared_models,
    find_selection,
)
from qcompile.targets.target import Mode

OPTIONS = Options(bench=False, threads=1)
DATA = [{"x": normal(1, 8, 32, seed=i)} for i in range(6)]
W = {"w": normal(32, 32) / 6, "v": normal(32, 16, seed=1) / 6, "u": normal(32, 4, seed=2)}
NMS = """g (float[1,8,32] x) => (float[K,16] y, int64[K,3] found) {
    h = MatMul(x, w) boxes = MatMul(h, u) s = ReduceMean<axes = [2]>(h)
    scores = Sigmoid(s)
    one = Unsqueeze(scores, first) scored = Reshape(one, shape)
    found = NonMaxSuppression(boxes, scored, most, overlap, least)
    column = Gather<axis = 1>(found, two) rows = Squeeze(column, last)
    flat = Squeeze(h, zero)
    picked = Gather(flat, rows) y = MatMul(picked, v)
}"""
NONZERO = """g (float[1,8,32] x) => (float[K,16] y) {
    h = MatMul(x, w) s = ReduceMean<axes = [0, 2], keepdims = 0>(h)
    over = Greater(s, nothing) where = NonZero(over) rows = Squeeze(where, zero)
    flat = Squeeze(h, zero) picked = Gather(flat, rows) y = MatMul(picked, v)
}"""
COMPRESS = """g (float[1,8,32] x) => (float[1,K,16] y) {
    h = MatMul(x, w) s = ReduceMean<axes = [0, 2], keepdims = 0>(h) over = Greater(s, nothing)
    picked = Compress<axis = 1>(h, over) y = MatMul(picked, v)
}"""
TOPK = """g (float[1,8,32] x) => (float[3,16] y) {
    h = MatMul(x, w) s = ReduceMean<axes = [0, 2], keepdims = 0>(h)
    best, where = TopK(s, three) flat = Squeeze(h, zero)
    picked = Gather(flat, where) y = MatMul(picked, v)
}"""
DURATIONS = """g (float[1,8,32] x) => (float[1,T,16] y) {
    h = MatMul(x, w) s = ReduceMax<keepdims = 0>(h) e = Exp(s) n = Cast<to = 7>(e)
    m = Unsqueeze(n, zero) times = Concat<axis = 0>(ones, m, ones)
    long = Tile(h, times) y = MatMul(long, v)
}"""
BRANCH = """g (float[1,8,32] x, bool c) => (float[K] y) {
    h = MatMul(x, w) s = ReduceMean<axes = [0, 2], keepdims = 0>(h)
    y = If (c) <
        then_branch = a () => (float[K] p) {
            z = NonZero(s) q = Transpose(z) r = Squeeze(q, last) p = Gather(s, r) },
        else_branch = b () => (float[K] o) { o = Neg(s) }
    >
}"""
CONSTANTS: dict[str, Array] = {
    "first": np.array([0]), "zero": np.array([0]), "last": np.array([1]), "two": np.array([2]),
    "shape": np.array([1, 1, 8]), "most": np.array([8]), "overlap": np.array([0.5], np.float32),
    "least": np.array([0.5], np.float32), "nothing": np.array(0, np.float32),
    "three": np.array([3]), "ones": np.array([1]),
}  # fmt: skip
SELECTING = {
    "nms": (NMS, ["boxes", "scored"]),
    "nonzero": (NONZERO, ["s"]),
    "compress": (COMPRESS, ["s"]),
    "topk": (TOPK, ["s"]),
    "durations": (DURATIONS, ["e"]),
    "branch": (BRANCH, ["s"]),
}


def made(text: str) -> onnx.ModelProto:
    words = set(text.replace("(", " ").replace(")", " ").replace(",", " ").split())
    constants = {n: v for n, v in {**W, **CONSTANTS}.items() if n in words}
    return model_proto(text, **constants)


def selection_in(text: str) -> Selection | None:
    graph = from_proto(made(text))
    shape_inference.infer(graph)
    return find_selection(graph)


def feeds_for(text: str) -> list[dict[str, Array]]:
    return [{**f, "c": np.array(True)} if "bool c" in text else {**f} for f in DATA]


@pytest.mark.parametrize("name", SELECTING)
def test_what_decides_is_found(name: str) -> None:
    text, deciding = SELECTING[name]
    found = selection_in(text)
    assert found is not None and list(found.deciding) == deciding


@pytest.mark.parametrize("name", SELECTING)
def test_they_compile_and_verify(name: str) -> None:
    text, deciding = SELECTING[name]
    feeds = feeds_for(text)
    result = qcompile.compile(made(text), feeds, options=OPTIONS)
    verdict = result.report.verdict
    assert verdict is not None and verdict.worst_cosine > 0.99
    assert {"y", *deciding} <= {o.name for o in verdict.outputs}
    (note,) = (n for n in result.report.note_texts if "selects by values" in n)
    assert all(repr(name) in note for name in deciding)
    again = qcompile.verify(made(text), result.model, feeds)
    assert again.worst_cosine > 0.99 and again.selection is not None


@pytest.mark.parametrize(
    "text",
    [
        # by the mask that was fed, by sizes, by integers
        """g (float[1,8,32] x, int64[1,8] m) => (float[K,32] y) {
            h = MatMul(x, w) z = NonZero(m) t = Transpose(z) y = GatherND(h, t) }""",
        """g (float[1,8,32] x) => (float[1,N,32] y) {
            h = MatMul(x, w) s = Shape(h) y = Reshape(h, s) }""",
        # positions as an answer, not to select by
        """g (float[1,8,32] x) => (float[1,8,3] y, int64[1,8,3] i) {
            h = MatMul(x, w) y, i = TopK(h, three) }""",
    ],
)
def test_other_models_are_compared_as_they_are(text: str) -> None:
    assert selection_in(text) is None
    model = made(text).SerializeToString()
    models = compared_models(None, model, model)
    assert (models.reference, models.candidate) == (model, model) and not models.fed


def spoiled(name: str) -> Callable[[onnx.ModelProto], None]:
    """Replaces a weight by another one."""

    def edit(model: onnx.ModelProto) -> None:
        (tensor,) = (t for t in model.graph.initializer if t.name == name)
        values = normal(*tensor.dims, seed=99)
        tensor.CopyFrom(numpy_helper.from_array(values, name))

    return edit


@pytest.mark.parametrize("weight", ["w", "v"])
def test_errors_in_front_and_behind_are_seen(weight: str) -> None:
    wrong = made(NMS)
    spoiled(weight)(wrong)
    verdict = qcompile.verify(made(NMS), wrong, DATA, gates=Gates())
    behind = {o.name: o.worst_cosine for o in verdict.outputs}
    assert behind["y"] < 0.9
    assert (min(behind["boxes"], behind["scored"]) < 0.99) == (weight == "w")
    assert not verdict.passed


def test_without_it_their_outputs_have_other_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison that was there before refuses this pair."""
    wrong = made(NMS)
    spoiled("w")(wrong)
    monkeypatch.setattr("qcompile.compiler.python_api.find_selection", lambda graph: None)
    with pytest.raises(DataError, match="expected"):
        qcompile.verify(made(NMS), wrong, DATA)


def candidate(text: str) -> Graph:
    graph = from_proto(made(text))
    shape_inference.infer(graph)
    return graph


def test_a_tensor_under_another_name_is_found_by_what_reads_it() -> None:
    found = selection_in(NMS)
    assert found is not None
    assert found.places(candidate(NMS)) == {"boxes": "boxes", "scored": "scored"}
    other = NMS.replace("boxes", "boxes2").replace("scored", "scored2")
    assert found.places(candidate(other)) == {"boxes": "boxes2", "scored": "scored2"}


def test_where_a_tensor_is_gone_the_nearest_ones_before_it_are_compared() -> None:
    found = selection_in(NMS)
    assert found is not None
    gone = candidate("g (float[1,8,32] x) => (float[1,8] s) { h = MatMul(x, w) s = Abs(x) }")
    assert found.places(gone) == {"h": "h", "s": "s"}
    integers = candidate("g (int64[1,8,32] x) => (int64[1,8,32] h) { h = Abs(x) }")
    assert found.places(integers) == {}


def test_sensitivity_measures_them() -> None:
    result = qcompile.sensitivity(made(NMS), DATA, options=OPTIONS)
    assert result.quantized.mean_cosine > 0.99 and result.unquantized.mean_cosine > 0.9999


@pytest.mark.parametrize(("target", "mode"), [("tensorrt", "static"), ("cuda", "float")])
def test_for_a_provider_that_is_not_here_they_are_compared_too(target: str, mode: Mode) -> None:
    """The copies have external weights, which the emulation of float16 reads."""
    model = made(NONZERO)
    result = qcompile.compile(model, feeds_for(NONZERO), target=target, mode=mode, options=OPTIONS)
    verdict = result.report.verdict
    assert verdict is not None and verdict.worst_cosine > 0.99


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("target", "mode"), [("cpu", "static"), ("qdq", "static"), ("cpu", "float")]
)
def test_models_in_16_bits_select_the_same(kind: str, target: str, mode: Mode) -> None:
    """What decides is float32 in the compiled model, and rounded by a quantizer on target qdq."""
    number = {"float16": 10, "bfloat16": 16}[kind]
    half = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(number))
    text = f"""g (float[50,32] x) => (float[K,16] y) {{
        n = Cast<to = {number}>(x) h = MatMul(n, w) s = ReduceMean<axes = [1], keepdims = 0>(h)
        over = Greater(s, nothing) where = NonZero(over) rows = Squeeze(where, zero)
        p = Gather(h, rows) q = MatMul(p, v) y = Cast<to = 1>(q)
    }}"""
    weights = {name: W[name].astype(half) for name in ("w", "v")}
    model = model_proto(text, **weights, nothing=np.zeros((), half), zero=np.zeros(1, np.int64))
    feeds = [{"x": normal(50, 32, seed=k)} for k in range(8)]
    result = qcompile.compile(model, feeds, target=target, mode=mode, options=OPTIONS)
    verdict = result.report.verdict
    assert verdict is not None and verdict.worst_cosine > 0.99
    assert {"y", "s"} <= {o.name for o in verdict.outputs}
