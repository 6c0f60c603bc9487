"""Quantization in the forward pass, with gradients for values, scale and zero point.

    x'  =  (clamp(x / s, low - z, high - z) rounded) · s

Bit-equal to ONNX QuantizeLinear and DequantizeLinear: division first, half to even, saturation. The
bounds are integers, so that clamping before rounding gives what saturating after it does. Gradients
are those of LSQ (Esser et al. 2020, equation 3, and equation 2 for the values) and of LSQ+
(Bhalgat et al. 2020, equations 4 and 5, with their offset β = -z · s):

    ∂x'/∂x  =  1 inside of the bounds, 0 outside
    ∂x'/∂s  =  round(x / s) - x / s inside, the bound outside
    ∂x'/∂z  =  0 inside, -s outside

One function computes each in a few passes over pieces that fit into the cache: written as
elementwise operators of torch, it would take longer than the layer that it quantizes. The backward
pass computes again what it needs, so that only the values themselves are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from qcompile.quant import PAIR_SUM, QParams, QSpec, Range, qparams

_PIECE = 1 << 17  # values that a CPU's cache holds with all temporaries
# Scales stay normal float32 numbers: ``qparams`` replaces others.
_SMALLEST_SCALE = 2.0**-126


@dataclass(frozen=True)
class Grid:
    """The integers that a matrix may become.

    low, high: smallest and largest, zero point included. steps: int8 in the shape of the matrix, by
    which the integers are multiplied; None for ones. pairs: along this axis, rows 2i and 2i + 1 of
    one sign add up to at most ``PAIR_SUM``; None for no such bound.
    """

    low: int
    high: int
    steps: torch.Tensor | None = None
    pairs: int | None = None

    def rows(self, rows: slice) -> torch.Tensor | None:
        """The steps of some rows as float32."""
        return None if self.steps is None else self.steps[rows].to(torch.float32)


def fake_quantized(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    grid: Grid,
    share: float = 1.0,
) -> torch.Tensor:
    """A float32 matrix (rows, columns) as the values that its integers stand for.

    scale, zero: float32 of shape (1, 1), (1, columns) or (rows, 1); zero points are whole numbers.
    share: factor of the gradients of scale and zero point.
    """
    result: torch.Tensor = _FakeQuantize.apply(x, scale, zero, grid, share)
    return result


def integers(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The integers of ``fake_quantized``, float32 (rows, columns), zero point included."""
    found = torch.empty_like(x)
    for rows in _pieces(x, grid):
        piece = _Piece.of(x, scale, zero, grid, rows)
        whole = piece.rounded(found[rows]).add_(piece.zero)
        if piece.steps is not None:
            whole.mul_(piece.steps)
    return found


