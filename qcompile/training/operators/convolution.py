"""Convolutions and pooling over windows, and resizing of images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from qcompile.training.operators.site import (
    Function,
    Numbers,
    Operator,
    Operators,
    Site,
    always,
)

_CONV = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}
_CONV_TRANSPOSE = {3: functional.conv_transpose1d, 4: functional.conv_transpose2d,
                   5: functional.conv_transpose3d}  # fmt: skip
_MAX_POOL = {3: functional.max_pool1d, 4: functional.max_pool2d, 5: functional.max_pool3d}
_AVERAGE_POOL = {3: functional.avg_pool1d, 4: functional.avg_pool2d, 5: functional.avg_pool3d}


class _Windows:
    """How windows lie on the spatial axes of a tensor, from the attributes of a node.

    Spatial axes are those after batch and channels; ``pads`` are widths before each of them, then
    widths after each.
    """

    def __init__(self, site: Site, kernel: Sequence[int]) -> None:
        axes = len(kernel)
        self.strides = list(site.attr("strides") or [1] * axes)
        self.dilations = list(site.attr("dilations") or [1] * axes)
        self._pads = list(site.attr("pads") or [0] * 2 * axes)
        self._auto = site.attr("auto_pad", "NOTSET")

    def pads(self, x: Tensor, kernel: Sequence[int]) -> list[int]:
        """Widths for this input; SAME makes as many windows as there are strides."""
        if self._auto == "VALID":
            return [0] * 2 * len(kernel)
        if not self._auto.startswith("SAME"):
            return self._pads
        before, after = [], []
        steps = zip(x.shape[2:], kernel, self.strides, self.dilations, strict=True)
        for size, k, stride, dilation in steps:
            total = max(0, (-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size)
            small, large = total // 2, total - total // 2
            before.append(small if self._auto == "SAME_UPPER" else large)
            after.append(large if self._auto == "SAME_UPPER" else small)
        return before + after


def _is_even(pads: Sequence[int]) -> bool:
    half = len(pads) // 2
    return list(pads[:half]) == list(pads[half:])


def _padded(x: Tensor, pads: Sequence[int], value: float = 0.0) -> Tensor:
    half = len(pads) // 2
    widths = [w for i in reversed(range(half)) for w in (pads[i], pads[half + i])]
    return functional.pad(x, widths, value=value)


def _kernel_of(site: Site) -> list[int]:
    """Sizes of the kernel, of which there are as many as spatial axes."""
    weight = site.node.inputs[1]
    kernel = site.attr("kernel_shape") or (weight.shape or ())[2:]
    if not kernel or not all(isinstance(d, int) for d in kernel):
        raise site.refusal("a kernel of unknown size")
    return list(kernel)


def _conv(site: Site) -> Function:
    kernel = _kernel_of(site)
    windows, groups = _Windows(site, kernel), site.attr("group", 1)
    compute = _CONV.get(len(kernel) + 2)
    if compute is None:
        raise site.refusal(f"a kernel of {len(kernel)} axes")

    def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        pads = windows.pads(x, kernel)
        if not _is_even(pads):
            x, pads = _padded(x, pads), [0] * len(pads)
        half = pads[: len(kernel)]
        return compute(x, weight, bias, windows.strides, half, windows.dilations, groups)

    return conv


def _conv_transpose(site: Site) -> Function:
    kernel = _kernel_of(site)
    windows, groups = _Windows(site, kernel), site.attr("group", 1)
    extra = list(site.attr("output_padding") or [0] * len(kernel))
    pads = list(site.attr("pads") or [0] * 2 * len(kernel))
    compute = _CONV_TRANSPOSE.get(len(kernel) + 2)
    if compute is None or site.attr("output_shape") or not _is_even(pads):
        raise site.refusal("a transposed convolution with output_shape or uneven pads")
    if site.attr("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise site.refusal(f"auto_pad {site.attr('auto_pad')}")

    def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        half = pads[: len(kernel)]
        return compute(x, weight, bias, windows.strides, half, extra, groups, windows.dilations)

    return conv


def _max_pool(site: Site) -> Function:
    kernel, ceil = list(site.attr("kernel_shape")), bool(site.attr("ceil_mode", 0))
    windows, compute = _Windows(site, kernel), _MAX_POOL.get(len(kernel) + 2)
    if compute is None or site.outputs > 1:
        raise site.refusal("pooling that returns indices, or over more than three axes")

    def pool(x: Tensor) -> Tensor:
        pads = windows.pads(x, kernel)
        half = pads[: len(kernel)]
        if not _is_even(pads) or any(2 * p > k for p, k in zip(half, kernel, strict=True)):
            x, half = _padded(x, pads, -torch.inf), [0] * len(kernel)
        return compute(x, kernel, windows.strides, half, windows.dilations, ceil)

    return pool


def _average_pool(site: Site) -> Function:
    """Padding counts as values only where the node says so."""
    kernel, ceil = list(site.attr("kernel_shape")), bool(site.attr("ceil_mode", 0))
    windows, compute = _Windows(site, kernel), _AVERAGE_POOL.get(len(kernel) + 2)
    counts = bool(site.attr("count_include_pad", 0))
    if compute is None or any(d != 1 for d in windows.dilations):
        raise site.refusal("pooling with dilations, or over more than three axes")

    def pool(x: Tensor) -> Tensor:
        pads = windows.pads(x, kernel)
        half = pads[: len(kernel)]
        if _is_even(pads) and all(2 * p <= k for p, k in zip(half, kernel, strict=True)):
            return compute(x, kernel, windows.strides, half, ceil, counts)
        means = compute(_padded(x, pads), kernel, windows.strides, 0, ceil)
        if counts:
            return means
        return means / compute(_padded(torch.ones_like(x), pads), kernel, windows.strides, 0, ceil)

    return pool


def _spatial(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.dim()))


_MODES = {("nearest", 1): "nearest", ("nearest", 2): "nearest", ("nearest", 3): "nearest",
          ("linear", 1): "linear", ("linear", 2): "bilinear", ("linear", 3): "trilinear",
          ("cubic", 2): "bicubic"}  # fmt: skip
_CUBIC = -0.75  # the coefficient of torch and of ONNX's default


def _resize(site: Site) -> Function:
    """The forms that torch's interpolate has, which are those that torch exports."""
    kind, frame = site.attr("mode", "nearest"), site.attr("coordinate_transformation_mode",
                                                          "half_pixel")  # fmt: skip
    if kind == "nearest":
        known = frame == "asymmetric" and site.attr("nearest_mode") == "floor"
    else:
        known = frame in ("half_pixel", "pytorch_half_pixel", "align_corners")
    cubic = kind == "cubic" and site.attr("cubic_coeff_a", _CUBIC) != _CUBIC
    if not known or cubic or site.attr("axes") or site.attr("exclude_outside", 0):
        raise site.refusal(f"mode {kind} with coordinates {frame}")
    corners, smooth = frame == "align_corners", bool(site.attr("antialias", 0))

    def resize(
        x: Tensor, _: Tensor | None = None, scales: Numbers = None, sizes: Numbers = None
    ) -> Tensor:
        mode = _MODES[kind, x.dim() - 2]
        factors = None if sizes else scales[2:]
        return functional.interpolate(
            x,
            sizes[2:] if sizes else None,
            factors,
            mode,
            None if kind == "nearest" else corners,
            antialias=smooth,
        )

    return resize


OPERATORS: Operators = {
    "AveragePool": Operator(_average_pool),
    "Conv": Operator(_conv),
    "ConvTranspose": Operator(_conv_transpose),
    "GlobalAveragePool": always(lambda x: torch.mean(x, _spatial(x), keepdim=True)),
    "GlobalMaxPool": always(lambda x: torch.amax(x, _spatial(x), keepdim=True)),
    "MaxPool": Operator(_max_pool),
    "Resize": Operator(_resize, numbers=(2, 3)),
}
