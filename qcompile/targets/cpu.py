"""ONNX Runtime's CPU provider: its quantized operators, since fusions of Q/DQ are slow and fragile.

Measured reasons are in docs/performance.md. Activations are uint8 because int8 x int8 has no
vector kernel on x64 in MLAS; weights are symmetric int8 with one scale per output channel, in pairs
whose sums fit into int16, so that x86 without VNNI computes the same (docs/processors.md).
"""

from __future__ import annotations

from dataclasses import replace

from qcompile.quant import QSpec
from qcompile.quant.types import FEW_BITS
from qcompile.targets.target import (
    INT4_SINCE,
    MODES,
    ROUND_FOR_FLOAT_DATA,
    FewBits,
    LoweringChoice,
    LoweringOption,
    OpRule,
    StoredRule,
    Target,
)

ACTIVATION = QSpec("uint8", symmetric=False)
# With float data no sum saturates, so these weights need no bound on pairs.
ALONE = QSpec("int8", symmetric=True, granularity="channel", axis=1, narrow=True)
WEIGHT = replace(ALONE, paired=True)
TABLE = QSpec("int8", symmetric=True, granularity="channel", axis=0, narrow=True)

KERNEL = QSpec("int8", symmetric=True, granularity="channel", axis=0, narrow=True, paired=True)

# The right operand of a matrix multiplication of activations: the kernel packs int8, and has no
# vector code for uint8. Clipped to 7 bits: 255 * 64 * 2 fits into int16 for any data.
KEY = QSpec("int8", symmetric=False, reduced=True)

_EMBEDDING = OpRule(
    "Gather",
    weight=TABLE,
    min_bytes=1 << 20,
    small="table under 1 MiB: the three nodes that int8 adds cost more than it saves",
    why="rows are looked up as int8 and scaled after the lookup",
)
_FLOAT_FORMS = ("fuse-key-transpose", "unfuse-skip-layernorm", "remove-padding")
# Quantizers that a model brings, in the form in which those of the plan are.
_BROUGHT = ("shift-integers", "sink-dequantize")
_INTEGERS = (
    "hoist-quantize", "quantize-parts", "hoist-quantize", "cancel-requantize",
    "fit-biases", "lower-convolutions", "lower-sums", "fuse-requantize",
)  # fmt: skip
_FORMS = (
    LoweringOption(
        "padding",
        own="removed",
        others={"kept": LoweringChoice({"remove-padding": ""})},
        why="batches without padding, or of one text, pay for copies that save nothing",
    ),
    LoweringOption(
        "attention",
        own="apart",
        others={
            "float-scores": LoweringChoice(attention="float", modes=("static",)),
            "fused": LoweringChoice(
                {  # once biases are in the products, before quantizers move in front of transposes
                    "lower-embeddings": "fuse-attention,lower-embeddings",
                    "fuse-key-transpose": "fuse-attention",  # where there is nothing to lower
                },
                attention="float",
            ),
        },
        why="depends on length and processor; MultiHeadAttention computes in float",
    ),
    LoweringOption(  # after attention, which names the pass that this one replaces
        "table",
        own="unpacked",
        others={"packed": LoweringChoice({"lower-embeddings": "lower-embeddings{form=packed}"})},
        why="GatherBlockQuantized keeps few bits in memory too, and unpacks each row in each run",
    ),
    LoweringOption(
        "weight-only-data",
        own="int8",
        others={
            "float": LoweringChoice(
                {"lower-weight-only": "lower-weight-only{accuracy=0}"}, modes=("weight-only",)
            )
        },
        why="float data is exact; with 8- and 2-bit weights it has no kernel",
    ),
    LoweringOption(
        "key",
        own="transposed-inside",
        others={"transposed-before": LoweringChoice({"fuse-key-transpose": ""})},
        why="a copy of the key once, or strided reads inside each product",
    ),
    LoweringOption(
        "gelu",
        own="tanh",
        others={"erf": LoweringChoice({"approximate-gelu": ""}, modes=("static",))},
        why="tanh takes half the time of erf; where it is quantized, the steps hide the difference",
    ),
    LoweringOption(
        "residual-norm",
        own="apart",
        others={"fused": LoweringChoice({"unfuse-skip-layernorm": "fuse-skip-layernorm"})},
        why="SkipLayerNormalization is scalar code in ONNX Runtime 1.31 and 1.32; later may differ",
    ),
)
_CHAIN = "no conversion to float and back between int8 convolutions"
_CONVOLUTION = OpRule(
    "Conv",
    activation=ACTIVATION,
    weight=KERNEL,
    output=ACTIVATION,
    min_summed=16,
    small="with groups, or few multiplications per value, the float kernel is faster",
    why="QLinearConv: uint8 x int8 by output channel, activation and bias inside",
    modes=("static",),
)
_SMALL_BYTES = 1 << 14
_LSTM = OpRule(
    "LSTM",
    activation=ACTIVATION,
    weight=replace(TABLE, paired=True),
    min_bytes=_SMALL_BYTES,
    small="weights under 16 KiB: quantizing the state in each step costs more than it saves",
    why="DynamicQuantizeLSTM: uint8 x int8 by gate and unit; data and state quantized in each step",
)
_STORED = "8 bits in the file, float once loaded: no integer kernel"
_ANY_ROWS = -1


