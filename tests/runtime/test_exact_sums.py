"""uint8 in place of int8 on the right: the same sums, exact on every processor.

On a processor that saturates these tests see the difference; elsewhere both sides are exact, and
what is looked at is the form of the graph.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from qcompile.ir.model_io.read_model import read_model
from qcompile.quant import Array
from qcompile.rewriting.testing import model_proto
from qcompile.runtime import session as runtime
from qcompile.runtime.exact_sums import exact_form
from qcompile.runtime.session import Session, SessionOptions

RNG = np.random.default_rng(0)
WEIGHT = RNG.integers(-127, 128, (70, 5)).astype(np.int8)
DATA = RNG.integers(-127, 128, (70, 3)).astype(np.int8)
LEFT = RNG.integers(0, 256, (4, 70)).astype(np.uint8)
SCALES = RNG.uniform(0.5, 2, 5).astype(np.float32)


def model() -> onnx.ModelProto:
    """A constant that two operators read, and data on the right."""
    return model_proto(
        """g (uint8[M,70] a, int8[70,N] b) => (int32[M,5] y, int32[M,N] z, float[M,5] f)
        { y = MatMulInteger(a, w, zero)
          z = MatMulInteger(a, b)
          f = com.microsoft.MatMulIntegerToFloat(a, w, s, t, zero) }""",
        w=WEIGHT,
        zero=np.array(7, np.uint8),
        s=np.array(0.5, np.float32),
        t=SCALES,
    )


def save(path: Path, *, apart: bool) -> None:
    """Weights in a file of their own, or with the model."""
    onnx.save(model(), path, save_as_external_data=apart, location="w.bin", size_threshold=10)


def expected() -> dict[str, Array]:
    sums = (LEFT.astype(np.int64) - 7) @ WEIGHT
    floats = sums.astype(np.float32) * (np.float32(0.5) * SCALES)
    return {"y": sums, "z": LEFT.astype(np.int64) @ DATA, "f": floats}


def right_types(made: onnx.ModelProto) -> list[int]:
    """Of the second operands that are constants."""
    kinds = {t.name: t.data_type for t in made.graph.initializer}
    ops = ("MatMulInteger", "MatMulIntegerToFloat")
    return [kinds[n.input[1]] for n in made.graph.node if n.op_type in ops and n.input[1] in kinds]


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("where", ["bytes", "file", "data file"])
def test_an_exact_session_is_exact_everywhere(tmp_path: Path, where: str, optimize: bool) -> None:
    source: bytes | Path = model().SerializeToString()
    if where != "bytes":
        source = tmp_path / "m.onnx"
        save(source, apart=where == "data file")
    options = SessionOptions(threads=1, optimize=optimize)
    found = Session(source, options).run({"a": LEFT, "b": DATA})
    for name, values in expected().items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    plain = Session(source, SessionOptions(threads=1, optimize=optimize, exact=False))
    made = plain.run({"a": LEFT, "b": DATA})
    assert (made["y"] == found["y"]).all() != runtime.saturates()


def test_the_form_is_the_same_function() -> None:
    """Seen without its session: the form by itself, as a processor with exact sums runs it too."""
    made = model()
    assert exact_form(made, optimized=False)
    onnx.checker.check_model(made)
    assert right_types(made) == [onnx.TensorProto.UINT8] * 2
    session = Session(made.SerializeToString(), SessionOptions(threads=1, exact=False))
    found = session.run({"a": LEFT, "b": DATA})
    for name, values in expected().items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_what_the_session_option_does_is_left_to_it() -> None:
    """Constants stay int8, but each operator gets its own: the option fails on shared ones."""
    made = model()
    assert exact_form(made)
    assert right_types(made) == [onnx.TensorProto.INT8] * 2
    ops = [n.op_type for n in made.graph.node]
    assert ops.count("Cast") == 2  # the data alone is shifted
    names = [n.input[1] for n in made.graph.node if n.op_type.startswith("MatMulInteger")]
    assert len(set(names)) == 3


def test_dequantizers_of_one_weight_are_copied_too() -> None:
    made = model_proto(
        """g (float[M,70] x) => (float[M,5] y) <float s = {0.1}, uint8 z = {0}, int8 o = {0}>
        { q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) v = DequantizeLinear(w, s, o)
          a = MatMul(d, v) b = MatMul(d, v) y = Add(a, b) }""",
        w=WEIGHT,
    )
    feed = {"x": RNG.uniform(0, 25, (3, 70)).astype(np.float32)}
    before = Session(made.SerializeToString(), SessionOptions(threads=1)).run(feed)["y"]
    assert exact_form(made)
    read_by = [n.input[0] for n in made.graph.node if n.op_type == "DequantizeLinear"]
    assert len(read_by) == 3 == len(set(read_by))
    after = Session(made.SerializeToString(), SessionOptions(threads=1, exact=False)).run(feed)["y"]
    assert (after == before).all() != runtime.saturates()


OTHERS = {
    "attention": """g (uint8[1,3,4] x) => (float[1,3,4] y)
    <float s = {0.02}, uint8 z = {7}, int8 o = {-3}, float[12] b = {0,0,0,0,0,0,0,0,0,0,0,0}>
    { y = com.microsoft.QAttention<num_heads = 2>(x, w, b, s, s, , z, o) }""",
    "recurrent": """g (float[3,1,4] f) => (float[3,1,1,3] y) <float[1] s = {0.01}, int8[1] o = {2}>
    { y = com.microsoft.DynamicQuantizeLSTM<hidden_size = 3>(f, v, r, , , , , , s, o, s, o) }""",
    "convolution": """g (int8[1,2,3,3] i) => (int32[1,1,3,3] y)
    <uint8[1,2,1,1] k = {200, 9}, uint8 z = {7}>
    { y = ConvInteger(i, k, , z) }""",
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_operators_with_int8_on_the_right(what: str) -> None:
    made = model_proto(OTHERS[what])
    given: dict[str, Array] = {
        "x": RNG.integers(0, 99, (1, 3, 4)).astype(np.uint8),
        "f": RNG.uniform(-1, 1, (3, 1, 4)).astype(np.float32),
        "i": RNG.integers(-40, 40, (1, 2, 3, 3)).astype(np.int8),
    }
    shapes = {"w": (4, 12), "v": (1, 4, 12), "r": (1, 3, 12)}  # small enough that nothing saturates
    read = {name for node in made.graph.node for name in node.input}
    for name in shapes.keys() & read:
        weight = RNG.integers(-60, 60, shapes[name]).astype(np.int8)
        made.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    feed: dict[str, Array] = {v.name: given[v.name] for v in made.graph.input}
    options = SessionOptions(threads=1, optimize=False, exact=False)
    before = Session(made.SerializeToString(), options).run(feed)["y"]
    assert exact_form(made, optimized=False)
    after = Session(made.SerializeToString(), options).run(feed)["y"]
    np.testing.assert_array_equal(after, before)


def test_a_model_without_int8_operands_is_left_alone() -> None:
    made = model_proto(
        """g (uint8[M,70] a, uint8[70,N] b, int8[M,70] c, int8[70,N] d)
            => (int32[M,N] y, int32[M,N] z) {
          y = MatMulInteger(a, b) z = MatMulInteger(c, d) }"""
    )
    text = made.SerializeToString()
    assert not exact_form(made, optimized=False) and not exact_form(made)
    assert made.SerializeToString() == text


def test_sessions_say_which_options_they_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "saturates", lambda: True)
    assert SessionOptions().entries == {"session.x64quantprecision": "1"}
    assert SessionOptions(exact=False).entries == {}
    assert SessionOptions(provider="CUDAExecutionProvider").entries == {}
    monkeypatch.setattr(runtime, "saturates", lambda: False)
    assert SessionOptions().entries == {}


def test_external_data_is_not_copied(tmp_path: Path) -> None:
    """Copies of a shared weight are references to the same place in its file."""
    save(tmp_path / "m.onnx", apart=True)
    made, storage = read_model(tmp_path / "m.onnx")
    assert exact_form(made, storage)
    weights = [t for t in made.graph.initializer if t.data_type == onnx.TensorProto.INT8]
    assert len(weights) == 2 and not any(t.raw_data for t in weights)
    assert len({t.external_data[1].value for t in weights}) == 1


def test_a_weight_per_channel_gets_the_zero_point_that_the_session_option_needs() -> None:
    """The option alone adds a scalar, with which a DequantizeLinear that is not fused fails."""
    text = """g (float16[2,4] x) => (float16[2,3] y)
        { w = DequantizeLinear<axis = 1>(q, s) y = MatMul(x, w) }"""
    values = np.arange(12, dtype=np.int8).reshape(4, 3) * 10
    made = model_proto(text, 19, q=values, s=np.full(3, 0.01, np.float16))
    assert exact_form(made) and len(made.graph.node[0].input) == 3
    onnx.checker.check_model(made)
    assert not exact_form(made)  # once
    source = model_proto(text, 19, q=values, s=np.full(3, 0.01, np.float16))
    found = Session(source.SerializeToString()).run({"x": np.ones((2, 4), np.float16)})["y"]
    # Four float16 roundings of sums up to 3.
    np.testing.assert_allclose(found[0], values.sum(0) * 0.01, atol=4 * 2.0**-10)
