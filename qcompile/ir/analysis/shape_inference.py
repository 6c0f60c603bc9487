"""Types and shapes of every tensor, by ONNX's own inference over a weightless skeleton.

Inference names the dimensions it cannot compute; two dimensions with one name are equal, also
through Shape, Gather and Concat (data propagation). That is what lets passes prove that a Reshape
keeps its batch dimension. ONNX Runtime's symbolic shape inference is not used: it fails on
standard BERT exports.
"""

from __future__ import annotations

import onnx
from onnx_graphsurgeon.importers.onnx_importer import get_onnx_tensor_dtype, get_onnx_tensor_shape

from qcompile.ir import Graph, Shape, is_constant
from qcompile.ir.model_io.size_limits import check_sizes
from qcompile.ir.model_io.to_proto import skeleton

# Data propagation takes 100 bytes per element. A shape has a few, a vocabulary's bias 250,000.
_LONGEST_VECTOR = 1 << 18


def infer(graph: Graph) -> list[str]:
    """Fill dtype and shape of every variable that inference can type; returns the others' names.

    Shapes of graph inputs and outputs stay as the model declares them, unless undeclared. Raises
    ModelError where a tensor is too large (``check_sizes``).
    """
    found = _inferred(graph)
    unknown = []
    visible = {t.name for t in (*graph.inputs, *graph.outputs)}
    for name, tensor in graph.tensors().items():
        if is_constant(tensor):
            continue
        info = found.get(name)
        if info is not None and info.type.WhichOneof("value") == "tensor_type":
            tensor.dtype = tensor.dtype or get_onnx_tensor_dtype(info)
            shape = get_onnx_tensor_shape(info)
            if shape is not None and (name not in visible or tensor.shape is None):
                tensor.shape = shape
        if tensor.dtype is None or tensor.shape is None:
            unknown.append(name)
    return unknown


def inferred_shapes(graph: Graph) -> dict[str, Shape]:
    """Shapes by tensor name as inference sees them, outputs too, whatever the model declares."""
    found = {}
    for name, info in _inferred(graph).items():
        shape = get_onnx_tensor_shape(info) if info.type.HasField("tensor_type") else None
        if shape is not None:
            found[name] = tuple(shape)
    return found


def _inferred(graph: Graph) -> dict[str, onnx.ValueInfoProto]:
    """Types by name; sizes are checked before data propagation stores the values of vectors."""
    model = skeleton(graph)
    found = _typed(model, data_prop=False)
    longest = check_sizes(graph, found)
    if longest > _LONGEST_VECTOR:
        return found
    found = _typed(model, data_prop=True)
    check_sizes(graph, found)
    return found


def _typed(model: onnx.ModelProto, *, data_prop: bool) -> dict[str, onnx.ValueInfoProto]:
    try:
        model = onnx.shape_inference.infer_shapes(model, data_prop=data_prop)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return {}  # inference rejects a node: types come from a recorded run
    typed = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    return {v.name: v for v in typed if v.HasField("type")}
