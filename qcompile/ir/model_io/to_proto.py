"""Converts a Graph to a ModelProto, to bytes, or to a skeleton without weights."""

from __future__ import annotations

import numpy as np
import onnx
from google.protobuf.message import EncodeError

from qcompile.errors import OutputError
from qcompile.ir import Graph, Node, Tensor, is_constant, is_float, is_onnx_domain, shape_of
from qcompile.ir.model_io.node_proto import element_type, fill_tensor, node_proto
from qcompile.ir.model_io.size_limits import PROTOBUF_LIMIT

# Constants up to this many elements can be shapes, axes or indices, which inference reads.
_SHAPE_ELEMENTS = 64
# IR versions that brought types for constants, of those that came after opset 17.
_SINCE_IR: dict[int, int] = {
    onnx.TensorProto.INT4: 10,
    onnx.TensorProto.UINT4: 10,
    onnx.TensorProto.INT2: 13,
    onnx.TensorProto.UINT2: 13,
}


def to_proto(graph: Graph) -> onnx.ModelProto:
    """The model with its constants, and the header that it was loaded with."""
    model = shell(graph)
    for constant in graph.constants().values():
        fill_tensor(model.graph.initializer.add(), constant)
    return model


def shell(graph: Graph) -> onnx.ModelProto:
    """The model without its constants."""
    head = graph.header
    model = onnx.ModelProto(
        ir_version=_ir_version(graph),
        producer_name=head.producer_name,
        producer_version=head.producer_version,
        domain=head.domain,
        model_version=head.model_version,
        doc_string=head.doc_string,
        opset_import=_imports(graph),
        functions=graph.functions,
    )
    onnx.helper.set_model_props(model, head.metadata)
    proto = model.graph
    proto.name, proto.doc_string = graph.name, graph.surgeon.doc_string
    proto.node.extend(_node(graph, n) for n in graph.nodes)
    proto.input.extend(_declared(graph, t) for t in graph.inputs)
    proto.output.extend(_declared(graph, t) for t in graph.outputs)
    if head.inner_types:
        proto.value_info.extend(_value_info(graph))
    return model


def _ir_version(graph: Graph) -> int:
    """The model's own, or the first one with all types of its constants."""
    types = {element_type(t.dtype) for t in graph.constants().values()}
    return max((graph.header.ir_version, 4, *(_SINCE_IR.get(kind, 0) for kind in types)))


def _imports(graph: Graph) -> list[onnx.OperatorSetIdProto]:
    return [onnx.helper.make_opsetid(d, v) for d, v in graph.domains().items()]


def _node(graph: Graph, node: Node) -> onnx.NodeProto:
    proto = node_proto(node)
    if node.name in graph.header.extras:
        proto.MergeFrom(graph.header.extras[node.name])
    return proto


def _declared(graph: Graph, tensor: Tensor) -> onnx.ValueInfoProto:
    """An input or output as the model declares it, or with its inferred type."""
    declared = graph.header.interface.get(tensor.name)
    if declared is not None and declared.HasField("type"):
        return declared
    return typed(tensor, _symbols(graph))


def _symbols(graph: Graph) -> set[str]:
    """Names of the inputs' symbolic dimensions.

    Names from shape inference are never written: another inference may use them for other sizes.
    """
    return {d for t in graph.inputs for d in t.shape or () if isinstance(d, str)}


def typed(tensor: Tensor, symbols: set[str]) -> onnx.ValueInfoProto:
    """Name, type and shape of a tensor as far as known."""
    if tensor.dtype is None or getattr(tensor, "type", "tensor_type") != "tensor_type":
        return onnx.ValueInfoProto(name=tensor.name)
    shape = shape_of(tensor)
    dims = shape and [d if isinstance(d, int) or d in symbols else None for d in shape]
    return onnx.helper.make_tensor_value_info(tensor.name, element_type(tensor.dtype), dims)


def _value_info(graph: Graph) -> list[onnx.ValueInfoProto]:
    """Types of inner float tensors, the only ones that are needed later."""
    skip = {t.name for t in (*graph.inputs, *graph.outputs)}
    symbols = _symbols(graph)
    return [
        typed(t, symbols)
        for name, t in graph.tensors().items()
        if name not in skip
        and not is_constant(t)
        and (is_float(t, np.float16) or (is_float(t) and t.shape is not None))
    ]


def skeleton(graph: Graph) -> onnx.ModelProto:
    """The model without weights: large constants become typed graph inputs.

    Equivalent for type and shape inference, and small. Shapes that exporters wrote for intermediate
    tensors and outputs are left out: they are often wrong.
    """
    model = onnx.ModelProto(ir_version=10, opset_import=_imports(graph), functions=graph.functions)
    proto = model.graph
    proto.name = graph.name
    proto.node.extend(_node(graph, n) for n in graph.nodes)
    proto.input.extend(_declared(graph, t) for t in graph.inputs)
    for dim in (d for i in proto.input for d in i.type.tensor_type.shape.dim):
        if dim.dim_value < 0:  # how some exporters write an unknown dimension
            dim.Clear()
    for constant in graph.constants().values():
        if int(np.prod(constant.shape, dtype=np.int64)) <= _SHAPE_ELEMENTS:
            fill_tensor(proto.initializer.add(), constant)
        else:
            proto.input.append(typed(constant, set()))
    proto.output.extend(onnx.ValueInfoProto(name=t.name) for t in graph.outputs)
    proto.value_info.extend(_contrib_types(graph))
    return model


def _contrib_types(graph: Graph) -> list[onnx.ValueInfoProto]:
    """Types of the outputs of contrib and custom operators, which ONNX inference does not know."""
    symbols = _symbols(graph)
    outputs = ((n, t) for n in graph.nodes if not is_onnx_domain(n) for t in n.outputs if t.name)
    known = ((n, t) for n, t in outputs if t.dtype is not None)
    return [typed(t, symbols) for n, t in known if t.shape is not None or graph.is_custom(n)]


def serialize(graph: Graph) -> bytes:
    """The model's bytes, deterministic. Raises OutputError above protobuf's limit of 2 GiB."""
    try:
        data: bytes = to_proto(graph).SerializeToString(deterministic=True)
    except (ValueError, EncodeError) as e:
        limit = "is it over protobuf's 2 GiB limit?"
        raise OutputError(f"the compiled model cannot be serialized, {limit} {e}") from e
    if len(data) > PROTOBUF_LIMIT:
        raise OutputError(f"the compiled model has {len(data)} bytes, over protobuf's 2 GiB limit")
    return data