@dataclass
class _Piece:
    """Some rows of a matrix. ``step``: what a value is divided by to find its integer."""

    values: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    step: torch.Tensor
    steps: torch.Tensor | None
    grid: Grid

    @classmethod
    def of(
        cls,
        x: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
        grid: Grid,
        rows: slice,
    ) -> _Piece:
        scale, zero = (t if t.shape[0] == 1 else t[rows] for t in (scale, zero))
        steps = grid.rows(rows)
        step = scale if steps is None else scale * steps
        return cls(x[rows], scale, zero, step, steps, grid)

    def rounded(self, out: torch.Tensor) -> torch.Tensor:
        """The integers without their zero point, computed in ``out``."""
        torch.div(self.values, self.step, out=out)
        return self._whole(self._clamped(out, out))

    def _clamped(self, position: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        # As a number, one zero point for all takes half as long; on other devices it would wait.
        zero = self.zero.item() if self.zero.is_cpu and self.zero.numel() == 1 else self.zero
        return torch.clamp(position, self.grid.low - zero, self.grid.high - zero, out=out)

    def _whole(self, clamped: torch.Tensor) -> torch.Tensor:
        """Rounds in place."""
        clamped.round_()
        return clamped if self.grid.pairs is None else _bounded(clamped, self.grid.pairs)

    def slopes(self, *, of_scale: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Derivatives of the result by each value, and by the scale if that is asked for."""
        position = self.values / self.step
        clamped = self._clamped(position, torch.empty_like(position))
        inside = torch.eq(clamped, position, out=torch.empty_like(position))
        if self.grid.pairs is not None:
            nearest = clamped.round()
            inside.mul_(nearest.eq_(self._whole(clamped)))
        elif of_scale:
            self._whole(clamped)
        if not of_scale:
            return inside, None
        slope = clamped.addcmul_(position, inside, value=-1)
        return inside, slope if self.steps is None else slope.mul_(self.steps)


def _pieces(x: torch.Tensor, grid: Grid) -> Iterator[slice]:
    """Rows that are computed together; on a device other than the CPU, all."""
    rows = max(2, _PIECE // max(1, x.shape[1]) // 2 * 2) if x.is_cpu else max(1, len(x))
    return (slice(start, start + rows) for start in range(0, len(x), rows))


def _bounded(whole: torch.Tensor, axis: int) -> torch.Tensor:
    """Integers whose pairs keep the bound: what two of one sign exceed it by is taken from both.

    That is the nearest such pair; of an odd excess, the first of both loses one more.
    """
    even = whole.shape[axis] // 2 * 2
    paired = whole.narrow(axis, 0, even).unflatten(axis, (-1, 2))
    first, second = paired.unbind(axis + 1)
    excess = torch.clamp(torch.abs(first + second) - PAIR_SUM, min=0)
    excess *= first * second > 0
    half = torch.floor(excess / 2)
    sign = torch.sign(first)
    first -= sign * (excess - half)
    second -= sign * half
    return whole


class _FakeQuantize(torch.autograd.Function):
    """See the module's docstring for the formulas."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
        grid: Grid,
        share: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, scale, zero)
        ctx.grid, ctx.share = grid, share
        result = torch.empty_like(x)
        for rows in _pieces(x, grid):
            piece = _Piece.of(x, scale, zero, grid, rows)
            whole = piece.rounded(result[rows])
            if piece.steps is not None:
                whole.mul_(piece.steps)
            whole.mul_(piece.scale)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x, scale, zero), (grad, *_) = ctx.saved_tensors, gradients
        of_x, wanted = torch.empty_like(x), ctx.needs_input_grad[1:3]
        of_scale, of_zero = (
            torch.zeros_like(t) if need else None
            for t, need in zip((scale, zero), wanted, strict=True)
        )
        for rows in _pieces(x, ctx.grid):
            part = grad[rows]
            inside, slope = _Piece.of(x, scale, zero, ctx.grid, rows).slopes(of_scale=wanted[0])
            torch.mul(part, inside, out=of_x[rows])
            if of_scale is not None and slope is not None:
                _add(of_scale, slope.mul_(part), rows)
            if of_zero is not None:
                _add(of_zero, torch.sub(of_x[rows], part, out=inside), rows)
        if of_scale is not None:
            of_scale.mul_(ctx.share)
        if of_zero is not None:
            of_zero.mul_(scale * ctx.share)
        return of_x, of_scale, of_zero, None, None


def _add(total: torch.Tensor, values: torch.Tensor, rows: slice) -> None:
    """Add the sums of some rows to a total of shape (1, 1), (1, columns) or (rows, 1)."""
    into = total if total.shape[0] == 1 else total[rows]
    into += values.sum_to_size(into.shape)