def _stored(
    op: str, slots: tuple[int, ...], rows: int, modes: tuple[str, ...] = MODES
) -> StoredRule:
    """Weights of an operator that has no integer kernel, at least in these modes."""
    small = "weight under 16 KiB: not worth the operators that turn it to float"
    return StoredRule(
        op, slots, TABLE, rows, _STORED, min_bytes=_SMALL_BYTES, small=small, modes=modes
    )


_LINEAR = "MatMulIntegerToFloat: uint8 x int8 with the bias inside"

CPU = Target(
    name="cpu",
    summary="the operators that ONNX Runtime's CPU provider runs fastest, also of com.microsoft",
    provider="CPUExecutionProvider",
    rules=(
        OpRule("MatMul", activation=ACTIVATION, weight=WEIGHT, why=_LINEAR),
        OpRule("Gemm", activation=ACTIVATION, weight=WEIGHT, why=_LINEAR),
        _CONVOLUTION,
        _LSTM,
        _EMBEDDING,
    ),
    weight_only=(
        OpRule("MatMul", weight=ALONE, why="MatMulNBits: integers with a scale for each block"),
        OpRule("Gemm", weight=ALONE, why="MatMulNBits: integers with a scale for each block"),
        _EMBEDDING,
    ),
    chained=(
        OpRule("Add", activation=ACTIVATION, output=ACTIVATION, why=f"QLinearAdd: {_CHAIN}"),
        OpRule("Concat", activation=ACTIVATION, output=ACTIVATION, why=f"moves bytes: {_CHAIN}"),
        OpRule("MaxPool", activation=ACTIVATION, output=ACTIVATION, why=f"picks bytes: {_CHAIN}"),
    ),
    stored=(
        _stored("GRU", (1, 2), 2),
        _stored("LSTM", (1, 2), 2),
        _stored("RNN", (1, 2), 2),
        _stored("MatMul", (0, 1), _ANY_ROWS),
        _stored("Einsum", (0, 1), _ANY_ROWS),
        _stored("ConvTranspose", (1,), 1),
        _stored("Conv", (1,), 1, ("weight-only",)),
    ),
    product=OpRule(
        "MatMul",
        activation=ACTIVATION,
        right=KEY,
        why="attention in uint8 x int8: less memory traffic",
    ),
    attention="scores",
    modes=("static", "dynamic", "weight-only", "float"),
    transform={
        "static": (
            "permute-channels{pairs=true}",
            "guard-scores",
            "widen-ranges",
            "migrate-scales",
            "round-weights",
            "split-outliers",
            "trim-ranges",
            "share-ranges",
        ),
        "dynamic": ("permute-channels{pairs=true}",),
        "weight-only": (ROUND_FOR_FLOAT_DATA,),
    },
    lower={
        "static": (
            *_BROUGHT,
            "lower-linears",
            "lower-recurrent",
            "lower-products",
            "lower-embeddings",
            *_INTEGERS,
            "approximate-gelu",
            "dequantize-at-load",
            "shield-floats",
            *_FLOAT_FORMS,
            "store-few-bits",
        ),
        # static quantizers that a model brings need no data
        "dynamic": (
            *_BROUGHT,
            "lower-linears",
            "lower-recurrent",
            "lower-embeddings",
            *_INTEGERS,
            "dequantize-at-load",
            *_FLOAT_FORMS,
            "store-few-bits",
        ),
        "weight-only": (
            "lower-weight-only",
            "lower-embeddings",
            "dequantize-at-load",
            *_FLOAT_FORMS,
            "store-few-bits",
        ),
        "float": _FLOAT_FORMS,
    },
    float_ops={
        "MatMul": "multiplies two activations: float unless the recipe's attention asks for int8",
        "Softmax": "ONNX Runtime's integer Softmax is slower than float",
        "LayerNormalization": "no integer kernel",
        "Gelu": "no integer kernel",
        "com.microsoft.Gelu": "no integer kernel",
        "com.microsoft.FastGelu": "no integer kernel",
        "Add": "an integer Add is no faster than float and loses accuracy",
        "Attention": "the fused operator computes in float",
        "Einsum": "it is not a multiplication by a constant matrix",
        "Conv": "int8 only in mode static: ConvInteger is slower than float",
        "ConvTranspose": "no integer kernel",
    },
    no_half="ONNX Runtime's CPU provider computes float16 in float32, with casts in between",
    gelu=(("com.microsoft", "Gelu", 1),),
    tanh_gelu=(("", "Gelu", 20), ("com.microsoft", "FastGelu", 1)),
    # Other widths than 4 are planes of 4, 2 and 1 bits in one UINT4 tensor.
    few_bits={n: FewBits(n, INT4_SINCE) for n in FEW_BITS},
    few_bits_run={"static": "int8", "dynamic": "int8"},
    ties_tables=True,
    forms=_FORMS,
)
