"""Types and shapes of every tensor, by ONNX's own inference over a weightless skeleton.

Inference names the dimensions it cannot compute; two dimensions with one name are equal, also
through Shape, Gather and Concat (data propagation). That is what lets passes prove that a Reshape
keeps its batch dimension. ONNX Runtime's symbolic shape inference is not used: it fails on
standard BERT exports.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx_graphsurgeon.importers.onnx_importer import get_onnx_tensor_dtype, get_onnx_tensor_shape

from qcompile.ir import Graph, Node, Shape, Tensor, is_constant, is_onnx_domain
from qcompile.ir.model_io.size_limits import check_sizes
from qcompile.ir.model_io.to_proto import skeleton

# Data propagation takes 100 bytes per element. A shape has a few, a vocabulary's bias 250,000.
_LONGEST_VECTOR = 1 << 18


def infer(graph: Graph) -> list[str]:
    """Fill dtype and shape of every variable that inference can type; returns the others' names.

    Shapes of graph inputs and outputs stay as the model declares them, unless undeclared. Raises
    ModelError where a tensor is too large (``check_sizes``).
    """
    unknown = _fill(graph, _inferred(graph))
    if unknown and _types_from_readers(graph):  # which may tell more behind them
        unknown = _fill(graph, _inferred(graph))
    return unknown


def _fill(graph: Graph, found: Mapping[str, onnx.ValueInfoProto]) -> list[str]:
    """Enter inferred types; returns the names of variables whose type or shape stays unknown."""
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


def _types_from_readers(graph: Graph) -> bool:
    """Type the results of custom operators by what their readers require.

    By the schema of an ONNX operator, operands and results that share a type variable have one
    type: a MatMul by a float32 weight reads float32. True where any type was found.
    """
    results = [t for n in graph.nodes if graph.is_custom(n) for t in n.outputs if t.name]
    if all(t.dtype is not None for t in results):
        return False
    changed = False
    for node in reversed(graph.nodes):
        variables = _type_variables(node, graph.opset) if is_onnx_domain(node) else []
        known = {kind: t.dtype for kind, t in variables if t.dtype is not None}
        for kind, tensor in variables:
            if tensor.name and tensor.dtype is None and kind in known:
                tensor.dtype, changed = known[kind], True
    return changed


def _type_variables(node: Node, opset: int) -> list[tuple[str, Tensor]]:
    """The type variable of each operand and result; none for an unknown operator."""
    try:
        schema = onnx.defs.get_schema(node.op, opset)
    except onnx.defs.SchemaError:
        return []
    found = []
    for formal, tensors in ((schema.inputs, node.inputs), (schema.outputs, node.outputs)):
        for i, tensor in enumerate(tensors):
            declared = formal[min(i, len(formal) - 1)]
            if declared.is_homogeneous and declared.type_str in _variables(schema):
                found.append((declared.type_str, tensor))
    return found


def _variables(schema: onnx.defs.OpSchema) -> set[str]:
    return {constraint.type_param_str for constraint in schema.type_constraints}


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
