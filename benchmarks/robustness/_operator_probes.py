"""One small model for each integer operator of a compiled model, with inputs and exact results.

A probe is the operator with its own weights and zero points, so that its kernel adds the same
products in the same order, but its result is the sum itself: matrix multiplications are
MatMulInteger; a QLinearConv computes a single position, and its bias is the negative of each exact
sum. Inputs are those of the model on a feed, and such that sums of pairs are as large as possible.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from qcompile.compiler.stages.saturation_check import IntegerSums
from qcompile.data.feeds import Feed
from qcompile.errors import ModelError
from qcompile.ir import is_op
from qcompile.ir.model_io import read_model
from qcompile.ir.quantized_operators import Operand, byte_products, quantized_operator
from qcompile.quant.weight_rounding import pairs, summed_first, worst_sums
from qcompile.runtime.evaluation.int16_saturation import label
from qcompile.runtime.evaluation.tensor_facts import TensorFacts
from qcompile.runtime.session import Session, SessionOptions, with_outputs

Array = npt.NDArray[Any]
_ROWS = 16  # rows of the model's own data
_COLUMNS = 16  # outputs for which the worst data is built
_PATCHES = 12  # inputs of a convolution


@dataclass(frozen=True)
class Probe:
    """An operator as a model of its own; ``expected``: its exact result for each feed."""

    node: str
    model: onnx.ModelProto
    feeds: list[dict[str, Array]]
    expected: list[Array]


def probes(sums: IntegerSums, feed: Feed | None, seed: int = 0) -> list[Probe]:
    """The probes of the integer operators of a model, except of those in bodies and functions."""
    model, storage = read_model.read_model(sums.path)
    facts = TensorFacts(model.graph, storage)
    data = _recorded(sums, model, feed)
    largest = {(p.node, p.right): p.largest for p in sums.linears}
    found: list[Probe] = []
    for node in model.graph.node:
        rng = np.random.default_rng([seed, len(found)])
        if is_op(node, "QLinearConv", "com.microsoft.QLinearConv"):
            found += _convolution(node, facts, rng)
            continue
        for left, right in byte_products(node):
            bound = largest.get((label(node), right.names(node)[0]), 128)
            found += _product(node, left, right, facts, data, bound, rng)
    return found


def _recorded(sums: IntegerSums, model: onnx.ModelProto, feed: Feed | None) -> dict[str, Array]:
    """The computed operands of the integer operators, for one feed; none where it fails."""
    if feed is None:
        return {}
    computed = {name for node in model.graph.node for name in node.output}
    operands = {
        name
        for node in model.graph.node
        for pair in byte_products(node)
        for operand in pair
        if not operand.is_float
        for name in operand.names(node)
    }
    names = sorted(operands & computed)
    tapped = sums.path.with_name("probed.onnx")
    taps = with_outputs(onnx.load(sums.path, load_external_data=False), names)
    tapped.write_bytes(taps.SerializeToString())
    try:
        outputs = Session(tapped, SessionOptions(threads=1, optimize=False)).run(feed)
    except ModelError:
        return {}
    return {**feed, **outputs}


def _product(
    node: onnx.NodeProto,
    left: Operand,
    right: Operand,
    facts: TensorFacts,
    data: dict[str, Array],
    largest: int,
    rng: np.random.Generator,
) -> Iterator[Probe]:
    """A matrix multiplication of 8-bit integers."""
    row = quantized_operator(node)
    kind = "" if row is None else row.kind
    if kind == "convolution":
        yield from _conv_integer(node, facts, data, rng)
        return
    (a_name, _, a_zero), (b_name, _, b_zero) = left.names(node), right.names(node)
    constant = facts.values(b_name)
    weight = data.get(b_name) if constant is None else constant
    if weight is None or weight.ndim < 1 or not weight.size or weight.dtype.itemsize > 1:
        return
    if any(attribute.name == "transB" and attribute.i for attribute in node.attribute):
        weight = np.swapaxes(weight, -1, -2)
    weight = np.ascontiguousarray(weight[:, None] if weight.ndim == 1 else weight)
    own = data.get(a_name) if facts.values(a_name) is None else facts.values(a_name)
    own = None if own is None or own.dtype.itemsize > 1 or own.ndim < 2 else own
    dtype = np.dtype(np.uint8) if own is None else own.dtype
    zeros = [_scalar(z, facts, data, t) for z, t in ((a_zero, dtype), (b_zero, weight.dtype))]
    model = _matmul(dtype, weight, zeros, constant=constant is not None)
    feeds: list[dict[str, Array]] = []
    if constant is not None:
        rows = _worst_rows(weight.reshape(-1, *weight.shape[-2:])[0], dtype, rng)
        if own is not None and own.shape[-1] == rows.shape[-1]:
            rows = np.concatenate([own.reshape(-1, own.shape[-1])[:_ROWS], rows])
        # A single row has a kernel of its own.
        feeds = [{"a": rows}, *({"a": rows[i : i + 1]} for i in range(min(4, len(rows))))]
        rights = [weight] * len(feeds)
    else:
        lead = own.shape[:-2] if own is not None else ()
        shape = (*lead, 4, weight.shape[-2])
        extreme = rng.choice(np.array([-largest, largest - (largest > 127)]), weight.shape)
        extreme = np.abs(extreme) if weight.dtype == np.uint8 else extreme
        high = np.full(shape, np.iinfo(dtype).max, dtype)
        pattern = rng.choice(np.array([np.iinfo(dtype).min, np.iinfo(dtype).max], dtype), shape)
        same_sign = np.abs(extreme).clip(0, np.iinfo(weight.dtype).max)
        rights = [weight, extreme.astype(weight.dtype), same_sign.astype(weight.dtype)]
        feeds = [{"a": a, "b": b} for a, b in zip((pattern, pattern, high), rights, strict=True)]
        if own is not None and own.shape[-1] == weight.shape[-2]:
            feeds.append({"a": own, "b": weight})
            rights.append(weight)
    expected = [_exact(f["a"], b, zeros) for f, b in zip(feeds, rights, strict=True)]
    yield Probe(label(node), model, feeds, expected)


def _scalar(name: str, facts: TensorFacts, data: dict[str, Array], dtype: np.dtype[Any]) -> Array:
    """A zero point of one value, 0 where it is another."""
    found = facts.values(name) if facts.values(name) is not None else data.get(name)
    usable = found is not None and found.size == 1 and found.dtype == dtype
    return np.zeros((), dtype) if found is None or not usable else found.reshape(())


def _matmul(
    dtype: np.dtype[Any], weight: Array, zeros: list[Array], *, constant: bool
) -> onnx.ModelProto:
    a_type, b_type = (helper.np_dtype_to_tensor_dtype(t) for t in (dtype, weight.dtype))
    given = [helper.make_tensor_value_info("a", a_type, None)]
    constants = [numpy_helper.from_array(z, n) for z, n in zip(zeros, ("az", "bz"), strict=True)]
    if constant:
        constants.append(numpy_helper.from_array(weight, "b"))
    else:
        given.append(helper.make_tensor_value_info("b", b_type, None))
    node = helper.make_node("MatMulInteger", ["a", "b", "az", "bz"], ["y"])
    return _model(node, given, TensorProto.INT32, constants)


def _model(
    node: onnx.NodeProto,
    given: list[onnx.ValueInfoProto],
    result: int,
    constants: list[onnx.TensorProto],
) -> onnx.ModelProto:
    made = [helper.make_tensor_value_info("y", result, None)]
    graph = helper.make_graph([node], "probe", given, made, constants)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def _exact(left: Array, right: Array, zeros: list[Array]) -> Array:
    a, b = (
        x.astype(np.float64) - float(z) for x, z in zip((left, right), zeros, strict=True)
    )  # float64 holds such sums exactly, and BLAS adds them fast
    total: Array = np.matmul(a, b).astype(np.int64).astype(np.int32)
    return total


def _worst_rows(weight: Array, dtype: np.dtype[Any], rng: np.random.Generator) -> Array:
    """Data [rows, inputs] that makes sums of pairs of a weight [inputs, outputs] large."""
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    first, second = pairs(weight.astype(np.int32))
    worst = worst_sums(first, second).max(0, initial=0)
    columns = weight[:, np.argsort(-worst)[:_COLUMNS]].T
    aligned = np.where(columns > 0, high, low)
    return np.concatenate(
        [
            np.full((1, len(weight)), high),
            aligned,
            np.where(columns > 0, low, high),
            rng.choice(np.array([low, high]), (8, len(weight))),
        ]
    ).astype(dtype)


def _convolution(
    node: onnx.NodeProto, facts: TensorFacts, rng: np.random.Generator
) -> Iterator[Probe]:
    """A QLinearConv at one position, whose bias is minus the exact sum: it gives the zero point."""
    kernel = facts.values(node.input[3])
    if kernel is None or kernel.ndim < 3:
        return
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    last = bool(attributes.get("channels_last", 0))
    groups = int(attributes.get("group", 1))
    spread = attributes.get("dilations") or [1] * (kernel.ndim - 2)
    kind = facts.type(node.input[0]) or TensorProto.UINT8
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(kind))
    own = facts.values(node.input[5])
    zero = np.zeros((), kernel.dtype) if own is None else own
    middle = np.array(128 if dtype == np.uint8 else 0, dtype)  # both larger and smaller sums show
    patches = _worst_patches(kernel, groups, dtype, rng)
    shifted = kernel.astype(np.int64) - zero.reshape(-1, *[1] * (kernel.ndim - 1)).astype(np.int64)
    feeds, expected = [], []
    for patch in patches:
        grouped = patch.reshape(groups, 1, -1).astype(np.int64)
        sums = (grouped * shifted.reshape(groups, len(kernel) // groups, -1)).sum(-1)
        x = _dilated(patch, spread)[None]
        x = np.moveaxis(x, 1, -1) if last else x
        feeds.append({"x": np.ascontiguousarray(x), "c": -sums.reshape(-1).astype(np.int32)})
        shape = [1, len(kernel)] + [1] * (kernel.ndim - 2)
        shape = [shape[0], *shape[2:], shape[1]] if last else shape
        expected.append(np.full(shape, middle, dtype))
    one, no = np.ones((), np.float32), np.zeros((), dtype)
    values = {
        "s": one,
        "z": no,
        "m": middle,
        "w": kernel,
        "ws": np.ones(zero.shape, np.float32),
        "wz": zero,
    }
    kept = {k: v for k, v in attributes.items() if k in ("group", "dilations", "channels_last")}
    inputs = ["x", "s", "z", "w", "ws", "wz", "s", "m", "c"]
    single = helper.make_node(
        "QLinearConv", inputs, ["y"], domain=node.domain, kernel_shape=kernel.shape[2:], **kept
    )
    given = [
        helper.make_tensor_value_info("x", kind, [1, *[None] * (kernel.ndim - 1)]),
        helper.make_tensor_value_info("c", TensorProto.INT32, [len(kernel)]),
    ]
    constants = [numpy_helper.from_array(np.asarray(v), n) for n, v in values.items()]
    yield Probe(label(node), _model(single, given, kind, constants), feeds, expected)


def _worst_patches(
    kernel: Array, groups: int, dtype: np.dtype[Any], rng: np.random.Generator
) -> Array:
    """Inputs of one position [patches, channels, *space] that make sums of pairs large."""
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    first, second = pairs(summed_first(kernel).astype(np.int32))
    worst = worst_sums(first, second).max(0, initial=0)
    found = [np.full((groups, *kernel.shape[1:]), high)]
    for output in np.argsort(-worst)[:_PATCHES]:
        found.append(np.broadcast_to(np.where(kernel[output] > 0, high, low), found[0].shape))
        found.append(np.broadcast_to(np.where(kernel[output] > 0, low, high), found[0].shape))
    found += [rng.choice(np.array([low, high]), found[0].shape) for _ in range(4)]
    return np.stack(found).astype(dtype).reshape(len(found), -1, *kernel.shape[2:])


def _dilated(patch: Array, spread: list[int]) -> Array:
    """A patch [channels, *space] with the gaps of a dilated kernel."""
    sizes = [(n - 1) * d + 1 for n, d in zip(patch.shape[1:], spread, strict=True)]
    wide = np.zeros((len(patch), *sizes), patch.dtype)
    wide[(slice(None), *(slice(None, None, d) for d in spread))] = patch
    return wide


def _conv_integer(
    node: onnx.NodeProto, facts: TensorFacts, data: dict[str, Array], rng: np.random.Generator
) -> Iterator[Probe]:
    """A ConvInteger, whose result is the sum, at one position."""
    kernel = facts.values(node.input[1])
    if kernel is None or kernel.ndim < 3 or node.op_type != "ConvInteger":
        return
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    groups = int(attributes.get("group", 1))
    spread = attributes.get("dilations") or [1] * (kernel.ndim - 2)
    kind = facts.type(node.input[0]) or TensorProto.UINT8
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(kind))
    feeds, expected = [], []
    for patch in _worst_patches(kernel, groups, dtype, rng):
        grouped = patch.reshape(groups, 1, -1).astype(np.int64)
        weights = kernel.reshape(groups, len(kernel) // groups, -1).astype(np.int64)
        feeds.append({"x": _dilated(patch, spread)[None]})
        sums = (grouped * weights).sum(-1).reshape(1, -1, *[1] * (kernel.ndim - 2))
        expected.append(sums.astype(np.int32))
    kept = {k: v for k, v in attributes.items() if k in ("group", "dilations")}
    single = helper.make_node(
        "ConvInteger", ["x", "w"], ["y"], kernel_shape=kernel.shape[2:], **kept
    )
    given = [helper.make_tensor_value_info("x", kind, [1, *[None] * (kernel.ndim - 1)])]
    constants = [numpy_helper.from_array(np.ascontiguousarray(kernel), "w")]
    yield Probe(label(node), _model(single, given, TensorProto.INT32, constants), feeds, expected)
