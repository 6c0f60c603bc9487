"""Sums of products as x86 without VNNI adds them, in numpy, and what gives them on any processor.

Where the processor adds in int32 that is the form; where it saturates itself, the model as it is,
so that the reference in numpy is held against the real kernels there. tools/avx2_runtime.py gives
an x86 processor with VNNI the kernels of one without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx.helper import make_graph, make_model, make_opsetid, make_tensor_value_info
from onnx.numpy_helper import from_array

from qcompile.quant import Array
from qcompile.runtime.evaluation.int16_saturation import HIGH, LOW
from qcompile.runtime.evaluation.saturating_form import saturating_form
from qcompile.runtime.session import Session, SessionOptions, saturates

MICROSOFT = "com.microsoft"
PLAIN = SessionOptions(threads=1, optimize=False, exact=False)
Tensors = Mapping[str, Array]


def model_of(
    node: onnx.NodeProto, feeds: Tensors, constants: Tensors, opset: int = 17
) -> onnx.ModelProto:
    """One node with output y; constants that it does not read are left out."""
    kinds = {n: onnx.helper.np_dtype_to_tensor_dtype(v.dtype) for n, v in feeds.items()}
    graph = make_graph(
        [node],
        "g",
        [make_tensor_value_info(name, kind, None) for name, kind in kinds.items()],
        [onnx.ValueInfoProto(name="y")],
        [from_array(v, n) for n, v in constants.items() if n in node.input],
    )
    imports = [make_opsetid("", opset), make_opsetid(MICROSOFT, 1)]
    return make_model(graph, opset_imports=imports, ir_version=8)


def run(model: onnx.ModelProto, feeds: Tensors) -> Array:
    return Session(model.SerializeToString(), PLAIN).run(feeds)["y"]


def answer(model: onnx.ModelProto, feeds: Tensors) -> Array:
    """What x86 without VNNI gives, on any processor."""
    form = saturating_form(model)
    assert form.left == ()
    return run(model if saturates() else form.model, feeds)


def integers(shape: Sequence[int], kind: type[np.integer[Any]], seed: int = 0) -> Array:
    """Values over the whole range of a type, of which many are at its ends."""
    wide = np.random.default_rng(seed).integers(-40, 296, shape)
    if kind is np.int8:
        wide = wide - 128
    info = np.iinfo(kind)
    return np.clip(wide, info.min, info.max).astype(kind)


def saturated(left: Array, right: Array, zeros: tuple[Any, Any] = (0, 0)) -> Array:
    """vpmaddubsw over neighbours, and int32 beyond: [..., rows, k] by [..., k, outputs]."""
    a, b = left.astype(np.int64), right.astype(np.int64)
    total: Array = (a - np.int64(zeros[0])) @ (b - np.asarray(zeros[1], np.int64))
    for k in range(0, a.shape[-1] - 1, 2):
        pair = a[..., k : k + 2] @ b[..., k : k + 2, :]
        total = total + np.clip(pair, LOW, HIGH) - pair
    sums: Array = total.astype(np.int32)
    return sums


def requantized(sums: Array, multiplier: Array, zero: Array) -> Array:
    """MlasRequantizeOutput."""
    scaled = np.rint(sums.astype(np.float32) * multiplier) + np.float32(zero)
    clipped: Array = np.clip(scaled, 0, 255).astype(np.uint8)
    return clipped
