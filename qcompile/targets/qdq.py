"""Standard ONNX QuantizeLinear/DequantizeLinear, everything W8A8 as in the paper.

Bondarenko et al. 2021, section 3: weights and activations of every operator between two linears
are quantized, residual sums, LayerNorm, softmax and GELU too; probabilities in rows that 8 bits do
not resolve, and what other sizes take beyond any range, only on request (``planning/precision.py``,
``planning/open_sizes.py``). Portable; not meant to be fast.
"""

from __future__ import annotations

from dataclasses import replace

from qcompile.quant import QSpec
from qcompile.targets.half_types import DefinedTypes
from qcompile.targets.target import (
    INT2_SINCE,
    INT4_SINCE,
    QDQ_SINCE,
    ROUND_FOR_FLOAT_DATA,
    FewBits,
    HalfForm,
    OpRule,
    StoredRule,
    Target,
)

ACTIVATION = QSpec("uint8", symmetric=False)
WIDE = QSpec("uint16", symmetric=False)
# With float data no sum saturates, so these weights need no bound on pairs.
ALONE = QSpec("int8", symmetric=True, granularity="channel", axis=1, narrow=True)
WEIGHT = replace(ALONE, paired=True)  # ONNX Runtime fuses Q/DQ to the kernels that target cpu uses
KERNEL_ALONE = QSpec("int8", symmetric=True, granularity="channel", axis=0, narrow=True)
KERNEL = replace(KERNEL_ALONE, paired=True)
TABLE = QSpec("int8", symmetric=True, granularity="channel", axis=0, narrow=True)

_PRODUCT = "Q/DQ around the matrix multiplication"
_INNER = (
    "Add", "Div", "Erf", "FastGelu", "Gelu", "LayerNormalization", "Mul", "ReduceMean", "Relu",
    "Sigmoid", "Softmax", "Sqrt", "Sub", "Tanh",
)  # fmt: skip

QDQ = Target(
    name="qdq",
    summary="standard ONNX Q/DQ only, every tensor W8A8 as in the paper: portable",
    provider="CPUExecutionProvider",
    rules=(
        OpRule("MatMul", ACTIVATION, WEIGHT, ACTIVATION, why=_PRODUCT),
        OpRule("Gemm", ACTIVATION, WEIGHT, ACTIVATION, why=_PRODUCT),
        OpRule("Conv", ACTIVATION, KERNEL, ACTIVATION, why="Q/DQ around the convolution"),
        OpRule("Gather", weight=TABLE, output=ACTIVATION, why="rows of the table in int8"),
        *(OpRule(op, activation=ACTIVATION, output=ACTIVATION) for op in _INNER),
    ),
    weight_only=(
        OpRule("MatMul", weight=ALONE, why="DequantizeLinear on the weight"),
        OpRule("Gemm", weight=ALONE, why="DequantizeLinear on the weight"),
        OpRule("Conv", weight=KERNEL_ALONE, why="DequantizeLinear on the weight"),
        OpRule("Gather", weight=TABLE, why="rows of the table in int8"),
    ),
    stored=tuple(
        StoredRule(op, (1, 2), TABLE, 2, "DequantizeLinear on the weight")
        for op in ("GRU", "LSTM", "RNN")
    ),
    modes=("static", "weight-only", "float"),
    without_data=None,
    transform={
        "static": ("group-scales", "trim-ranges", "guard-rows", "round-weights"),
        "weight-only": (ROUND_FOR_FLOAT_DATA,),
    },
    lower={
        "static": ("fit-biases", "shield-floats", "shield-groups", "narrow-qdq"),
        "weight-only": ("narrow-qdq",),
        "float": (),
    },
    float_ops={
        "Attention": "the fused operator computes in float",
        "Einsum": "it is not a multiplication by a constant matrix",
        "ConvTranspose": "this target has no rule for ConvTranspose",
    },
    gelu=(("", "Gelu", 20),),
    tanh_gelu=(("", "Gelu", 20),),
    opset=20,  # from here GELU is one operator, and not five tensors to quantize
    half_form=HalfForm(
        DefinedTypes(),
        plan=("plan-halves",),
        # Shields come last: whether they are needed depends on the type of the scales.
        lower={
            "static": (
                "fit-biases",
                "narrow-qdq",
                "halve-floats",
                "shield-floats",
                "shield-groups",
            ),
            "weight-only": ("narrow-qdq", "halve-floats"),
            "float": ("halve-floats",),
        },
        emulated=True,
    ),
    gate_latency=False,
    quantize_interior=True,
    wide=WIDE,
    wide_weight="int16",
    few_bits={
        2: FewBits(2, INT2_SINCE),
        **dict.fromkeys((3, 4), FewBits(4, INT4_SINCE)),
        **dict.fromkeys((5, 6, 7), FewBits(8, QDQ_SINCE)),
    },
    few_bits_run={"static": "float", "weight-only": "float"},
    ties_tables=True,
)
