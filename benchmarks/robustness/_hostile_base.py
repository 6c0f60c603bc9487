"""Shared by the builders of hostile models: their registry, and helpers that build small models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

Builder = Callable[[Path], Path]
BUILDERS: dict[str, Builder] = {}
HUGE = 1 << 60
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
SECRET = "secret.bin"  # a file outside the model's folder, which must never be read
ESCAPE = "\x1b[31mred\x1b[0m\x07\x9b2J\u202e\nfake: line"


def hostile(build: Builder) -> Builder:
    """Register a builder under its name."""
    BUILDERS[build.__name__] = build
    return build


def model_of(
    nodes: list[onnx.NodeProto],
    initializers: list[onnx.TensorProto] | None = None,
    shape: tuple[str | int, ...] = ("batch", 4),
    functions: list[onnx.FunctionProto] | None = None,
    opset: int = 17,
) -> onnx.ModelProto:
    """A model from float input x to float output y without a declared shape."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, shape)],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        initializers or [],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=imports, functions=functions or [], ir_version=8)


def save(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def weight(name: str = "w", rows: int = 4) -> onnx.TensorProto:
    values = np.random.default_rng(0).standard_normal((rows, 4)).astype(np.float32)
    return onnx.numpy_helper.from_array(values, name)


def linear() -> onnx.ModelProto:
    return model_of([helper.make_node("MatMul", ["x", "w"], ["y"], name="n")], [weight()])
