"""Convolutions that saturate: in numpy from patches, position in the kernel before channel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from onnx.helper import make_node

from qcompile.quant import Array
from qcompile.runtime.evaluation.saturating_form import saturating_form
from tests.runtime.evaluation.paired_products import (
    MICROSOFT,
    answer,
    integers,
    model_of,
    requantized,
    saturated,
)

CONV_INPUTS = ["x", "sx", "zx", "w", "sw", "zw", "sy", "zy", "b"]
CONVOLUTIONS: list[dict[str, Any]] = [
    {"channels": 3, "outputs": 5, "kernel": (3, 3)},
    {"channels": 8, "outputs": 24, "kernel": (3, 3), "pads": [1, 0, 1, 2], "strides": [2, 1]},
    {"channels": 6, "outputs": 4, "kernel": (3, 2), "group": 2, "dilations": [1, 2]},
    {"channels": 6, "outputs": 12, "kernel": (3, 3), "group": 6},
    {"channels": 6, "outputs": 6, "kernel": (3, 3), "group": 6},  # depthwise: exact
    {"channels": 16, "outputs": 16, "kernel": (3, 3), "group": 16},
    {"channels": 8, "outputs": 17, "kernel": (1, 1)},
    {"channels": 3, "outputs": 16, "kernel": (3, 3), "auto_pad": "SAME_LOWER", "strides": [2, 2]},
    {"channels": 64, "outputs": 48, "kernel": (3, 3), "pads": [1, 1, 1, 1]},  # every pair
    {"channels": 5, "outputs": 8, "kernel": (3,), "pads": [1, 2]},
    {"channels": 4, "outputs": 6, "kernel": (2, 1, 3), "group": 2},
]


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("zero", [0, 3])
def test_convolutions(case: dict[str, Any], zero: int) -> None:
    attributes = {k: v for k, v in case.items() if k not in ("channels", "outputs", "kernel")}
    x, p = convolution(case, zero)
    node = make_node("QLinearConv", CONV_INPUTS, ["y"], **attributes)
    got = answer(model_of(node, {"x": x}, p), {"x": x})
    assert (got == convolved(x, p, case)).all()


def test_channels_last() -> None:
    case = CONVOLUTIONS[1]
    x, p = convolution(case, 0)
    last = {"x": np.moveaxis(x, 1, -1).copy()}
    flags = {"domain": MICROSOFT, "channels_last": 1, "pads": case["pads"]}
    node = make_node("QLinearConv", CONV_INPUTS, ["y"], strides=case["strides"], **flags)
    assert (
        np.moveaxis(answer(model_of(node, last, p), last), -1, 1) == convolved(x, p, case)
    ).all()


def convolution(case: dict[str, Any], zero: int) -> tuple[Array, dict[str, Array]]:
    """Data and constants; ``zero``: the zero point of the filters."""
    kernel, outputs = case["kernel"], case["outputs"]
    r, space = np.random.default_rng(zero), (7, 9, 4)[: len(kernel)]
    each = case["channels"] // case.get("group", 1)
    constants = {
        "sx": np.array(0.02, np.float32),
        "zx": np.array(130, np.uint8),
        "w": integers((outputs, each, *kernel), np.int8, 1),
        "sw": r.uniform(0.001, 0.01, outputs).astype(np.float32),
        "zw": np.full(outputs, zero, np.int8),
        "sy": np.array(0.01 * math.sqrt(each * math.prod(kernel)), np.float32),
        "zy": np.array(111, np.uint8),
        "b": r.integers(-5000, 5000, outputs).astype(np.int32),
    }
    return integers((2, case["channels"], *space), np.uint8), constants


def convolved(x: Array, p: dict[str, Array], case: dict[str, Any]) -> Array:
    """QLinearConv with its patches in the order of ONNX Runtime: position, then channel."""
    kernel, groups = case["kernel"], case.get("group", 1)
    patches = patches_of(x, int(p["zx"]), kernel, case)  # [n, *space, positions, channels]
    parts = []
    for data, weight in zip(np.split(patches, groups, -1), np.split(p["w"], groups), strict=True):
        left = data.reshape(*data.shape[:-2], -1)
        right = weight.reshape(*weight.shape[:2], -1).transpose(2, 1, 0).reshape(-1, len(weight))
        zeros = p["zx"], p["zw"][0]
        exact = (left - np.int64(zeros[0])) @ (right.astype(np.int64) - zeros[1])
        depthwise = case["channels"] == case["outputs"] == groups
        parts.append(exact.astype(np.int32) if depthwise else saturated(left, right, zeros))
    sums = np.concatenate(parts, -1) + p["b"]
    return np.moveaxis(requantized(sums, p["sx"] * p["sw"] / p["sy"], p["zy"]), -1, 1)


def patches_of(x: Array, zero: int, kernel: Sequence[int], case: dict[str, Any]) -> Array:
    """[n, *space, positions, channels]."""
    rank = len(kernel)
    strides, steps = case.get("strides", [1] * rank), case.get("dilations", [1] * rank)
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, steps, strict=True)]
    sizes = x.shape[2:]
    if "auto_pad" in case:  # SAME_LOWER: the odd one in front
        ends = zip(sizes, strides, spans, strict=True)
        over = [max(0, (-(-size // step) - 1) * step + span - size) for size, step, span in ends]
        pads = [(n - n // 2, n // 2) for n in over]
    else:
        given = case.get("pads", [0] * 2 * rank)
        pads = list(zip(given[:rank], given[rank:], strict=True))
    padded = np.pad(x, [(0, 0), (0, 0), *pads], constant_values=zero)
    found = []
    for place in np.ndindex(*kernel):
        cut = [
            slice(k * d, n - span + k * d + 1, s)
            for k, d, n, span, s in zip(place, steps, padded.shape[2:], spans, strides, strict=True)
        ]
        found.append(np.moveaxis(padded[:, :, *cut], 1, -1))
    return np.stack(found, -2)


def test_depthwise_convolutions_are_untouched() -> None:
    x, p = convolution(CONVOLUTIONS[4], 0)
    node = make_node("QLinearConv", CONV_INPUTS, ["y"], group=6)
    model = model_of(node, {"x": x}, p)
    form = saturating_form(model)
    assert (form.emulated, form.left) == ((), ()) and form.model == model


def test_filters_that_are_data_are_left() -> None:
    x, p = convolution(CONVOLUTIONS[0], 0)
    filters = p.pop("w")
    node = make_node("QLinearConv", CONV_INPUTS, ["y"], "n")
    left = saturating_form(model_of(node, {"x": x, "w": filters}, p)).left
    assert left == (("n", "its filters are not constant"),)
