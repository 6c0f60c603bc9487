"""TensorRT, by ONNX Runtime's TensorRT provider or trtexec: explicit symmetric int8 Q/DQ.

TensorRT fuses Q/DQ into its int8 kernels by its own rules: zero points 0, one scale for an
activation, one for each output channel of a weight, biases float. TensorRT 11 builds strongly typed
networks only: between the linears it computes in the types of the file, which are float16 with
``--float16``; TensorRT 10 also in fp16 where the engine is built so (``trt_fp16_enable``). Its
parser has LayerNormalization computed in the type that ``stash_type`` names, float32 unless the
model says otherwise. Softmax, LayerNormalization and GELU stay float: quantizing them saves no
product. It takes INT4 for weights too, which models may bring and this target does not make; FP8
and FP4, and int8 in blocks, which its parser also takes, are refused. Opsets: 9 to 24 in the
operator list of onnx-tensorrt 10.15, to 25 from release 11.5 on, the newest whose notes were read;
its parser's source was read up to 10.15. Sources: NVIDIA's "Explicit Quantization",
"Working with Quantized Types", "ONNX Opset Guide" and "Migrating from TensorRT 10.x to 11.x";
issues microsoft/onnxruntime#14229 and #17738 (bias), #14626 (softmax), NVIDIA/TensorRT#2774 (zero
points).
"""

from __future__ import annotations

from qcompile.quant import QSpec
from qcompile.targets.half_types import DefinedTypes
from qcompile.targets.qdq_requirements import (
    DataScales,
    FloatBiases,
    Int4Weights,
    Integers,
    OperandTypes,
    Opsets,
    Pairs,
    PositiveScales,
    ScaleTypes,
    WeightScales,
    WholeOperands,
    ZeroPoints,
    ZeroPointSizes,
)
from qcompile.targets.target import HalfForm, OpRule, Target

ACTIVATION = QSpec("int8", symmetric=True, narrow=True)
WEIGHT = QSpec("int8", symmetric=True, granularity="channel", axis=1, narrow=True)
KERNEL = QSpec("int8", symmetric=True, granularity="channel", axis=0, narrow=True)

_PRODUCTS = ("MatMul", "Gemm", "Conv")
_LINEAR = "Q/DQ on both operands: TensorRT fuses them into an int8 matrix multiplication"

TENSORRT = Target(
    name="tensorrt",
    summary="explicit symmetric int8 Q/DQ as TensorRT fuses it; biases float",
    provider="TensorrtExecutionProvider",
    rules=(
        OpRule("MatMul", activation=ACTIVATION, weight=WEIGHT, why=_LINEAR),
        OpRule("Gemm", activation=ACTIVATION, weight=WEIGHT, why=_LINEAR),
        OpRule("Conv", activation=ACTIVATION, weight=KERNEL, why=_LINEAR),
    ),
    weight_only=(),
    product=OpRule("MatMul", activation=ACTIVATION, right=ACTIVATION, why=_LINEAR),
    modes=("static", "float"),
    without_data=None,
    no_modes={
        "dynamic": "TensorRT has no DynamicQuantizeLinear",
        "weight-only": "TensorRT's int8 matrix multiplications need both operands quantized",
    },
    # TensorRT fuses a Mul with what is before it, so long rows may be scaled as well as short ones.
    transform={
        "static": (
            "widen-ranges",
            "migrate-scales{most-channels=16384}",
            "trim-ranges",
            "round-weights",
        )
    },
    lower={"static": ("fit-biases",), "float": ()},
    halves=("float16",),
    half_form=HalfForm(
        DefinedTypes(),
        plan=("plan-halves",),
        lower={"static": ("fit-biases", "halve-floats"), "float": ("halve-floats",)},
    ),
    float_ops={
        "MatMul": "multiplies two activations: float unless the recipe's attention asks for int8",
        "Gather": "TensorRT looks rows up in float",
        "Softmax": "no matrix multiplication that would be faster, and its quantizer would be "
        "asymmetric",
        "LayerNormalization": "TensorRT computes it in float",
        "Gelu": "TensorRT fuses it after the matrix multiplication, in float",
        "Add": "residual sums stay float",
        "GRU": "TensorRT computes recurrent layers in float",
        "LSTM": "TensorRT computes recurrent layers in float",
        "RNN": "TensorRT computes recurrent layers in float",
        "Einsum": "it is not a multiplication by a constant matrix",
        "ConvTranspose": "this target has no rule for ConvTranspose",
    },
    gelu=(("", "Gelu", 20),),
    tanh_gelu=(("", "Gelu", 20),),
    opset=20,
    requires=(
        Opsets((("", 25),)),
        Integers(("int8", "int4")),
        ZeroPoints(),
        ZeroPointSizes(),
        PositiveScales(),
        ScaleTypes(),
        OperandTypes(),
        Int4Weights(),
        DataScales(),
        WeightScales((("MatMul", -1), ("Gemm", -1), ("Conv", 0))),
        FloatBiases(),
        WholeOperands(_PRODUCTS),
        Pairs(_PRODUCTS),
    ),
)
