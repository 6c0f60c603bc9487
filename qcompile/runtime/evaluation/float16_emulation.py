"""Emulates a float16 model on a provider without float16 kernels.

ONNX Runtime's CPU provider runs float16 operators in float32 and omits the rounding between them,
which hides overflow and rounding errors. Here each operator computes in float32, like kernels that
accumulate in float32, and each result is rounded to float16:

    y = Op(x)   →   y = Cast(Op(x/wide), float16),  y/wide = Cast(y, float32)

Only tensors that the model declares as float16 are changed, and none in subgraphs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx

from qcompile.errors import ModelError
from qcompile.ir.model_io.size_limits import PROTOBUF_LIMIT

_HALF, _FLOAT = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
# Operators whose result has the type that an attribute names, whatever their operands are.
_TYPED = (
    "Bernoulli", "Cast", "CastLike", "Constant", "ConstantOfShape", "EyeLike", "RandomNormal",
    "RandomNormalLike", "RandomUniform", "RandomUniformLike",
)  # fmt: skip


def rounding_form(model: bytes) -> bytes:
    """The model in float32 with explicit rounding to float16; the same bytes without float16.

    Raises ModelError where it exceeds protobuf's limit of 2 GiB in float32.
    """
    proto = onnx.ModelProto.FromString(model)
    half = _half_tensors(proto.graph)
    if not half:
        return model
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    starts = [i.name for i in proto.graph.input if i.name in half]
    proto.graph.node.extend(_widen(name) for name in starts)
    for node in nodes:
        proto.graph.node.extend(_rewritten(node, half))
    used = {name for n in proto.graph.node for name in n.input} | _captured(nodes)
    used |= {o.name for o in proto.graph.output}
    _widen_constants(proto.graph, half, used)
    size = proto.ByteSize()
    if size > PROTOBUF_LIMIT:
        raise ModelError(
            f"in float32 the model has {size} bytes, over protobuf's 2 GiB limit: compare it where "
            "the target's provider is installed (--no-verify leaves that out)"
        )
    widened: bytes = proto.SerializeToString()
    return widened


def _half_tensors(graph: onnx.GraphProto) -> set[str]:
    typed = (*graph.input, *graph.output, *graph.value_info)
    found = {v.name for v in typed if v.type.tensor_type.elem_type == _HALF}
    found |= {t.name for t in graph.initializer if t.data_type == _HALF}
    for node in graph.node:
        if node.op_type == "Cast" and any(a.name == "to" and a.i == _HALF for a in node.attribute):
            found.add(node.output[0])
        found |= _half_results(node)
    return found


def _half_results(node: onnx.NodeProto) -> set[str]:
    """Results of an If, Loop or Scan that its body declares as float16; a Loop's has one more."""
    found = set()
    for body in _bodies(node):
        declared = body.output[len(body.output) - len(node.output) :]
        kinds = (value.type.tensor_type.elem_type for value in declared)
        found |= {name for name, kind in zip(node.output, kinds, strict=False) if kind == _HALF}
    return found - {""}


def _rewritten(node: onnx.NodeProto, half: set[str]) -> Iterator[onnx.NodeProto]:
    if node.op_type in _TYPED or _bodies(node):
        yield node
        yield from (_widen(name) for name in node.output if name in half)
        return
    results = [name for name in node.output if name in half]
    for i, name in enumerate(node.input):
        if name in half:
            node.input[i] = _wide(name)
    for i, name in enumerate(node.output):
        if name in half:
            node.output[i] = f"{name}/exact"
    yield node
    for name in results:
        yield onnx.helper.make_node("Cast", [f"{name}/exact"], [name], f"{name}/round", to=_HALF)
        yield _widen(name)


def _wide(name: str) -> str:
    return f"{name}/wide"


def _widen(name: str) -> onnx.NodeProto:
    return onnx.helper.make_node("Cast", [name], [_wide(name)], f"{name}/widen", to=_FLOAT)


def _bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [g for a in node.attribute for g in (*a.graphs, *([a.g] if a.HasField("g") else []))]


def _captured(nodes: list[onnx.NodeProto]) -> set[str]:
    """Names that subgraphs read, at any depth."""
    inner = [n for node in nodes for body in _bodies(node) for n in body.node]
    return {name for n in inner for name in n.input} | (_captured(inner) if inner else set())


def _widen_constants(graph: onnx.GraphProto, half: set[str], used: set[str]) -> None:
    constants = list(graph.initializer)
    del graph.initializer[:]
    for constant in constants:
        if constant.name not in half or constant.name in used:
            graph.initializer.append(constant)
        if constant.name in half and _wide(constant.name) in used:
            values = onnx.numpy_helper.to_array(constant).astype(np.float32)
            wide = onnx.numpy_helper.from_array(values, _wide(constant.name))
            graph.initializer.append(wide)
