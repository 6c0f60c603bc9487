"""Converts a graph to a newer opset with ONNX's own version converter.

The converter gets the skeleton without weights, so that it is fast and makes no second copy of
them; the constants are restored by name afterwards.
"""

from __future__ import annotations

import onnx
from onnx import version_converter

from qcompile.errors import ModelError
from qcompile.ir import Graph, Refusal, has_subgraph, is_constant, is_onnx_domain
from qcompile.ir.model_io.from_proto import from_proto
from qcompile.ir.model_io.to_proto import skeleton


def convert_opset(graph: Graph, opset: int) -> Refusal | None:
    """Convert ``graph`` to ``opset`` in place; returns a Refusal where that is not possible."""
    if graph.functions:
        return Refusal("the model has local functions")
    if not all(is_onnx_domain(node) for node in graph.nodes):
        return Refusal("the model has operators outside ONNX")
    if any(has_subgraph(node) for node in graph.nodes):
        return Refusal("the model has subgraphs")
    small = skeleton(graph)
    try:
        converted = version_converter.convert_version(small, opset)
    except (RuntimeError, IndexError, onnx.checker.ValidationError) as e:
        reason = str(e).strip().splitlines()[0][:120]
        return Refusal(f"ONNX's version converter fails: {reason}")
    try:
        new = from_proto(converted)
    except ModelError as e:
        return Refusal(f"ONNX's version converter made an invalid graph: {e}")
    _restore(graph, new)
    graph.adopt(new)
    return None


def _restore(old: Graph, new: Graph) -> None:
    """Restore weights and the declared types of inputs and outputs, which the skeleton lacks."""
    constants, tensors = old.constants(), new.tensors()
    for name, constant in constants.items():
        tensor = tensors.get(name)
        if tensor is not None and not is_constant(tensor):
            new.make_constant(tensor, constant)
    declared = {t.name: t for t in (*old.inputs, *old.outputs)}
    for tensor in (*new.inputs, *new.outputs):
        tensor.dtype, tensor.shape = declared[tensor.name].dtype, declared[tensor.name].shape
