"""Each operator against ONNX Runtime, and gradients in float64 against differences."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from qcompile.errors import TrainingError
from qcompile.ir.model_io.from_proto import from_proto
from qcompile.quant import Array
from qcompile.rewriting.testing import model_proto, outputs

torch = pytest.importorskip("torch")
operators = pytest.importorskip("qcompile.training.operators")
torch_graph = pytest.importorskip("qcompile.training.torch_graph")

# At most 64 summands, each rounded to float32, and functions within 16 of its last bits.
TOLERANCE = 64 * 2.0**-24


class Case(NamedTuple):
    """Nodes that compute ``r`` from inputs of ``FEED``, and the type of ``r``."""

    nodes: str
    result: str = "float"
    opset: int = 17


def _normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


FEED: dict[str, Array] = {
    "x": 2 * _normal(2, 3, 4),
    "y": _normal(2, 3, 4, seed=1),
    "p": np.abs(_normal(2, 3, 4, seed=2)) + np.float32(0.5),
    "u": np.tanh(_normal(2, 3, 4, seed=3)) * np.float32(0.9),
    "v": _normal(4, seed=4),
    "s": _normal(3, seed=5),
    "m": _normal(4, 5, seed=6),
    "a": _normal(3, 4, seed=7),
    "h": _normal(2, 4, 6, 6, seed=8),
    "w": _normal(4, 2, 3, 3, seed=9),
    "four": np.abs(_normal(4, seed=10)) + np.float32(0.5),
    "i": np.array([[0, -1], [2, 1]]),
    "n": np.array([[[-7, 5, 3, 2]] * 3, [[9, -4, 8, 1]] * 3]),
    "k": np.array([[[2, 3, -2, 5]] * 3] * 2),
    "b": np.arange(24).reshape(2, 3, 4) % 3 == 0,
    "c": np.arange(24).reshape(2, 3, 4) % 2 == 0,
    "t": np.array([[[1, 1, -3, -3]] * 3] * 2, np.float32),
    "q": np.array([[3, 250], [0, 128]], np.uint8),
    "e": np.array([3, 5], np.uint8),
    "nan": np.array([0.0, np.nan, np.inf, -np.inf], np.float32),
    "scale": np.array([0.1, 0.3], np.float32),
    "rounds": np.array([[0.25, -0.05, 1e9], [0.75, 0.15, -1e9]], np.float32),
    "z": np.array([[1.0, 0.0], [0.0, 2.0]], np.float32),
}
_TYPES = {"float32": "float", "int64": "int64", "bool": "bool", "uint8": "uint8"}


def _shape(values: str) -> str:
    return f"Constant <value = int64[{values.count(',') + 1}] {{{values}}}> ()"


CASES: dict[str, list[Case]] = {
    **{
        op: [Case(f"r = {op}(x)")]
        for op in (
            "Abs",
            "Atan",
            "Asinh",
            "Ceil",
            "Cos",
            "Cosh",
            "Erf",
            "Exp",
            "Floor",
            "Identity",
            "Neg",
            "Relu",
            "Sigmoid",
            "Sign",
            "Sin",
            "Sinh",
            "Softplus",
            "Softsign",
            "Tanh",
            "Round",
        )
    },
    **{op: [Case(f"r = {op}(u)")] for op in ("Acos", "Asin", "Atanh", "Tan")},
    **{op: [Case(f"r = {op}(p)")] for op in ("Log", "Reciprocal", "Sqrt")},
    **{op: [Case(f"r = {op}(x, v)")] for op in ("Add", "Mul", "Sub")},
    **{op: [Case(f"r = {op}(b, c)", "bool")] for op in ("And", "Or", "Xor")},
    **{
        op: [Case(f"r = {op}(n, k)", "bool")]
        for op in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
    },
    **{op: [Case(f"r = {op}(x, y, v)")] for op in ("Max", "Mean", "Min", "Sum")},
    **{
        op: [Case(f"r = {op}(n, k)", "int64", 18)]
        for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor")
    },
    **{
        op: [
            Case(f"r = {op} <keepdims = 0> (p)"),
            Case(f"r = {op} <axes = [-1, 0]> (p)", opset=11),
            Case(f"g = {_shape('1')} r = {op}(p, g)", opset=18),
            Case(f"r = {op} <noop_with_empty_axes = 1> (p)", opset=18),
        ]
        for op in (
            "ReduceL1",
            "ReduceL2",
            "ReduceLogSum",
            "ReduceLogSumExp",
            "ReduceMax",
            "ReduceMean",
            "ReduceMin",
            "ReduceProd",
            "ReduceSum",
            "ReduceSumSquare",
        )
    },
    "Acosh": [Case("o = Constant <value = float {1.0}> () f = Add(p, o) r = Acosh(f)")],
    "ArgMax": [
        Case(f"r = ArgMax <axis = 2, {extra}> (t)", "int64")
        for extra in ("keepdims = 0", "select_last_index = 1")
    ],
    "ArgMin": [Case("r = ArgMin <axis = -2, select_last_index = 1> (t)", "int64")],
    "AveragePool": [
        Case(f"r = AveragePool <kernel_shape = [3, 3], {extra}> (h)")
        for extra in (
            "pads = [1, 1, 1, 1]",
            "pads = [0, 1, 2, 0], strides = [2, 2]",
            "pads = [0, 1, 2, 0], count_include_pad = 1",
            'auto_pad = "SAME_UPPER"',
        )
    ],
    "BatchNormalization": [Case("r = BatchNormalization <epsilon = 0.1> (h, v, v, v, four)")],
    "BitShift": [Case('r = BitShift <direction = "RIGHT"> (q, e)', "uint8")],
    "BitwiseNot": [Case("r = BitwiseNot(n)", "int64", 18)],
    "Cast": [
        Case("r = Cast <to = 7> (x)", "int64"),
        Case("r = Cast <to = 9> (n)", "bool"),
        Case("r = Cast <to = 1> (b)"),
    ],
    "CastLike": [Case("r = CastLike(x, n)", "int64")],
    "Celu": [Case("r = Celu <alpha = 2.0> (x)")],
    "Clip": [
        Case("r = Clip <min = -0.5> (x)", opset=6),
        Case("r = Clip(x)"),
        Case("g = Constant <value = float {0.5}> () r = Clip(x, , g)"),
    ],
    "Concat": [Case("r = Concat <axis = -2> (x, y)")],
    "Constant": [Case("f = Constant <value_floats = [1.0, 2.0, 3.0, 4.0]> () r = Add(v, f)")],
    "ConstantOfShape": [
        Case("f = Shape(x) r = ConstantOfShape <value = float[1] {2.5}> (f)"),
        Case("f = Shape(x) r = ConstantOfShape(f)"),
    ],
    "Conv": [
        Case(f"r = Conv <{extra}> (h, w)")
        for extra in (
            "group = 2, pads = [1, 1, 1, 1], strides = [2, 1]",
            'group = 2, auto_pad = "SAME_LOWER"',
            "group = 2, dilations = [2, 1], pads = [0, 1, 2, 0]",
            'group = 2, auto_pad = "VALID"',
        )
    ],
    "ConvTranspose": [
        Case(
            "r = ConvTranspose <strides = [2, 2], pads = [1, 1, 1, 1], output_padding = [1, 0]> "
            "(h, w)"
        )
    ],
    "CumSum": [
        Case(f"g = Constant <value = int64 {{-1}}> () r = CumSum <{extra}> (x, g)")
        for extra in ("reverse = 1", "exclusive = 1")
    ],
    "DepthToSpace": [
        Case("r = DepthToSpace <blocksize = 2> (h)"),
        Case('r = DepthToSpace <blocksize = 2, mode = "CRD"> (h)'),
    ],
    "DequantizeLinear": [
        Case("r = DequantizeLinear <axis = 1> (q, scale, e)"),
        Case("r = DequantizeLinear(q, scale)"),
        Case("l = Constant <value = float {0.1}> () r = DequantizeLinear(q, l)"),
    ],
    "Div": [Case("r = Div(x, p)"), Case("r = Div(n, k)", "int64")],
    "Dropout": [Case("r, f = Dropout(x)")],
    "Einsum": [Case('r = Einsum <equation = "bsd, dk -> bks"> (x, m)')],
    "Elu": [Case("r = Elu <alpha = 2.0> (x)")],
    "Expand": [Case(f"g = {_shape('5, 1, 4')} r = Expand(a, g)", opset=13)],
    "EyeLike": [Case("r = EyeLike <k = -1> (m)"), Case("r = EyeLike <dtype = 7> (m)", "int64")],
    "Flatten": [Case("r = Flatten(x)"), Case("r = Flatten <axis = -1> (x)")],
    "Gather": [
        Case("r = Gather(a, i)"),
        Case("r = Gather <axis = -2> (x, i)"),
        Case("g = Constant <value = int64 {-1}> () r = Gather <axis = 1> (x, g)"),
    ],
    "GatherElements": [Case("r = GatherElements <axis = 1> (a, i)")],
    "GatherND": [
        Case("r = GatherND(a, i)"),
        Case("g = Constant <value = int64[2, 1] {2, 0}> () r = GatherND <batch_dims = 1> (x, g)"),
    ],
    "Gelu": [Case("r = Gelu(x)", opset=20), Case('r = Gelu <approximate = "tanh"> (x)', opset=20)],
    "Gemm": [
        Case("r = Gemm(a, m)"),
        Case("r = Gemm <alpha = 0.5, beta = 2.0, transA = 1> (a, a, v)"),
        Case("r = Gemm <transB = 1> (a, a, s)"),
        Case("r = Gemm <alpha = 0.5> (a, m)"),
    ],
    "GlobalAveragePool": [Case("r = GlobalAveragePool(h)")],
    "GlobalMaxPool": [Case("r = GlobalMaxPool(h)")],
    "GroupNormalization": [Case("r = GroupNormalization <num_groups = 2> (h, v, four)", opset=21)],
    "HardSigmoid": [Case("r = HardSigmoid <alpha = 0.4> (x)")],
    "InstanceNormalization": [Case("r = InstanceNormalization <epsilon = 0.1> (h, v, four)")],
    "IsInf": [
        Case("r = IsInf(nan)", "bool"),
        Case("r = IsInf <detect_negative = 0> (nan)", "bool"),
    ],
    "IsNaN": [Case("r = IsNaN(nan)", "bool")],
    "LayerNormalization": [
        Case("r = LayerNormalization <epsilon = 0.1> (x, v, v)"),
        Case("r = LayerNormalization(x, v)"),
        Case("r = LayerNormalization <axis = 1> (x, a, a)"),
        Case("f, g, r = LayerNormalization(x, v)"),
        Case("f, r = LayerNormalization(x, v)"),
    ],
    "LeakyRelu": [Case("r = LeakyRelu <alpha = 0.2> (x)")],
    "HardSwish": [Case("r = HardSwish(x)")],
    "Mish": [Case("r = Mish(x)", opset=18)],
    "LogSoftmax": [Case("r = LogSoftmax <axis = 1> (x)")],
    "LpNormalization": [
        Case("r = LpNormalization <axis = 1, p = 1> (x)"),
        Case("r = LpNormalization(z)"),
    ],
    "MatMul": [Case("r = MatMul(x, m)"), Case("r = MatMul(v, m)")],
    "MaxPool": [
        Case(f"r = MaxPool <kernel_shape = [3, 3], {extra}> (h)")
        for extra in (
            "pads = [1, 1, 1, 1], strides = [2, 2]",
            "pads = [0, 1, 2, 0]",
            "ceil_mode = 1, strides = [2, 2]",
        )
    ],
    "Mod": [Case("r = Mod(n, k)", "int64"), Case("r = Mod <fmod = 1> (x, p)")],
    "NonZero": [Case("r = NonZero(b)", "int64")],
    "Not": [Case("r = Not(b)", "bool")],
    "OneHot": [
        Case(
            "d = Constant <value = int64 {3}> () f = Constant <value = float[2] {0.5, 2.0}> ()"
            f" r = OneHot <axis = {axis}> (i, d, f)"
        )
        for axis in (-1, 1)
    ],
    "PRelu": [Case("r = PRelu(x, v)")],
    "Pad": [
        *(
            Case(f'f = {_shape("0, 1, 2, 0, 0, 3")} r = Pad <mode = "{mode}"> (x, f)')
            for mode in ("constant", "reflect", "edge")
        ),
        Case(
            f"f = {_shape('0, -1, 2, 1, 0, -1')} l = Constant <value = float {{7.0}}> () "
            "r = Pad(x, f, l)"
        ),
        Case(
            f'f = {_shape("3, 1")} g = {_shape("-1")} r = Pad <mode = "wrap"> (x, f, , g)', opset=19
        ),
        Case("r = Pad <pads = [1, 0, 0, 2], value = 3.0> (a)", opset=10),
    ],
    "Pow": [
        Case("r = Pow(p, y)"),
        Case("l = Constant <value = float {3.0}> () r = Pow(x, l)"),
        Case("l = Constant <value = float {2.0}> () r = Pow(n, l)", "int64"),
    ],
    "QuantizeLinear": [
        Case("l = Constant <value = float {0.1}> () r = QuantizeLinear(rounds, l)", "uint8"),
        Case(
            "l = Constant <value = float {0.1}> () o = Constant <value = int8 {-3}> () "
            "r = QuantizeLinear(rounds, l, o)",
            "int8",
        ),
        Case("r = QuantizeLinear <axis = 0> (rounds, scale, e)", "uint8"),
    ],
    "RMSNormalization": [Case("r = RMSNormalization <axis = 1> (x, a)", opset=23)],
    "Range": [
        Case(
            "f = Size(x) o = Constant <value = int64 {3}> () l = Constant <value = int64 {5}> () "
            "r = Range(o, f, l)",
            "int64",
        )
    ],
    "Reshape": [
        Case(f"f = {_shape('0, -1')} r = Reshape(x, f)"),
        Case(
            f"f = {_shape('2')} g = {_shape('1')} l = Slice(x, f, g) o = {_shape('0, 3, 8')} "
            "r = Reshape <allowzero = 1> (l, o)"
        ),
    ],
    "Resize": [
        Case(
            f'l = {_shape("2, 4, 9, 4")} r = Resize <mode = "{mode}", '
            f'coordinate_transformation_mode = "{frame}"> (h, , , l)'
        )
        for mode, frame in (
            ("linear", "half_pixel"),
            ("linear", "align_corners"),
            ("cubic", "half_pixel"),
        )
    ]
    + [
        Case(
            'l = Constant <value = float[4] {1, 1, 2.5, 0.6}> () r = Resize <mode = "nearest", '
            'coordinate_transformation_mode = "asymmetric", nearest_mode = "floor"> (h, , l)'
        )
    ],
    "ScatterElements": [
        Case('r = ScatterElements <axis = 1, reduction = "add"> (a, i, z)', opset=18),
        Case("r = ScatterElements <axis = 1> (a, i, z)"),
    ],
    "ScatterND": [
        Case("l = Constant <value = float[2] {5.0, 6.0}> () r = ScatterND(a, i, l)"),
        Case(
            "l = Constant <value = int64[2, 1] {1, 1}> () f = Concat <axis = 0> (v, v) "
            f"g = {_shape('2, 4')} o = Reshape(f, g) "
            'r = ScatterND <reduction = "add"> (a, l, o)',
            opset=16,
        ),
    ],
    "Selu": [Case("r = Selu(x)")],
    "Shape": [
        Case("r = Shape <start = -2> (x)", "int64"),
        Case("r = Shape <end = 1> (x)", "int64"),
    ],
    "SimplifiedLayerNormalization": [
        Case("r = SimplifiedLayerNormalization <epsilon = 0.1> (x, v)")
    ],
    "Size": [Case("r = Size(x)", "int64")],
    "Slice": [
        Case("r = Slice <starts = [1, -3], ends = [9, -1], axes = [1, 2]> (x)", opset=9),
        Case(
            f"f = {_shape('-1, 0')} g = {_shape('-9223372036854775808, 9223372036854775807')} "
            f"o = {_shape('1, -1')} l = {_shape('-1, 2')} r = Slice(x, f, g, o, l)"
        ),
        Case(f"f = {_shape('2')} g = {_shape('1')} r = Slice(x, f, g)"),
        Case(
            f"f = {_shape('1')} g = {_shape('2')} o = {_shape('2')} l = {_shape('-1')} "
            "r = Slice(x, f, g, o, l)"
        ),
    ],
    "Softmax": [
        Case("r = Softmax <axis = 1> (x)"),
        Case("r = Softmax(x)"),
        Case("r = Softmax(x)", opset=11),
        Case("r = Softmax <axis = 2> (x)", opset=11),
    ],
    "SpaceToDepth": [Case("r = SpaceToDepth <blocksize = 3> (h)")],
    "Split": [
        Case("f, r = Split <axis = -1> (x)"),
        Case(f"l = {_shape('1, 2')} f, r = Split <axis = 1> (x, l)"),
        Case("r, f = Split <axis = 1, num_outputs = 2> (x)", opset=18),
        Case("f, r = Split <axis = 1, split = [1, 2]> (x)", opset=11),
    ],
    "Squeeze": [
        Case(f"l = {_shape('0, -1')} f = Unsqueeze(x, l) r = Squeeze(f)"),
        Case(f"l = {_shape('0, -1')} f = Unsqueeze(x, l) r = Squeeze(f, l)"),
    ],
    "Swish": [Case("r = Swish <alpha = 1.5> (x)", opset=24)],
    "ThresholdedRelu": [Case("r = ThresholdedRelu <alpha = 0.7> (x)")],
    "Tile": [Case(f"f = {_shape('2, 1, 3')} r = Tile(x, f)")],
    "TopK": [
        Case(f"l = {_shape('3')} f, r = TopK(t, l)", "int64"),
        Case(f"l = {_shape('2')} r, f = TopK <axis = 1, largest = 0> (x, l)"),
    ],
    "Transpose": [Case("r = Transpose(x)"), Case("r = Transpose <perm = [1, 0, 2]> (x)")],
    "Trilu": [
        Case("r = Trilu(x)"),
        Case("l = Constant <value = int64 {-1}> () r = Trilu <upper = 0> (x, l)"),
    ],
    "Unsqueeze": [
        Case(f"l = {_shape('3, 0, -2')} r = Unsqueeze(x, l)"),
        Case("r = Unsqueeze <axes = [0, 2]> (x)", opset=11),
    ],
    "Where": [Case("r = Where(b, x, v)")],
    "com.microsoft.BiasGelu": [Case("r = com.microsoft.BiasGelu(x, v)")],
    "com.microsoft.DequantizeLinear": [
        Case("r = com.microsoft.DequantizeLinear <axis = 1> (q, scale, e)")
    ],
    "com.microsoft.FastGelu": [
        Case("r = com.microsoft.FastGelu(x, v)"),
        Case("r = com.microsoft.FastGelu(x)"),
    ],
    "com.microsoft.FusedMatMul": [
        Case("r = com.microsoft.FusedMatMul <alpha = 0.5, transB = 1> (x, y)"),
        Case("r = com.microsoft.FusedMatMul <transA = 1> (x, y)"),
        Case("r = com.microsoft.FusedMatMul <transBatchA = 1, transBatchB = 1, transA = 1> (x, y)"),
    ],
    "com.microsoft.Gelu": [Case("r = com.microsoft.Gelu(x)")],
    "com.microsoft.QuantizeLinear": [
        Case("r = com.microsoft.QuantizeLinear <axis = 0> (rounds, scale, e)", "uint8")
    ],
    "com.microsoft.QuickGelu": [
        Case("r = com.microsoft.QuickGelu <alpha = 1.5> (x)"),
        Case("r = com.microsoft.QuickGelu(x)"),
    ],
    "com.microsoft.SkipLayerNormalization": [
        Case("r = com.microsoft.SkipLayerNormalization(x, y, v, v)"),
        Case("f, , , r = com.microsoft.SkipLayerNormalization(x, y, v, v, v)"),
    ],
    "com.microsoft.SkipSimplifiedLayerNormalization": [
        Case("r = com.microsoft.SkipSimplifiedLayerNormalization(x, y, v, v)")
    ],
}

# Refused: forms that have no counterpart in torch, or that no encoder has.
REFUSED = {
    "Resize": 'r = Resize <mode = "nearest"> (h, , l)',
    "MaxPool": "r, l = MaxPool <kernel_shape = [3, 3]> (h)",
    "ConvTranspose": "r = ConvTranspose <pads = [0, 1, 1, 1]> (h, w)",
    "ScatterND": 'l = Constant <value = float[2] {5.0, 6.0}> () '
                 'r = ScatterND <reduction = "mul"> (a, i, l)',
}  # fmt: skip
# Functions whose gradient is not that of the float64 function: steps, roots of 0, huge values.
STEPS = ("Ceil", "Floor", "Mod", "Round", "Sign")


def _graph(case: Case) -> tuple[Any, dict[str, Array]]:
    used = set(re.findall(r"\b\w+\b", re.sub(r"<[^>]*>", "", case.nodes)))
    made = set(re.findall(r"(\w+)(?=[ ,\w]* = )", re.sub(r"<[^>]*>", "", case.nodes)))
    feed = {name: values for name, values in FEED.items() if name in used - made}
    inputs = ", ".join(
        f"{_TYPES[values.dtype.name]}{list(values.shape)} {name}" for name, values in feed.items()
    )
    text = f"g ({inputs}) => ({case.result} r) {{ {case.nodes} }}"
    return from_proto(model_proto(text, case.opset)), feed  # of operators that ONNX does not know


def _tensors(feed: dict[str, Array]) -> dict[str, Any]:
    return {name: torch.from_numpy(values.copy()) for name, values in feed.items()}


def _id(value: object) -> str:
    return value.nodes if isinstance(value, Case) else str(value)


ALL = [case for cases in CASES.values() for case in cases]


def test_each_operator_has_a_case() -> None:
    assert [op for op in operators.OPERATORS if not CASES.get(op)] == []
    for op, cases in CASES.items():
        assert all(op in case.nodes for case in cases), op


@pytest.mark.parametrize("case", ALL, ids=_id)
def test_results_are_those_of_onnx_runtime(case: Case) -> None:
    graph, feed = _graph(case)
    expected = outputs(graph, feed)["r"]
    found = torch_graph.TorchGraph(graph)(_tensors(feed))["r"].detach().numpy()
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    if expected.dtype.kind == "f":
        top = float(np.abs(expected).max(initial=1))
        np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE * top)
    else:
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "case", [c for c in ALL if c.result == "float" and "Linear" not in c.nodes], ids=_id
)
def test_gradients_are_finite_and_those_of_differences(case: Case) -> None:
    graph, feed = _graph(case)
    module = torch_graph.TorchGraph(graph).double()
    tensors = {
        name: t.double().requires_grad_() if t.is_floating_point() else t
        for name, t in _tensors(feed).items()
    }
    floats = [name for name, t in tensors.items() if t.is_floating_point()]
    if not floats or any(op in case.nodes for op in STEPS):
        pytest.skip("constant, or in steps")

    def run(*given: Any) -> Any:
        return module({**tensors, **dict(zip(floats, given, strict=True))})["r"]

    assert torch.autograd.gradcheck(run, [tensors[name] for name in floats])


@pytest.mark.parametrize(("op", "nodes"), REFUSED.items())
def test_other_forms_are_refused(op: str, nodes: str) -> None:
    scales = "l = Constant <value = float[4] {1, 1, 2, 2}> () " if op == "Resize" else ""
    graph, _ = _graph(Case(scales + nodes))
    with pytest.raises(TrainingError, match=rf"node '.*' \({op}\): .* cannot be trained"):
        torch_graph.TorchGraph(graph)


def test_the_page_lists_the_operators() -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    section = page.split("## Operators that can be trained")[1].split("So encoders")[0]
    of_onnx, of_microsoft = (part.split(".\n")[0] for part in section.split(":\n\n")[1:])
    listed = set(re.split(r",\s+", of_onnx))
    listed |= {f"com.microsoft.{name}" for name in re.split(r",\s+", of_microsoft)}
    assert listed == set(operators.OPERATORS)
