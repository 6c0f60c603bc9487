"""ONNX Runtime's CUDA provider: float16 in the fused operators that it has fast kernels for.

Int8 does not pay there: the provider has no QLinearMatMul, no MatMulIntegerToFloat and no
DynamicQuantizeLinear (they fall back to the CPU, microsoft/onnxruntime#12229, #24807), its
MatMulInteger has no epilogue, and its Q/DQ fusions leave MatMul and Gemm out, so that a Q/DQ graph
is a float matrix multiplication with quantizers around it. Weight-only saves memory: above a few
rows MatMulNBits dequantizes to float16 and multiplies, so it is no default. Its kernel takes 4 and
8 bits. GatherBlockQuantized is emitted with INT4 alone: given codes in bytes, versions differ in
the zero point (microsoft/onnxruntime#31692) and in where rows begin (#26484), and in all of them
blocks must end where rows do (#32663). Sources: the provider's kernel list (``cuda_kernels.tsv``)
and sources of ONNX Runtime 1.30.
"""

from __future__ import annotations

from qcompile.quant import QSpec
from qcompile.targets.kernel_table import HasKernels, KernelTable, Limit
from qcompile.targets.target import (
    QDQ_SINCE,
    ROUND_FOR_FLOAT_DATA,
    FewBits,
    HalfForm,
    OpRule,
    Target,
)

WEIGHT = QSpec("int8", symmetric=True, granularity="channel", axis=1, narrow=True)
TABLE = QSpec("int8", symmetric=True, granularity="channel", axis=0, narrow=True)

_NO_INT8 = "the CUDA provider has no int8 matrix multiplication that is faster than float16"
_RECURRENT = ("GRU", "LSTM", "RNN")
_FUSED = ("fuse-attention", "fuse-skip-layernorm", "fuse-bias-gelu", "halve-floats")

# Attributes for which the provider leaves a node to the CPU although it has a kernel
# (cuda_execution_provider.cc, the NeedFallbackToCPU functions). Not among them, since they are no
# single values: asymmetric pads of ConvTranspose, other activations of recurrent layers.
KERNELS = KernelTable(
    provider="CUDA",
    file="cuda_kernels.tsv",
    limits=(
        Limit(("ArgMax", "ArgMin"), "select_last_index", (0,)),
        Limit(("ConvTranspose",), "auto_pad", ("NOTSET", "VALID")),
        Limit(_RECURRENT, "clip"),
        Limit(_RECURRENT, "activation_alpha"),
        Limit(_RECURRENT, "activation_beta"),
        Limit(("GRU",), "linear_before_reset", (1,)),
        Limit(("LSTM",), "input_forget", (0,)),
        Limit(("MatMulNBits",), "bits", (4, 8)),
        Limit(("GatherBlockQuantized",), "bits", (4, 8)),
    ),
)

CUDA = Target(
    name="cuda",
    summary="float16 with ONNX Runtime's fused CUDA operators; every node has a CUDA kernel",
    provider="CUDAExecutionProvider",
    rules=(),
    weight_only=(
        OpRule("MatMul", weight=WEIGHT, why="MatMulNBits: less memory, no more speed"),
        OpRule("Gemm", weight=WEIGHT, why="MatMulNBits: less memory, no more speed"),
        OpRule(
            "Gather",
            weight=TABLE,
            min_bytes=1 << 20,
            small="table under 1 MiB: the three nodes that int8 adds cost more than it saves",
            why="rows are looked up as int8 and scaled after the lookup",
        ),
    ),
    modes=("weight-only", "float"),
    with_data="float",
    without_data="float",
    no_modes={"static": _NO_INT8, "dynamic": _NO_INT8},
    lower={
        "weight-only": (
            "lower-weight-only{accuracy=0,fewest=4}",
            "lower-embeddings{form=int4,tied=false}",
            *_FUSED,
        ),
        "float": _FUSED,
    },
    transform={"weight-only": (ROUND_FOR_FLOAT_DATA,)},
    # No type of the opset is needed: codes are in bytes, and INT4 is for an operator of Microsoft.
    few_bits={
        **dict.fromkeys((2, 3, 4), FewBits(4, QDQ_SINCE)),
        **dict.fromkeys((5, 6, 7), FewBits(8, QDQ_SINCE)),
    },
    few_bits_run={"weight-only": "float"},
    halves=("float16",),
    half_form=HalfForm(KERNELS),
    float_ops={"Attention": "the fused operator computes in float"},
    gelu=(("com.microsoft", "Gelu", 1),),
    tanh_gelu=(("com.microsoft", "FastGelu", 1),),
    requires=(HasKernels(KERNELS),),
)
