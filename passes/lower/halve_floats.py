"""Stores and computes data in float16 where that is safe and the target has a kernel.

    MatMul(x, W) : float32   →   MatMul(Cast(x, float16), W : float16) : float16

    DequantizeLinear(q, s : float32)   →   DequantizeLinear(q, s : float16)

Only the data path (``data_path.py``): masks, positions and scales that are computed from integers
stay float32 and are cast where they meet data. Graph inputs and outputs keep their types.

These stay float32, with a Cast on each side: reductions over many values (means, norms, sums:
float16 holds 11 bits and no more than 65504), powers, exponentials, logarithms and roots;
elementwise operators that read such a result, up to the next matrix multiplication, convolution or
normalization; operators with a constant that float16 cannot hold (an epsilon of 1e-12 would be 0);
operators without float16 in the target's table; tensors that subgraphs read; quantizers whose scale
or result float16 cannot hold (``half_quantizers.py``); tensors whose calibrated range is over half
of what float16 holds, since other data reaches further. LayerNormalization, softmax and attention
take float16 and accumulate in float32 in their kernels.

The huge constants that masks add (-3.4e38) would overflow to -inf, and a row of those is NaN after
softmax. They become -32768: far below any score, finite, and small enough for sums with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx

from qcompile.ir import (
    Graph,
    Node,
    Refusal,
    Tensor,
    array,
    domain_of,
    has_subgraph,
    is_constant,
    is_float,
    is_op,
)
from qcompile.ir.analysis.data_path import data_path, layout_root
from qcompile.ir.quantized_operators import QDQ
from qcompile.planning import Context, float32_quantizers, operand_dequantizers
from qcompile.quant import Array, Ranges
from qcompile.rewriting import Numerics, Pass, Stage
from qcompile.targets.half_types import TypeTable

_SENSITIVE = (
    "CumSum", "Exp", "InstanceNormalization", "Log", "LogSoftmax", "LpNormalization",
    "MeanVarianceNormalization", "Pow", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSum",
    "ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Softplus",
    "Sqrt",
)  # fmt: skip
# Operators whose inputs are cast from float32 back to float16: the gain is worth a Cast.
_RETURNS = (
    "Conv", "ConvTranspose", "Gemm", "LayerNormalization", "MatMul",
    "com.microsoft.MatMulNBits", "com.microsoft.MultiHeadAttention",
    "com.microsoft.SkipLayerNormalization",
)  # fmt: skip
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")  # fused with dequantizers before them
_SCALE = 1  # the input of a quantizer whose type is that of its floats
_BOUNDS = ("Clip", "Max", "Min")
_ADDING = ("Add", "Sub", "com.microsoft.MultiHeadAttention")
_LARGEST = float(np.finfo(np.float16).max)
_MOST = 2.0**15  # of values seen: other data reaches further
_SMALLEST = float(np.finfo(np.float16).tiny)  # the smallest normal number
_MASKED = np.float32(-(2.0**15))
_HUGE = 1e30  # only masks have constants of this size


@dataclass(frozen=True)
class HalveFloats(Pass):
    """Compute in float16 on targets that have kernels for it."""

    name: ClassVar[str] = "halve-floats"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    after: ClassVar[tuple[str, ...]] = (
        "fit-biases", "fuse-attention", "fuse-bias-gelu", "fuse-skip-layernorm",
        "lower-embeddings", "lower-weight-only", "narrow-qdq",
    )  # fmt: skip

    def run(self, graph: Graph, ctx: Context) -> bool:
        form = ctx.target.half_form
        if form is None:
            ctx.skip(graph.name, f"target {ctx.target.name!r} has no float16")
            return False
        path = data_path(graph, dequantized=True)
        refusals = _Chooser(graph, form.table, path, ctx.ranges).run()
        for name, refusal in refusals.items():
            if refusal is not None:
                ctx.skip(name, refusal.about("float32").reason)
        rewriter = _Rewriter(graph, form.table, path)
        changed = rewriter.run({n for n, refusal in refusals.items() if refusal is None})
        for new, old in rewriter.origins.items():
            ctx.origins[new] = ctx.origins.get(old, (old, None))
        return changed


class _Chooser:
    """Decides for each node on the data path, in graph order, whether it stays float32 and why."""

    def __init__(self, graph: Graph, table: TypeTable, path: set[str], ranges: Ranges) -> None:
        self.graph, self.table, self.path, self.ranges = graph, table, path, ranges
        self.wide: set[str] = set()  # results that are float32
        self.opsets = graph.domains()
        products = (n for n in graph.nodes if is_op(n, *_PRODUCTS))
        own = ((n.name, self._too_large(n) or self._operand_obstacle(n)) for n in products)
        self.products = {name: refusal for name, refusal in own if refusal is not None}
        self.quantizers = float32_quantizers(graph, self.products)

    def run(self) -> dict[str, Refusal | None]:
        """Why nodes stay float32, by name; None for those that become float16."""
        refusals: dict[str, Refusal | None] = {}
        for node in self.graph.nodes:
            data = [t for t in (*node.inputs, *node.outputs) if t.name in self.path]
            if not data or _takes_any_float(node):
                continue
            refusals[node.name] = refusal = self._obstacle(node)
            if refusal is not None:
                self.wide |= {t.name for t in node.outputs if is_float(t)}
        return refusals

    def _obstacle(self, node: Node) -> Refusal | None:
        if has_subgraph(node):
            return Refusal("its body reads float32")
        if is_op(node, *_SENSITIVE):
            return Refusal("a reduction, power or root")
        if is_op(node, "DynamicQuantizeLinear"):
            return Refusal("a quantizer")
        if node.name in self.quantizers:
            return self.quantizers[node.name]
        if node.name in self.products:
            return self.products[node.name]
        if any(m.name in self.quantizers for m in operand_dequantizers(self.graph, node)):
            return Refusal("its operands are dequantized in float32")
        if any(t.name in self.wide for t in node.inputs) and not is_op(node, *_RETURNS):
            return Refusal("it reads a float32 result")
        return self._too_large(node) or self._operand_obstacle(node)

    def _too_large(self, node: Node) -> Refusal | None:
        """That float16 cannot hold an input or a result, None where it can or nothing is known."""
        for tensor in (*node.inputs, *node.outputs):
            if tensor.name not in self.path:
                continue
            name = layout_root(self.graph, tensor).name
            span, missing = self.ranges.get(name), self.ranges.missing.get(name)
            if missing is not None:
                return Refusal(f"{name!r} has {missing}")
            top = 0.0 if span is None else float(max(np.abs(span.lo).max(), np.abs(span.hi).max()))
            if top > _MOST:
                return Refusal(f"{name!r} reaches {top:,.0f}, and float16 ends at {_LARGEST:,.0f}")
        return None

    def _operand_obstacle(self, node: Node) -> Refusal | None:
        opset = self.opsets.get(domain_of(node), 1)
        for i, tensor in enumerate(node.inputs):
            is_halved = tensor.name in self.path or (i == _SCALE and is_op(node, *QDQ))
            if is_halved and not self.table.takes(node, opset, i, "f16"):
                return Refusal(f"{node.op} {self.table.missing}")
            if is_constant(tensor) and is_float(tensor) and half_values(node, tensor) is None:
                return Refusal(f"float16 cannot hold its constant {tensor.name!r}")
        return None


def _takes_any_float(node: Node) -> bool:
    """True where a node has the same result for float32 and float16."""
    casts = is_op(node, "Cast") and not is_float(node.outputs[0])
    return casts or is_op(node, "Shape", "Size")


def half_values(node: Node, constant: Tensor) -> Array | None:
    """A constant in float16, None where that would change what the node computes."""
    values = array(constant)
    magnitudes = np.abs(values)
    if values.size == 1 and 0 < magnitudes.max() < _SMALLEST and not _is_half(values):
        return None
    large = np.isfinite(values) & (magnitudes >= _LARGEST)
    if not large.any():
        return values.astype(np.float16)
    if is_op(node, *_BOUNDS):  # no float16 value is beyond the bound
        return np.clip(values, -_LARGEST, _LARGEST).astype(np.float16)
    masking = large & ((magnitudes >= _HUGE) | (magnitudes == _LARGEST))
    if not is_op(node, *_ADDING, "Where") or (masking != large).any():
        return None
    return np.where(masking, -np.sign(values) * _MASKED, values).astype(np.float16)


def _is_half(values: Array) -> bool:
    """True where all values are float16 numbers."""
    return bool((values.astype(np.float16).astype(values.dtype) == values).all())


class _Rewriter:
    """Carries out the decisions: types change in place, with a Cast where float16 meets float32."""

    def __init__(self, graph: Graph, table: TypeTable, path: set[str]) -> None:
        self.graph, self.table, self.path = graph, table, path
        self.opsets = graph.domains()
        self.converted: set[str] = set()  # tensors that were float32 and are float16 now
        # (float32 tensor, whether a mask adds it) -> its float16 copy; and float16 -> float32 copy
        self.halves: dict[tuple[str, bool], Tensor] = {}
        self.floats: dict[str, Tensor] = {}
        self.origins: dict[str, str] = {}  # new constant -> the constant that it was computed from

    def run(self, chosen: set[str]) -> bool:
        """True where any node was chosen."""
        for node in self.graph.nodes:
            if node.name in chosen:
                self._halve(node)
            elif not _takes_any_float(node):
                for i, tensor in enumerate(node.inputs):
                    if tensor.name in self.converted:
                        self.graph.set_input(node, i, self._float(tensor))
        return bool(chosen)

    def _halve(self, node: Node) -> None:
        graph = self.graph
        opset = self.opsets.get(domain_of(node), 1)
        for i, tensor in enumerate(node.inputs):
            takes = self.table.takes(node, opset, i, "f16")
            if tensor.name and is_float(tensor) and takes:
                graph.set_input(node, i, self._half(node, tensor))
            elif tensor.name in self.converted and not takes:
                graph.set_input(node, i, self._float(tensor))
        if is_op(node, "Cast") and is_float(node.outputs[0]):
            node.attrs["to"] = int(onnx.TensorProto.FLOAT16)
        for i, tensor in enumerate(node.outputs):
            if not tensor.name or not is_float(tensor):
                continue
            if graph.is_output(tensor):
                self._keep_output(node, i, tensor)
            else:
                tensor.dtype = np.dtype(np.float16)
                self.converted.add(tensor.name)

    def _keep_output(self, node: Node, index: int, tensor: Tensor) -> None:
        """A graph output stays float32 and keeps its name."""
        half = self.graph.divert_output(node, "half", index)
        half.dtype, half.shape = np.dtype(np.float16), tensor.shape
        self.halves[tensor.name, False] = self.halves[tensor.name, True] = half
        self.graph.add("Cast", [half], [tensor], {"to": int(onnx.TensorProto.FLOAT)})

    def _half(self, node: Node, tensor: Tensor) -> Tensor:
        """The float16 copy of a float32 tensor, shared by all its readers."""
        values = half_values(node, tensor) if is_constant(tensor) else None
        if values is None:
            is_mask = is_op(node, *_ADDING) and tensor.name not in self.path
        else:  # half_values replaced the constants of a mask
            with np.errstate(over="ignore"):
                is_mask = bool((values != array(tensor).astype(np.float16)).any())
        key = tensor.name, is_mask
        if key not in self.halves and values is not None:
            half = self.graph.constant(f"{tensor.name}/half", values)
            self.halves[key], self.origins[half.name] = half, tensor.name
        elif key not in self.halves:
            self.halves[key] = self._cast(tensor, is_mask)
        return self.halves[key]

    def _cast(self, tensor: Tensor, is_mask: bool) -> Tensor:
        """A Cast to float16. A mask is clipped before it: -3.4e38 would become -inf."""
        source, producer = tensor, self.graph.producer(tensor)
        if is_mask:
            least = self.graph.constant("masked", np.array(_MASKED))
            name = f"{tensor.name}/finite"
            source = self.graph.add("Clip", [tensor, least], [name], like=tensor).outputs[0]
        elif producer is not None and is_op(producer, "Cast") and tensor.name not in self.path:
            source = producer.inputs[0]  # cast from an integer: cast that to float16 directly
        return self._typed(source, f"{tensor.name}/half", np.float16, tensor)

    def _float(self, tensor: Tensor) -> Tensor:
        if tensor.name not in self.floats:
            name = f"{tensor.name}/float"
            self.floats[tensor.name] = self._typed(tensor, name, np.float32, tensor)
        return self.floats[tensor.name]

    def _typed(self, source: Tensor, name: str, dtype: type, like: Tensor) -> Tensor:
        to = onnx.TensorProto.FLOAT16 if dtype is np.float16 else onnx.TensorProto.FLOAT
        result: Tensor = self.graph.add("Cast", [source], [name], {"to": int(to)}).outputs[0]
        result.dtype, result.shape = np.dtype(dtype), like.shape
        return result
