"""Operators that move or repeat values without computing: Reshape, Transpose, Slice, Pad, …"""

from __future__ import annotations

import math
from typing import Any

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
    axis_in,
    in_order,
)


def _reshape(site: Site) -> Function:
    """0 keeps a dimension, unless ``allowzero`` says that it is a size."""
    keeps = not site.attr("allowzero", 0)

    def reshape(x: Tensor, sizes: Numbers) -> Tensor:
        if keeps and 0 in sizes:
            sizes = [d or x.shape[i] for i, d in enumerate(sizes)]
        return x.reshape(sizes)

    return reshape


def _flatten(site: Site) -> Function:
    axis = site.attr("axis", 1)

    def flatten(x: Tensor) -> Tensor:
        split = axis_in(axis, x.dim())
        return x.reshape(math.prod(x.shape[:split]), math.prod(x.shape[split:]))

    return flatten


def _transpose(site: Site) -> Function:
    order = site.attr("perm")
    return lambda x: x.permute(order or tuple(reversed(range(x.dim()))))


def _squeeze(site: Site) -> Function:
    """Axes are an attribute below opset 13."""
    given = site.attr("axes")

    def squeeze(x: Tensor, axes: Numbers = given) -> Tensor:
        return x.squeeze() if axes is None else x.squeeze(tuple(in_order(axes)))

    return squeeze


def _unsqueeze(site: Site) -> Function:
    """Axes are an attribute below opset 13."""
    given = site.attr("axes")

    def unsqueeze(x: Tensor, axes: Numbers = given) -> Tensor:
        axes = in_order(axes)
        rank = x.dim() + len(axes)
        for axis in sorted(axis_in(a, rank) for a in axes):
            x = x.unsqueeze(axis)
        return x

    return unsqueeze


def _concat(site: Site) -> Function:
    axis = site.attr("axis")
    return lambda *parts: torch.cat(parts, axis)


def _split(site: Site) -> Function:
    """Sizes are an attribute below opset 13; without any, the last part may be smaller."""
    axis, given, count = site.attr("axis", 0), site.attr("split"), len(site.node.outputs)

    def split(x: Tensor, sizes: Numbers = given) -> tuple[Tensor, ...]:
        if sizes is None:
            return tuple(torch.split(x, -(-x.shape[axis] // count), axis))
        return tuple(torch.split(x, list(sizes), axis))

    return split


def _slice(site: Site) -> Function:
    """Bounds are attributes below opset 10."""
    given = site.attr("starts"), site.attr("ends"), site.attr("axes")

    def cut(
        x: Tensor,
        starts: Numbers = given[0],
        ends: Numbers = given[1],
        axes: Numbers = given[2],
        steps: Numbers = None,
    ) -> Tensor:
        axes = range(len(starts)) if axes is None else axes
        steps = [1] * len(starts) if steps is None else steps
        for axis, *bounds in zip(axes, starts, ends, steps, strict=True):
            x = _cut(x, axis, slice(*bounds))
        return x

    return cut


def _cut(x: Tensor, axis: int, part: slice) -> Tensor:
    start, end, step = part.indices(x.shape[axis])
    if step == 1:
        return x.narrow(axis, start, max(0, end - start))
    return x.index_select(axis, torch.arange(start, end, step, device=x.device)) if (
        (end - start) * step > 0
    ) else x.narrow(axis, 0, 0)  # fmt: skip


def _expand(x: Tensor, sizes: Numbers) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, tuple(sizes)))


def _pad(site: Site) -> Function:
    """Pads and value are attributes below opset 11. Negative pads cut."""
    mode, old_pads, old_value = site.attr("mode", "constant"), site.attr("pads"), site.attr("value")

    def pad(
        x: Tensor, pads: Numbers = old_pads, value: Numbers = old_value, axes: Numbers = None
    ) -> Tensor:
        axes = list(range(x.dim())) if axes is None else [axis_in(a, x.dim()) for a in axes]
        ends = dict(zip(axes, zip(pads[: len(axes)], pads[len(axes) :], strict=True), strict=True))
        if mode == "constant":
            widths = [w for axis in reversed(range(x.dim())) for w in ends.get(axis, (0, 0))]
            return functional.pad(x, widths, value=0 if value is None else in_order(value)[0])
        for axis, (before, after) in ends.items():
            x = x.index_select(axis, _mirrored(x.shape[axis], before, after, mode).to(x.device))
        return x

    return pad


def _mirrored(size: int, before: int, after: int, mode: str) -> Tensor:
    """The positions that a padded axis repeats, for the modes edge, reflect and wrap."""
    places = torch.arange(-before, size + after)
    if mode == "edge":
        return places.clamp(0, size - 1)
    if mode == "wrap":
        return places.remainder(size)
    period = max(1, 2 * (size - 1))
    places = places.remainder(period)
    return torch.minimum(places, period - places) if size > 1 else torch.zeros_like(places)


def _trilu(site: Site) -> Function:
    keep = torch.triu if site.attr("upper", 1) else torch.tril

    def trilu(x: Tensor, diagonal: Numbers = 0) -> Tensor:
        return keep(x, in_order(diagonal)[0])

    return trilu


def _depth_to_space(site: Site) -> Function:
    size, by_columns = site.attr("blocksize"), site.attr("mode", "DCR") == "CRD"

    def depth_to_space(x: Tensor) -> Tensor:
        batch, depth, height, width = x.shape
        depth //= size * size
        if by_columns:
            x = x.reshape(batch, depth, size, size, height, width).permute(0, 1, 4, 2, 5, 3)
        else:
            x = x.reshape(batch, size, size, depth, height, width).permute(0, 3, 4, 1, 5, 2)
        return x.reshape(batch, depth, height * size, width * size)

    return depth_to_space


def _space_to_depth(site: Site) -> Function:
    size = site.attr("blocksize")

    def space_to_depth(x: Tensor) -> Tensor:
        batch, depth, height, width = x.shape
        x = x.reshape(batch, depth, height // size, size, width // size, size)
        return x.permute(0, 3, 5, 1, 2, 4).reshape(
            batch, depth * size * size, height // size, width // size
        )

    return space_to_depth


def _dropout(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """As in inference: the identity."""
    return x, torch.ones_like(x, dtype=torch.bool)


OPERATORS: Operators = {
    "Concat": Operator(_concat),
    "DepthToSpace": Operator(_depth_to_space),
    "Dropout": always(_dropout),
    "Expand": Operator(lambda _: _expand, numbers=(1,)),
    "Flatten": Operator(_flatten),
    "Identity": always(lambda x: x),
    "Pad": Operator(_pad, numbers=(1, 2, 3)),
    "Reshape": Operator(_reshape, numbers=(1,)),
    "Slice": Operator(_slice, numbers=(1, 2, 3, 4)),
    "SpaceToDepth": Operator(_space_to_depth),
    "Split": Operator(_split, numbers=(1,)),
    "Squeeze": Operator(_squeeze, numbers=(1,)),
    "Tile": Operator(lambda _: lambda x, repeats: x.repeat(repeats), numbers=(1,)),
    "Transpose": Operator(_transpose),
    "Trilu": Operator(_trilu, numbers=(1,)),
    "Unsqueeze": Operator(_unsqueeze, numbers=(1,)),
}
