"""Operators: their domains, and families of operators.

Each family is defined here once; code that needs a longer list extends it. Operators of ONNX
Runtime have their domain in front: ``com.microsoft.FastGelu``. Quantized ones are in
``quantized_operators``.
"""

from __future__ import annotations

import onnx

from qcompile.ir.tensor import Node

ONNX = ""
MICROSOFT = "com.microsoft"
# Domains that every build of ONNX Runtime may have operators of; others come with a library.
BUILT_IN_DOMAINS = frozenset({ONNX, MICROSOFT, "ai.onnx.ml", "com.microsoft.nchwc"})

# ---- value by value: results have the axes of their operands, broadcast

ACTIVATIONS = (
    "Celu", "Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "PRelu", "Relu",
    "Selu", "Sigmoid", "Softplus", "Softsign", "Swish", "Tanh", "ThresholdedRelu",
    "com.microsoft.BiasGelu", "com.microsoft.FastGelu", "com.microsoft.Gelu",
    "com.microsoft.QuickGelu",
)  # fmt: skip
ARITHMETIC = (
    "Add", "Cast", "Clip", "Div", "Max", "Mean", "Min", "Mul", "Neg", "Pow", "Sqrt", "Sub", "Sum",
    "Where",
)  # fmt: skip
COMPARISONS = (
    "And", "Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "Not",
    "Or", "Xor",
)  # fmt: skip
FUNCTIONS = (
    "Abs", "Ceil", "Cos", "Exp", "Floor", "Log", "Mod", "Reciprocal", "Round", "Sign", "Sin",
)  # fmt: skip
ELEMENTWISE = (*ACTIVATIONS, *ARITHMETIC, *COMPARISONS, *FUNCTIONS, "Identity")
# Arithmetic that combines data with a mask.
MASKING = ("Add", "Max", "Min", "Mul", "Sub", "Where")

# ---- layout: values are moved, not changed

RESHAPES = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")
MOVERS = (*RESHAPES, "Transpose")  # each value appears once in the result
LAYOUT = (*MOVERS, "Expand", "Identity", "Slice", "Split")

# ---- over an axis, and matrix multiplications

NORMALIZATIONS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
# Of the sum of two operands; a fourth result is the sum.
SKIP_NORMALIZATIONS = (
    "com.microsoft.SkipLayerNormalization", "com.microsoft.SkipSimplifiedLayerNormalization",
)  # fmt: skip
REDUCTIONS = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean",
    "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare",
)  # fmt: skip
MATMULS = ("MatMul", "com.microsoft.FusedMatMul")  # stacks of matrices, as numpy.matmul pairs them
CONVOLUTIONS = ("Conv", "ConvTranspose")
QKV_ATTENTION = ("Attention", "com.microsoft.MultiHeadAttention")  # of query, key and value
ATTENTION = (*QKV_ATTENTION, "com.microsoft.Attention")

RANDOM = (
    "Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform",
    "RandomUniformLike",
)  # fmt: skip


def domain_of(node: Node | onnx.NodeProto) -> str:
    """The domain of a node's operator; ``""`` for ONNX, however it is spelled."""
    return "" if node.domain in (None, "ai.onnx") else str(node.domain)


def is_onnx_domain(node: Node | onnx.NodeProto) -> bool:
    """True for operators of ONNX itself."""
    return domain_of(node) == ONNX


def op_name(node: Node | onnx.NodeProto) -> str:
    """The operator's name as tables spell it: ``MatMul``, ``com.microsoft.MatMulNBits``."""
    op = node.op_type if isinstance(node, onnx.NodeProto) else node.op
    domain = domain_of(node)
    return f"{domain}.{op}" if domain else str(op)


def is_op(node: Node | onnx.NodeProto, *ops: str) -> bool:
    """True where the node is one of ``ops``; ``com.microsoft.X`` names that domain's operators."""
    return op_name(node) in ops


def is_layout(node: Node) -> bool:
    """True for operators that move values without changing them."""
    return is_op(node, *LAYOUT)
