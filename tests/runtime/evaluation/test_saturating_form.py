"""The form that saturates, operator by operator, and what is left or untouched."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto
from onnx.helper import make_node

from qcompile.ir.model_io import read_model
from qcompile.ir.model_io.external_data import Storage
from qcompile.quant import Array
from qcompile.rewriting.testing import model_proto
from qcompile.runtime.evaluation import saturating_form
from qcompile.runtime.evaluation.int16_saturation import HIGH
from qcompile.runtime.evaluation.saturating_form import SaturatingForm
from qcompile.runtime.session import Session, saturates, write_optimized
from tests.runtime.evaluation.paired_products import (
    MICROSOFT,
    PLAIN,
    answer,
    integers,
    model_of,
    requantized,
    run,
    saturated,
)

SHAPES = [(1, 1, 3), (1, 2, 1), (2, 3, 17), (5, 64, 16), (64, 65, 3)]  # rows, inputs, outputs


def parameters(rows: int, inputs: int, outputs: int) -> dict[str, Array]:
    """Constants of all products, by the names that ``NODES`` gives them."""
    r = np.random.default_rng(rows + inputs)
    return {
        "w": integers((inputs, outputs), np.int8, 1),
        "za": np.array(3, np.uint8),
        "zb": r.integers(-9, 9, outputs).astype(np.int8),
        "sa": np.array(0.02, np.float32),
        "sb": r.uniform(0.001, 0.01, outputs).astype(np.float32),
        "sr": r.uniform(0.01, 0.1, (rows, 1)).astype(np.float32),
        "b": r.normal(size=outputs).astype(np.float32),
        "c": r.integers(-9999, 9999, (1, outputs)).astype(np.int32),
        "sy": np.array(0.01 * math.sqrt(inputs), np.float32),
        "zy": np.array(120, np.uint8),
    }


@pytest.mark.parametrize("opset", [11, 21])
@pytest.mark.parametrize("shape", SHAPES)
def test_matmul_integer(shape: tuple[int, int, int], opset: int) -> None:
    p, x = parameters(*shape), integers(shape[:2], np.uint8)
    node = make_node("MatMulInteger", ["x", "w", "za", "zb"], ["y"])
    got = answer(model_of(node, {"x": x}, p, opset), {"x": x})
    assert (got == saturated(x, p["w"], (p["za"], p["zb"]))).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [["b"], []])
def test_matmul_integer_to_float(shape: tuple[int, int, int], bias: list[str]) -> None:
    p, x = parameters(*shape), integers(shape[:2], np.uint8)
    names = ["x", "w", "sa", "sb", "za", "zb", *bias]
    node = make_node("MatMulIntegerToFloat", names, ["y"], domain=MICROSOFT)
    got = answer(model_of(node, {"x": x}, p), {"x": x})
    want = saturated(x, p["w"], (p["za"], p["zb"])).astype(np.float32) * (p["sa"] * p["sb"])
    assert (got == (want + p["b"] if bias else want)).all()


@pytest.mark.parametrize("bias", [["b"], []])
def test_a_scale_for_each_row(bias: list[str]) -> None:
    shape = 5, 64, 16
    p, x = parameters(*shape), integers(shape[:2], np.uint8)
    names = ["x", "w", "sr", "sb", "za", "zb", *bias]
    node = make_node("MatMulIntegerToFloat", names, ["y"], domain=MICROSOFT)
    model = model_of(node, {"x": x}, p)
    got, whole = answer(model, {"x": x}), run(model, {"x": x})
    sums = saturated(x, p["w"], (p["za"], p["zb"])).astype(np.float32)
    offset = p["b"] * p["sr"] if bias else 0  # ONNX Runtime scales the bias too
    want = sums * p["sb"] * p["sr"] + offset
    # Up to three roundings of 2^-24 in each of two terms, and one of their sum, on either side.
    limit = 14 * 2.0**-24 * max(np.abs(whole).max(), np.abs(want).max())
    np.testing.assert_allclose(got, want, rtol=0, atol=limit if bias else 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_dynamic_quantize_matmul(shape: tuple[int, int, int]) -> None:
    p, levels = parameters(*shape), integers(shape[:2], np.uint8)
    levels.flat[0] = 255
    x = (levels.astype(np.float32) - np.float32(3)) * np.float32(0.5)
    x.flat[-1] = -1.5 if x.size > 1 else x.flat[-1]  # the range is 0 to 255 levels of 0.5
    node = make_node("DynamicQuantizeMatMul", ["x", "w", "sb", "", "b"], ["y"], domain=MICROSOFT)
    got = answer(model_of(node, {"x": x}, p), {"x": x})
    scale = np.float32((max(x.max(), 0) - min(x.min(), 0)) / np.float32(255))
    zero = np.rint(-min(x.min(), 0) / scale)
    data = np.clip(np.rint(x / scale) + zero, 0, 255).astype(np.uint8)
    sums = saturated(data, p["w"], (zero, 0)).astype(np.float32)
    assert (got == sums * (scale * p["sb"]) + p["b"]).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_qlinear_matmul(shape: tuple[int, int, int]) -> None:
    p, x = parameters(*shape), integers(shape[:2], np.uint8)
    node = make_node("QLinearMatMul", ["x", "sa", "za", "w", "sb", "zb", "sy", "zy"], ["y"])
    got = answer(model_of(node, {"x": x}, p), {"x": x})
    sums = saturated(x, p["w"], (p["za"], p["zb"]))
    assert (got == requantized(sums, p["sa"] * p["sb"] / p["sy"], p["zy"])).all()


def test_scales_are_multiplied_in_the_order_of_the_kernel() -> None:
    """left · right / output is 2^-15 here, and other orders are not, which halves show."""
    one, some = np.float32(2.0**-15), np.linspace(0.001, 0.01, 99, dtype=np.float32)
    pairs = ((a, b) for a in some for b in some)
    left, right = next((a, b) for a, b in pairs if a * (b / (a * b / one)) < one)
    held = {"sa": left, "sb": right, "sy": left * right / one, "z": np.uint8(0), "zb": np.int8(0)}
    weight = {"w": np.array([[127], [127], [127], [127], [127], [1]], np.int8)}
    # 32767 + 127 · 129 + 2 is 1.5 · 2^15, 2 · 32767 + 127 · 129 + 3 is 2.5 · 2^15.
    x = np.array([[255, 255, 0, 0, 129, 2], [255, 255, 255, 255, 129, 3]], np.uint8)
    node = make_node("QLinearMatMul", ["x", "sa", "z", "w", "sb", "zb", "sy", "z"], ["y"])
    constants = {name: np.asarray(value) for name, value in held.items()} | weight
    assert (answer(model_of(node, {"x": x}, constants), {"x": x}) == 2).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("across", [0, 1])
@pytest.mark.parametrize("output", [["sy", "zy"], []])
def test_qgemm(shape: tuple[int, int, int], across: int, output: list[str]) -> None:
    p, x = parameters(*shape), integers(shape[:2], np.uint8)
    stored = {**p, "w": p["w"].T.copy()} if across else p
    feeds = {"x": x.T.copy() if across else x}
    names = ["x", "sa", "za", "w", "sb", "zb", "c", *output]
    flags: dict[str, Any] = {"transA": across, "transB": across, "alpha": 0.3}
    node = make_node("QGemm", names, ["y"], domain=MICROSOFT, **flags)
    got = answer(model_of(node, feeds, stored), feeds)
    sums = saturated(x, p["w"], (p["za"], p["zb"])) + p["c"]
    scale = np.float32(0.3) * p["sa"] * p["sb"]
    floating = sums.astype(np.float32) * scale
    want = requantized(sums, scale / p["sy"], p["zy"]) if output else floating
    assert (got == want).all()


@pytest.mark.parametrize("inputs", [1, 2, 5, 64])
@pytest.mark.parametrize(
    ("left", "right"),
    [((2, 3, 5), (2, 3, 7)), ((1, 3, 5), (2, 1, 7)), ((5,), (2, 3, 4)), ((2, 4, 1), (1,))],
)
@pytest.mark.parametrize("constant", [False, True])
def test_stacks_of_matrices(
    left: tuple[int, ...], right: tuple[int, ...], inputs: int, constant: bool
) -> None:
    """Right operands that are data, as in attention, or constants of more than two dimensions."""
    x = integers((*left, inputs), np.uint8)
    w = integers((*right[:-1], inputs, right[-1]), np.int8, 1)
    node = make_node("MatMulInteger", ["x", "w", "z"], ["y"])
    feeds = {"x": x} if constant else {"x": x, "w": w}
    held = {"z": np.array(7, np.uint8)} | ({"w": w} if constant else {})
    assert (answer(model_of(node, feeds, held, 11), feeds) == saturated(x, w, (7, 0))).all()


@pytest.mark.parametrize("few", [0.0, 1.0])
def test_many_pairs(monkeypatch: pytest.MonkeyPatch, few: float) -> None:
    """More than a chunk: looked at one by one in a loop, or in chunks that share a column."""
    monkeypatch.setattr(saturating_form, "_FEW", few)
    x, w = np.full((2, 129), 255, np.uint8), np.full((129, 130), 127, np.int8)
    node = make_node("MatMulInteger", ["x", "w"], ["y"])
    model = model_of(node, {"x": x}, {"w": w})
    ops = {n.op_type for n in saturating_form.saturating_form(model).model.graph.node}
    assert ("Loop" in ops) == (few == 0) and ("CumSum" in ops) == (few == 1)
    assert (answer(model, {"x": x}) == 64 * HIGH + 255 * 127).all()


def test_a_form_is_not_the_exact_model() -> None:
    x, w = np.full((1, 4), 255, np.uint8), np.array([[127], [127], [-1], [5]], np.int8)
    model = model_of(make_node("MatMulInteger", ["x", "w"], ["y"], "n"), {"x": x}, {"w": w})
    form = saturating_form.saturating_form(model)
    assert form.emulated == ("n",) and form.left == ()
    assert run(model, {"x": x}) == (HIGH + 255 * 4 if saturates() else 255 * 258)
    assert answer(model, {"x": x}) == HIGH + 255 * 4


@pytest.mark.parametrize(
    "weight",
    [
        np.full((64, 3), 64, np.int8),  # 255 · 128 = 32640
        np.full((64, 3), 200, np.uint8),
        np.tile(np.array([[127], [-128]], np.int8), (32, 3)),
        np.full((1, 3), 127, np.int8),
    ],
)
def test_sums_that_fit_are_untouched(weight: Array) -> None:
    x = np.full((2, len(weight)), 255, np.uint8)
    model = model_of(make_node("MatMulInteger", ["x", "w"], ["y"]), {"x": x}, {"w": weight})
    form = saturating_form.saturating_form(model)
    assert (form.emulated, form.left) == ((), ()) and form.model == model


def test_signed_data_is_untouched() -> None:
    x = np.zeros((2, 4), np.int8)
    node = make_node("MatMulInteger", ["x", "w"], ["y"])
    form = saturating_form.saturating_form(model_of(node, {"x": x}, {"w": np.full_like(x.T, 127)}))
    assert (form.emulated, form.left) == ((), ())


LEFT = """<ir_version: 10, opset_import: ["": 17, "com.microsoft": 1, "own": 1]>
g (uint8[2,4] x, uint8[1,2,4] x3, int8[1,2,5,5] image, bool c, int8[4] vector)
  => (int32[2,2] y, float[1,2,12] a, int32 i, int32[2,2] o, int32[2] v)
