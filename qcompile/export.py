"""Graph back to ModelProto and file; a weightless skeleton for shape inference.

Files are written whole or not at all: to a temporary name in the same folder, then renamed.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from qcompile.errors import OutputError
from qcompile.graph import Graph, Tensor, Variable, is_constant, is_float

# Constants up to this many elements can be shapes, axes or indices, which inference reads.
_SHAPE_ELEMENTS = 64
_PROTOBUF_LIMIT = 2**31 - 2**20
_STANDARD = (None, "", "ai.onnx")


def to_proto(graph: Graph) -> onnx.ModelProto:
    """The model as it stands, with the header it came with."""
    model: onnx.ModelProto = gs.export_onnx(graph.surgeon, do_type_check=False)
    head = graph.header
    model.ir_version = max(head.ir_version, 4)
    model.producer_name, model.producer_version = head.producer_name, head.producer_version
    model.domain, model.model_version = head.domain, head.model_version
    model.doc_string = head.doc_string
    onnx.helper.set_model_props(model, head.metadata)
    del model.graph.value_info[:]
    model.graph.value_info.extend(_value_info(graph))
    return model


def _value_info(graph: Graph) -> list[onnx.ValueInfoProto]:
    """Types of the surviving tensors. Only float32 ones: nothing else is asked of them later."""
    skip = {t.name for t in (*graph.inputs, *graph.outputs)}
    return [
        OnnxExporter.export_value_info_proto(t, do_type_check=False)
        for name, t in graph.tensors().items()
        if name not in skip and not is_constant(t) and is_float(t) and t.shape is not None
    ]


def skeleton(graph: Graph) -> onnx.ModelProto:
    """The model without its weights: large constants stand as typed graph inputs.

    Equivalent for type and shape inference, and small enough to copy freely. The shapes that
    exporters wrote beside intermediate tensors and outputs are left out: they are often wrong.
    """
    proto = onnx.GraphProto(name=graph.name)
    proto.node.extend(OnnxExporter.export_node(n) for n in graph.nodes)
    for tensor in graph.inputs:
        proto.input.append(OnnxExporter.export_value_info_proto(tensor, do_type_check=False))
    for constant in graph.constants().values():
        if int(np.prod(constant.shape, dtype=np.int64)) <= _SHAPE_ELEMENTS:
            proto.initializer.append(OnnxExporter.export_tensor_proto(constant))
        else:
            info = OnnxExporter.export_value_info_proto(constant, do_type_check=False)
            proto.input.append(info)
    proto.output.extend(_untyped(t) for t in graph.outputs)
    proto.value_info.extend(_contrib_types(graph))
    imports = [onnx.helper.make_opsetid(d, v) for d, v in sorted(graph.domains().items())]
    model = onnx.helper.make_model(proto, opset_imports=imports, ir_version=10)
    model.functions.extend(OnnxExporter.export_function(f) for f in graph.functions)
    return model


def _contrib_types(graph: Graph) -> list[onnx.ValueInfoProto]:
    """Types of tensors that contrib operators make, which inference cannot find by itself.

    Symbols of an earlier inference are left out: a new one may use their names for other sizes.
    """
    symbols = {d for t in graph.inputs for d in t.shape or () if isinstance(d, str)}
    found = []
    for tensor in (t for n in graph.nodes if n.domain not in _STANDARD for t in n.outputs):
        if tensor.name and tensor.dtype is not None and tensor.shape is not None:
            dims = [d if isinstance(d, int) or d in symbols else None for d in tensor.shape]
            typed = gs.Variable(tensor.name, tensor.dtype, dims)
            found.append(OnnxExporter.export_value_info_proto(typed, do_type_check=False))
    return found


def _untyped(tensor: Tensor | Variable) -> onnx.ValueInfoProto:
    return onnx.ValueInfoProto(name=tensor.name)


def write_atomic(path: Path, data: bytes) -> None:
    """Write bytes whole or not at all; an existing file survives every failure.

    Raises OutputError where the folder is missing, read only or full.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as e:
        raise OutputError(f"cannot write {str(path)!r}: {e.strerror}") from e
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        Path(name).chmod(0o666 & ~_umask())
        Path(name).replace(path)
    except OSError as e:
        raise OutputError(f"cannot write {str(path)!r}: {e.strerror}") from e
    finally:
        with suppress(FileNotFoundError):
            Path(name).unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_writable(path: Path) -> None:
    """Fail before any work is done where the output cannot be written. Raises OutputError."""
    if path.is_dir():
        raise OutputError(f"output {str(path)!r} is a folder, expected a file name")
    if not path.parent.is_dir():
        raise OutputError(f"output folder {str(path.parent)!r} does not exist")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent):
            pass
    except OSError as e:
        raise OutputError(f"output folder {str(path.parent)!r}: {e.strerror}") from e


def serialize(graph: Graph) -> bytes:
    """The model's bytes, deterministic. Raises OutputError over protobuf's 2 GiB."""
    try:
        data: bytes = to_proto(graph).SerializeToString(deterministic=True)
    except ValueError as e:
        raise OutputError(f"the compiled model does not fit one protobuf file: {e}") from e
    if len(data) > _PROTOBUF_LIMIT:
        raise OutputError(f"the compiled model has {len(data)} bytes, over protobuf's 2 GiB limit")
    return data
