"""Models that other tools trained with fake quantization: the same integers, fewer bytes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest

import qcompile
from qcompile.compiler.stages.options import CompileOptions
from qcompile.ir import Graph
from qcompile.ir.model_io.to_proto import serialize
from qcompile.quant import Array
from qcompile.rewriting.testing import normal, parse
from qcompile.runtime.session import Session, SessionOptions
from qcompile.targets.target import Mode

UNTIMED = CompileOptions(bench=False)
F32 = np.float32


def linears(*, signed: bool = False, by_channel: bool = True, bias: str = "float") -> Graph:
    """Two layers whose float weights are quantized as torch stores them, and transposed after."""
    w, v = normal(64, 32) / F32(6), normal(8, 64, seed=1) / F32(8)
    points = np.array(0 if signed else 128, np.int8 if signed else np.uint8)
    rows = [np.abs(m).max(1) if by_channel else np.abs(m).max() for m in (w, v)]
    steps = [(r / 127).astype(F32) for r in rows]
    s = np.array(4 / 127, F32)
    b = normal(64) / F32(4)
    unit = (s * steps[0]).astype(F32)
    biased = "" if bias == "float" else "b = DequantizeLinear<axis = 0>(bq, u)"
    own = {"b": b} if bias == "float" else {"bq": np.rint(b / unit).astype(np.int32), "u": unit}
    return parse(
        f"""g (float[B,S,32] x) => (float[B,S,8] y) {{
            q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)
            wq = QuantizeLinear<axis = 0>(w, ws, wz) wd = DequantizeLinear<axis = 0>(wq, ws, wz)
            wt = Transpose<perm = [1, 0]>(wd) m = MatMul(d, wt) {biased} a = Add(m, b)
            r = Relu(a) p = QuantizeLinear(r, s, z) e = DequantizeLinear(p, s, z)
            vq = QuantizeLinear<axis = 0>(v, vs, vz) vd = DequantizeLinear<axis = 0>(vq, vs, vz)
            vt = Transpose<perm = [1, 0]>(vd) y = MatMul(e, vt)
        }}""",
        w=w,
        ws=steps[0],
        wz=np.zeros(steps[0].shape, np.int8),
        v=v,
        vs=steps[1],
        vz=np.zeros(steps[1].shape, np.int8),
        s=s,
        z=points,
        **own,
    )


def image(by_channel: bool = True) -> Graph:
    """Two convolutions with a pool, and a classifier, with quantizers between."""
    kernels: dict[str, Array] = {
        "k": normal(16, 8, 3, 3) / F32(8), "h": normal(16, 16, 3, 3, seed=1) / F32(12),
        "c": normal(5, 16, seed=2) / F32(4),
    }  # fmt: skip
    axes = {n: tuple(range(1, v.ndim)) if by_channel else None for n, v in kernels.items()}
    steps = {f"{n}s": (np.abs(v).max(axes[n]) / 127).astype(F32) for n, v in kernels.items()}
    points = {f"{n}z": np.zeros(steps[f"{n}s"].shape, np.int8) for n in kernels}
    pairs = "".join(
        f"{n}q = QuantizeLinear<axis = 0>({n}, {n}s, {n}z) "
        f"{n}d = DequantizeLinear<axis = 0>({n}q, {n}s, {n}z) "
        for n in kernels
    )
    return parse(
        f"""g (float[B,8,12,12] x) => (float[B,5] y) {{
            {pairs}
            q0 = QuantizeLinear(x, s, z) d0 = DequantizeLinear(q0, s, z)
            c1 = Conv<pads = [1, 1, 1, 1]>(d0, kd, b) r1 = Relu(c1)
            q1 = QuantizeLinear(r1, t, o) d1 = DequantizeLinear(q1, t, o)
            c2 = Conv<pads = [1, 1, 1, 1]>(d1, hd, b) r2 = Relu(c2)
            p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(r2)
            q2 = QuantizeLinear(p, t, o) d2 = DequantizeLinear(q2, t, o)
            g1 = GlobalAveragePool(d2) f = Flatten(g1)
            q3 = QuantizeLinear(f, t, o) d3 = DequantizeLinear(q3, t, o)
            y = Gemm<transB = 1>(d3, cd)
        }}""",
        **kernels,
        **steps,
        **points,
        b=normal(16) / F32(4),
        s=np.array(8 / 255, F32),
        z=np.array(128, np.uint8),
        t=np.array(4 / 255, F32),
        o=np.array(0, np.uint8),
    )


def compiled(graph: Graph, target: str, mode: Mode) -> tuple[onnx.ModelProto, float, float]:
    """The compiled model, its error against the given one, and its share of the bytes."""
    model = serialize(graph)
    shape = [d if isinstance(d, int) else 4 for d in graph.inputs[0].shape]
    feeds = [{"x": normal(*shape, seed=i)} for i in range(4)]
    data = feeds if mode == "static" else None
    result = qcompile.compile(model, data, target=target, mode=mode, options=UNTIMED)
    feed = {"x": normal(*shape, seed=9)}
    plain = SessionOptions(threads=1, optimize=False)
    old, new = (Session(m, plain).run(feed)["y"] for m in (model, result.model))
    assert not any("nothing was quantized" in n for n in result.report.note_texts)
    error = np.abs(new - old).max() / np.abs(old).max()
    return onnx.ModelProto.FromString(result.model), float(error), len(result.model) / len(model)


WAYS: list[tuple[str, Mode]] = [
    ("cpu", "static"),
    ("cpu", "dynamic"),
    ("cpu", "weight-only"),
    ("qdq", "static"),
]


@pytest.mark.parametrize(("target", "mode"), WAYS)
@pytest.mark.parametrize(
    "options", [{}, {"signed": True}, {"by_channel": False}, {"bias": "int32"}], ids=repr
)
def test_linears(options: dict[str, Any], target: str, mode: Mode) -> None:
    model, error, share = compiled(linears(**options), target, mode)
    assert error < 1e-5  # float rounding: the integers are the same
    assert share < 0.6
    scales = {onnx.numpy_helper.to_array(t).tobytes() for t in model.graph.initializer}
    assert np.array(4 / 127, F32).tobytes() in scales  # as it came
    operators = Counter(n.op_type for n in model.graph.node)
    if target == "cpu" and mode != "weight-only":
        assert operators["MatMulIntegerToFloat"] == 2
        assert operators["DequantizeLinear"] == 0
    else:
        assert operators["QuantizeLinear"] == 2


@pytest.mark.parametrize(("target", "mode"), WAYS)
@pytest.mark.parametrize("by_channel", [True, False])
def test_convolutions(by_channel: bool, target: str, mode: Mode) -> None:
    model, error, share = compiled(image(by_channel), target, mode)
    assert error < 0.02  # a value half way between two integers may become either
    assert share < 0.5
    if target == "cpu" and mode != "weight-only":
        operators = Counter(n.op_type for n in model.graph.node)
        assert operators["QLinearConv"] == 2
        assert operators["Conv"] == 0


def test_quantizers_of_data_alone_are_kept() -> None:
    """Weights are quantized as the plan says, data as the model says: once."""
    graph = parse(
        """g (float[B,32] x) => (float[B,64] y) {
            q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = MatMul(d, w)
        }""",
        s=np.array(0.03, F32),
        z=np.array(128, np.uint8),
        w=normal(32, 64),
    )
    for target, mode in WAYS[:2]:
        model, error, _ = compiled(graph, target, mode)
        operators = Counter(n.op_type for n in model.graph.node)
        assert operators == {"QuantizeLinear": 1, "MatMulIntegerToFloat": 1}
        assert error < 0.02


def saturating(then: str = "y = Relu(m)", **weights: Array) -> Graph:
    """A product whose sums exceed int16 on x86 without VNNI, by the weights that came."""
    return parse(
        f"""g (float[B,32] x) => (float[B,C] y) {{
            p = Abs(x) q = QuantizeLinear(p, s, z) d = DequantizeLinear(q, s, z)
            e = DequantizeLinear(w, t, k) m = MatMul(d, e) {then}
        }}""",
        s=np.array(0.02, F32),
        z=np.array(0, np.int8),
        w=np.full((32, 8), 127, np.int8) - np.arange(8, dtype=np.int8),
        t=np.array(0.01, F32),
        k=np.array(0, np.int8),
        **weights,
    )


def test_saturation_of_integers_that_came_is_noted_and_no_failure() -> None:
    feeds = [{"x": normal(8, 32, seed=i)} for i in range(4)]
    result = qcompile.compile(serialize(saturating()), feeds, options=UNTIMED)
    assert result.report.failures == []
    saturation = result.report.saturation
    assert saturation is not None
    assert not saturation.same_without_vnni
    assert any("outputs may differ on x86 without VNNI" in n for n in result.report.note_texts)


def test_saturation_fails_a_gate_where_weights_of_the_plan_are_involved() -> None:
    feeds = [{"x": normal(8, 32, seed=i)} for i in range(4)]
    graph = saturating("y = MatMul(m, v)", v=normal(8, 4))
    with pytest.raises(qcompile.RejectedError, match="on x86 without VNNI"):
        qcompile.compile(serialize(graph), feeds, options=UNTIMED)