<int8[4,2] w = {127,127,127,127,1,1,1,1}, float s = {1}, uint8 z = {0}, uint8[1,2,1,1] k = {9,9},
 int8[4,12] qkv, float[12] b = {1,1,1,1,1,1,1,1,1,1,1,1},
 int8[4,2] small = {1,1,1,1,1,1,1,1}> {
  [both] y = If (c) <
    then_branch = yes () => (int32[2,2] t) { [then] t = MatMulInteger(x, w) },
    else_branch = no () => (int32[2,2] e) { [else] e = MatMulInteger(x, small) }>
  [attention] a = com.microsoft.QAttention <num_heads = 2> (x3, qkv, b, s, s)
  [conv] i = ConvInteger(image, k)
  [call] o = own.product(x, w)
  [vector] v = MatMulInteger(x, vector)
}
<domain: "own", opset_import: ["": 17]>
product (p, q) => (r) { [inner] r = MatMulInteger(p, q) }
"""


def test_what_is_left_is_named() -> None:
    model = model_proto(LEFT, qkv=np.full((4, 12), 127, np.int8))
    form = saturating_form.saturating_form(model)
    assert form.emulated == ()
    assert form.left == (
        ("then", "it is in a body of both"),
        ("attention", "QAttention is not rebuilt"),
        ("conv", "int8 data by uint8 filters is not rebuilt"),
        ("vector", "its right operand is a vector"),
        ("inner", "it is in the function product"),
    )


def test_a_weight_that_a_feed_may_replace_is_data() -> None:
    x, w = np.full((1, 4), 255, np.uint8), np.ones((4, 1), np.int8)
    node = make_node("MatMulInteger", ["x", "w"], ["y"], "n")
    for feeds, emulated in (({"x": x}, ()), ({"x": x, "w": w}, ("n",))):
        form = saturating_form.saturating_form(model_of(node, feeds, {"w": w}))
        assert form.emulated == emulated


def test_unknown_types_are_left() -> None:
    node = make_node("MatMulInteger", ["x", "w"], ["y"], "n")
    x = np.zeros((2, 4), np.uint8)
    model = model_of(node, {"x": x}, {"w": np.full((4, 2), 127, np.int8)})
    model.graph.node.insert(0, make_node("Unheard", ["x"], ["u"], domain="own"))
    model.graph.node[1].input[0] = "u"
    left = saturating_form.saturating_form(model).left
    assert left == (("n", "the types of its operands are not known"),)


def test_names_that_are_taken() -> None:
    x, w = integers((2, 6), np.uint8), np.full((6, 2), 127, np.int8)
    node = make_node("MatMulInteger", ["x", "w"], ["y"], "n")
    once = saturating_form.saturating_form(model_of(node, {"x": x}, {"w": w})).model
    made = [name for n in once.graph.node for name in (n.name, *n.output)]
    assert len(set(made)) == len(made)
    twice = model_of(node, {"x": x}, {"w": w})
    for name in made[:-1]:
        twice.graph.node.append(make_node("Identity", ["x"], [name], f"{name}?"))
    assert (answer(twice, {"x": x}) == saturated(x, w)).all()


def dynamic(path: Path) -> dict[str, Array]:
    """Write a model that ONNX Runtime fuses to DynamicQuantizeMatMul; returns its data."""
    w = integers((96, 48), np.int8)
    model = model_proto(
        """g (float[n,96] x) => (float[n,48] y) <float s = {0.01}> {
          q, a, z = DynamicQuantizeLinear(x)
          i = MatMulInteger(q, w, z)
          f = Cast<to = 1>(i)
          m = Mul(a, s)
          y = Mul(f, m) }""",
        w=w,
    )
    onnx.save(model, path)
    return {"x": np.random.default_rng(0).normal(size=(3, 96)).astype(np.float32)}


def form_of(path: Path) -> SaturatingForm:
    return saturating_form.saturating_form(
        onnx.load(path, load_external_data=False), Storage(path.parent)
    )


def test_the_graph_that_really_runs(tmp_path: Path) -> None:
    feeds = dynamic(tmp_path / "model.onnx")
    path = write_optimized(tmp_path / "model.onnx", tmp_path)
    assert [n.op_type for n in onnx.load(path).graph.node] == ["DynamicQuantizeMatMul"]
    form = form_of(path)
    weight = next(t for t in form.model.graph.initializer if list(t.dims) == [96, 48])
    assert weight.data_location == TensorProto.EXTERNAL and len(form.emulated) == 1
    (tmp_path / "form.onnx").write_bytes(form.model.SerializeToString())
    runs = path if saturates() else tmp_path / "form.onnx"
    plain = saturating_form.saturating_form(onnx.load(tmp_path / "model.onnx")).model
    unfused = tmp_path / "unfused.onnx"
    onnx.save(onnx.load(tmp_path / "model.onnx") if saturates() else plain, unfused)
    got, want = (Session(p, PLAIN).run(feeds)["y"] for p in (runs, unfused))
    assert (got == want).all()  # the same arithmetic, in one operator or in five


def test_weights_that_were_not_read(tmp_path: Path) -> None:
    dynamic(tmp_path / "model.onnx")
    model, storage = read_model.read_model(tmp_path / "model.onnx")
    assert "w" in storage.spans
    form = saturating_form.saturating_form(model, storage)
    assert len(form.emulated) == 1
    assert not next(t for t in form.model.graph.initializer if t.name == "w").raw_data


def test_whether_sums_saturate_here_is_seen() -> None:
    x, w = np.full((1, 64), 255, np.uint8), np.full((64, 1), 127, np.int8)
    model = model_of(make_node("MatMulInteger", ["x", "w"], ["y"]), {"x": x}, {"w": w})
    assert run(model, {"x": x}) == (32 * HIGH if saturates() else 64 * 255 * 127)
