"""Removes nodes that return their input.

    Identity(x), Dropout(x) in inference, Cast(x) to its own type, Transpose(x) by 0,1,2,…,
    Concat(x), Transpose(Transpose(x)) that undo each other                          →  x

Refuses a Sum that keeps ONNX Runtime from fusing a per-channel quantizer (``shield-groups``), and
nodes whose input is a graph input or constant and whose output is a graph output: the name of the
output must stay, and the node provides it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx

from qcompile.ir import Graph, Node, Refusal, Tensor, array, is_constant, is_op, rank
from qcompile.planning import Context
from qcompile.rewriting import NodeRewrite, Numerics, Stage


@dataclass(frozen=True)
class EliminateIdentity(NodeRewrite[tuple[Tensor, Tensor]]):
    """Drop nodes without effect."""

    name: ClassVar[str] = "eliminate-identity"
    stage: ClassVar[Stage] = Stage.SIMPLIFY
    numerics: ClassVar[Numerics] = Numerics.EXACT
    ops: ClassVar[tuple[str, ...]] = ("Identity", "Concat", "Sum", "Dropout", "Cast", "Transpose")

    def match(
        self, graph: Graph, ctx: Context, node: Node
    ) -> tuple[Tensor, Tensor] | Refusal | None:
        """(result, the tensor that it equals)."""
        source = _same_as(graph, node)
        if source is None:
            return None
        out = node.outputs[0]
        if _shields(graph, node):
            return Refusal("it keeps ONNX Runtime from fusing a per-channel quantizer")
        if graph.is_output(out) and not _can_be_renamed(graph, source):
            return Refusal("it carries the name of a graph output")
        return out, source

    def rewrite(self, graph: Graph, ctx: Context, match: tuple[Tensor, Tensor]) -> None:
        graph.replace_uses(*match)


def _shields(graph: Graph, node: Node) -> bool:
    """True for a Sum next to a per-channel quantizer of data: without it, the model cannot run."""
    if not is_op(node, "Sum"):
        return False
    dequantizer = graph.producer(node.inputs[0], "DequantizeLinear")
    neighbours = [n for n in graph.consumers(node.outputs[0]) if is_op(n, "QuantizeLinear")]
    if dequantizer is not None:
        neighbours.append(dequantizer)
    return any(rank(n.inputs[1]) for n in neighbours)


def _can_be_renamed(graph: Graph, source: Tensor) -> bool:
    """True for a tensor that is computed, and read by this node alone: ONNX Runtime's own fusions
    fail where a graph output is inside the pattern that they match."""
    return graph.producer(source) is not None and graph.only_consumer(source) is not None


def _same_as(graph: Graph, node: Node) -> Tensor | None:
    """The tensor that a node returns unchanged, None where it computes something."""
    if not node.inputs or not node.inputs[0].name:
        return None
    source = node.inputs[0]
    if is_op(node, "Identity") or (is_op(node, "Concat", "Sum") and len(node.inputs) == 1):
        return source
    if is_op(node, "Dropout") and _is_inference(graph, node):
        return source
    if is_op(node, "Cast") and _casts_to_itself(node):
        return source
    if is_op(node, "Transpose"):
        return _before_transposes(graph, node)
    return None


def _is_inference(graph: Graph, node: Node) -> bool:
    mask_unused = all(not t.outputs and not graph.is_output(t) for t in node.outputs[1:])
    training = len(node.inputs) > 2 and node.inputs[2].name
    off = not training or (is_constant(node.inputs[2]) and not array(node.inputs[2]).any())
    return mask_unused and off


def _casts_to_itself(node: Node) -> bool:
    target = onnx.helper.tensor_dtype_to_np_dtype(node.attrs["to"])
    try:
        return bool(node.inputs[0].dtype is not None and node.inputs[0].dtype == target)
    except TypeError:
        return False


def _before_transposes(graph: Graph, node: Node) -> Tensor | None:
    """What a Transpose, alone or with the one before it, gives back in the same order."""
    perm = node.attrs.get("perm")
    if perm is None:
        return None
    if list(perm) == sorted(perm):
        return node.inputs[0]
    first = graph.producer(node.inputs[0], "Transpose")
    if first is None or "perm" not in first.attrs:
        return None
    inner = first.attrs["perm"]
    return first.inputs[0] if [inner[p] for p in perm] == sorted(perm) else None
