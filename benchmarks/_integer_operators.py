"""Which operators of a quantized ONNX file run in integers, whatever tool wrote it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from onnx import ModelProto, NodeProto, TensorProto

from qcompile.ir import is_op
from qcompile.ir.operators import LAYOUT
from qcompile.ir.quantized_operators import QUANTIZED_LINEARS, QUANTIZERS

OTHER, WIDE = "other operator", "tensor in 16 bits"
KINDS = ("linear", "product", "table", OTHER, WIDE)
# Layout operators: neither integer arithmetic nor float.
_MOVERS = (*LAYOUT, "Concat", "Gather")
_TRANSPARENT = ("Identity", "Sum", "Transpose")  # a Sum of one operand
_BYTES = (TensorProto.INT8, TensorProto.UINT8)
_WORDS = (TensorProto.INT16, TensorProto.UINT16)


class _Graph:
    def __init__(self, model: ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.constants = {t.name: t for t in model.graph.initializer}
        self.producers = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def dequantized(self, node: NodeProto) -> Iterator[NodeProto]:
        """The DequantizeLinear nodes that a node reads, directly or through ``_TRANSPARENT``."""
        for name in node.input:
            source = self.producers.get(name)
            if source is not None and source.op_type in _TRANSPARENT and len(source.input) == 1:
                source = self.producers.get(source.input[0])
            if source is not None and source.op_type == "DequantizeLinear":
                yield source

    def weights(self, node: NodeProto) -> list[str]:
        """Integer constants of rank 2 or more that a node reads, directly or dequantized."""
        names = [*node.input, *(n.input[0] for n in self.dequantized(node))]
        return [n for n in names if self._is_integer(n)]

    def _is_integer(self, name: str) -> bool:
        tensor = self.constants.get(name)
        types = (*_BYTES, *_WORDS)
        return tensor is not None and len(tensor.dims) > 1 and tensor.data_type in types

    def is_between(self, node: NodeProto) -> bool:
        """True for a float operator between dequantized inputs and quantized outputs."""
        readers = [reader for name in node.output for reader in self.readers.get(name, [])]
        quantized = bool(readers) and all(r.op_type == "QuantizeLinear" for r in readers)
        return quantized and any(self.dequantized(node)) and not is_op(node, *_MOVERS)

    def is_wide(self, node: NodeProto) -> bool:
        """True for a quantizer with 16 bits."""
        zero = self.constants.get(node.input[2]) if len(node.input) > 2 else None
        return zero is not None and zero.data_type in _WORDS


def integer_operators(model: ModelProto) -> str:
    """Counts of linear layers, other MatMuls, tables and other operators, as text."""
    graph = _Graph(model)
    counts = Counter(kind for node in graph.nodes for kind in [_kind(graph, node)] if kind)
    return ", ".join(_counted(counts[kind], kind) for kind in KINDS if counts[kind]) or "nothing"


def _kind(graph: _Graph, node: NodeProto) -> str:
    """The kind that a node is counted as, "" for none."""
    if is_op(node, *QUANTIZERS):
        return WIDE if node.op_type == "QuantizeLinear" and graph.is_wide(node) else ""
    has_weight = bool(graph.weights(node))
    dequantizes = is_op(node, "MatMul", "Gemm") and any(graph.dequantized(node))
    if dequantizes or is_op(node, *QUANTIZED_LINEARS):
        return "linear" if has_weight else "product"
    if node.op_type == "Gather" and has_weight:
        return "table"
    return OTHER if graph.is_between(node) else ""


def _counted(count: int, kind: str) -> str:
    """Count and kind, with a plural s on the noun: ``2 tensors in 16 bits``."""
    first, *rest = kind.split(" ")
    if kind == OTHER:
        first, rest = kind, []
    return " ".join([str(count), first + "s" * (count != 1), *rest])