class LearnedScale(nn.Module):
    """Scales that start at given values exactly, and are learned in the logarithmic domain.

    A scale is ``start · exp(change)``; ``change`` begins at 0, and 0.01 of it is one per cent for
    any scale, so one learning rate fits all.
    """

    start: torch.Tensor

    def __init__(self, start: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("start", start)
        self.change = nn.Parameter(torch.zeros_like(start))

    def forward(self) -> torch.Tensor:
        return (self.start * torch.exp(self.change)).clamp_min(_SMALLEST_SCALE)

    def settle(self, scale: torch.Tensor | None = None) -> None:
        """Start at the present scales, or at others, so that every device computes these."""
        with torch.no_grad():
            self.start.copy_(self() if scale is None else scale)
            self.change.zero_()


class ActivationQuantizer(nn.Module):
    """Quantizes a tensor with a range that is learned, per tensor or per group of channels.

    Channels with the same calibrated scale and zero point are a group and stay one
    (``group-scales``). The zero point is learned as a share of the quantized range, so that the
    rate of the scales fits it too, and rounded with a straight-through gradient. It is a whole
    number within the type at every step, so what is learned can be written as it is.
    Gradients are scaled as LSQ does it, by 1 / √(features · largest integer) (Esser et al. 2020,
    section 2.2). Adam does not notice, but clipping by the norm of all gradients does.
    """

    first_zero: torch.Tensor
    group_of: torch.Tensor

    def __init__(self, span: Range, spec: QSpec, fixed: str = "") -> None:
        """span: the calibrated range. fixed: why it is not learned, empty where it is.

        Raises ValueError where the range is per channel and ``spec`` is not.
        """
        super().__init__()
        if (span.axis is None) != (spec.axis is None):
            raise ValueError(f"range along axis {span.axis} for {spec}")
        self.spec, self.fixed, self.on = spec, fixed, True
        self.grid = Grid(*spec.limits)
        scales, zeros, groups = _groups(qparams(span, spec))
        self.scale = LearnedScale(torch.from_numpy(scales))
        self.register_buffer("first_zero", torch.from_numpy(zeros))
        self.register_buffer("group_of", torch.from_numpy(groups))
        self.shift = nn.Parameter(torch.zeros_like(self.first_zero))
        self.learn(True)

    def learn(self, on: bool) -> None:
        """Whether the range gets gradients."""
        self.scale.change.requires_grad_(on and not self.fixed)
        self.shift.requires_grad_(on and not self.fixed and not self.spec.symmetric)

    def zero(self) -> torch.Tensor:
        """Zero point of each group, whole numbers."""
        low, high = self.spec.limits
        found = torch.clamp(self.first_zero + (high - low) * self.shift, low, high)
        return found + (found.round() - found).detach()  # the sum is exact

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.on:
            return x
        axis = self.spec.axis
        moved = x if axis is None else x.movedim(axis, -1)
        width = moved.shape[-1] if moved.ndim else 1
        matrix = moved.reshape(-1, width).contiguous()
        scale, zero = (t.index_select(0, self.group_of)[None] for t in (self.scale(), self.zero()))
        features = width / len(self.first_zero)
        share = (max(1.0, features) * max(1, self.spec.limits[1])) ** -0.5
        found = fake_quantized(matrix, scale, zero, self.grid, share).reshape(moved.shape)
        return found if axis is None else found.movedim(-1, axis)

    def settle(self) -> None:
        """Take the present range as the start, so that any device computes the same numbers."""
        with torch.no_grad():
            self.first_zero.copy_(self.zero())
            self.shift.zero_()
        self.scale.settle()

    def range(self) -> Range:
        """The range of which ``qparams`` makes exactly the present scales and zero points.

        Their float64 products have 40 bits at most, so nothing is rounded on the way back.
        """
        with torch.no_grad():
            scale = self.scale()[self.group_of].cpu().numpy().astype(np.float64)
            zero = self.zero()[self.group_of].cpu().numpy().astype(np.float64)
        low, high = self.spec.limits
        lo, hi = (low - zero) * scale, (high - zero) * scale
        if self.spec.symmetric:
            lo = -hi
        if self.spec.axis is None:
            return Range(lo[0], hi[0])
        return Range(lo, hi, self.spec.axis)


def _groups(params: QParams) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct scales and zero points, float32 (groups,) each, and the group of each channel."""
    scale, zero = np.atleast_1d(params.scale), np.atleast_1d(params.zero_point)
    both = np.stack([scale.astype(np.float64), zero.astype(np.float64)], axis=1)
    distinct, group_of = np.unique(both, axis=0, return_inverse=True)
    scales, zeros = (np.ascontiguousarray(c).astype(np.float32) for c in distinct.T)
    return scales, zeros, group_of.reshape(-1)
