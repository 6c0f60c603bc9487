"""Removes nodes that return their input.

    Identity(x), Dropout(x) in inference, Cast(x) to its own type, Transpose(x) by 0,1,2,…,
    Concat(x), Transpose(Transpose(x)) that undo each other                          →  x

Refuses a Sum that shields a quantizer with scales per axis from fusions (``shield-groups``), and
where the input is a graph input or constant and the output a graph output: the name of
the output must survive, and the Identity is what carries it.
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
        """(result, the tensor that it is the same as)."""
        source = _same_as(graph, node)
        if source is None:
            return None
        out = node.outputs[0]
        if _shields(graph, node):
            return Refusal("it keeps fusions away from scales per channel")
        if graph.is_output(out) and not _can_be_renamed(graph, source):
            return Refusal("it carries the name of a graph output")
        return out, source

    def rewrite(self, graph: Graph, ctx: Context, match: tuple[Tensor, Tensor]) -> None:
        graph.replace_uses(*match)


def _shields(graph: Graph, node: Node) -> bool:
    """True for a Sum beside a quantizer of data with scales per axis: without it models fail."""
    if not is_op(node, "Sum"):
        return False
    maker = graph.producer(node.inputs[0], "DequantizeLinear")
    beside = [n for n in graph.consumers(node.outputs[0]) if is_op(n, "QuantizeLinear")]
    if maker is not None:
        beside.append(maker)
    return any(rank(n.inputs[1]) for n in beside)


def _can_be_renamed(graph: Graph, source: Tensor) -> bool:
    """Only a tensor that is made for this output alone: ONNX Runtime's own fusions fail on outputs
    in the middle of what they match."""
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
        return _undone(graph, node)
    return None


def _is_inference(graph: Graph, node: Node) -> bool:
    mask_unused = all(not t.outputs and not graph.is_output(t) for t in node.outputs[1:])
    training = len(node.inputs) > 2 and node.inputs[2].name
    off = not training or (is_constant(node.inputs[2]) and not array(node.inputs[2]).any())
    return mask_unused and off


def _casts_to_itself(node: Node) -> bool:
    wanted = onnx.helper.tensor_dtype_to_np_dtype(node.attrs["to"])
    try:
        return bool(node.inputs[0].dtype is not None and node.inputs[0].dtype == wanted)
    except TypeError:
        return False


def _undone(graph: Graph, node: Node) -> Tensor | None:
    perm = node.attrs.get("perm")
    if perm is None:
        return None
    if list(perm) == sorted(perm):
        return node.inputs[0]
    maker = graph.producer(node.inputs[0], "Transpose")
    if maker is None or "perm" not in maker.attrs:
        return None
    inner = maker.attrs["perm"]
    return maker.inputs[0] if [inner[p] for p in perm] == sorted(perm) else None
