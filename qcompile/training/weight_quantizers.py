"""Weights that are trained as floats and read as the integers that will be stored.

A weight is a matrix here: with ``outputs``, the channels that have a scale each, along one axis, as
``spec.axis`` says, and everything else along the other, in the order in which kernels sum it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from qcompile.quant import Array, QParams, QSpec, Rounded, repeated_rows
from qcompile.training.fake_quantizers import Grid, LearnedScale, fake_quantized, integers

# Share of a step that a float weight may be away from its calibrated integer at the start: less
# than half, so that it is rounded to that.
_REMAINDER = 0.45
# With so many significant bits of a scale, its float32 products by multipliers and codes are exact.
_BITS_WITH_MULTIPLIERS = 17


class WeightQuantizer(nn.Module):
    """Gives the values of a quantized weight; the float weight behind it is its own parameter.

    ``latent`` begins as the calibrated integers times their scales, plus what is left to the float
    weight, at most just under half a step: so the first step is the calibrated model, and small
    gradients can move integers that are near to the next one. Scales are learned for each channel,
    multipliers of blocks and factors of rows stay. Integers keep the bounds of ``spec``, also the
    one on pairs: in the forward pass, so that what is emitted is what was trained. Rows of few bits
    that repeat others, which the file has once (``split-outliers``), follow them.
    """

    latent: nn.Parameter
    zero: torch.Tensor
    steps: torch.Tensor | None
    repeated: torch.Tensor

    def __init__(
        self, initial: Rounded, values: Array, spec: QSpec, shape: tuple[int, ...] | None = None
    ) -> None:
        """initial: the calibrated integers. values: float32, the weight in the same shape.

        shape: that of the tensor that the graph reads, None where it is the same
        (``Decision.quantized_view``). Raises ValueError where the two have different shapes, and
        for integers of few bits without their steps.
        """
        super().__init__()
        if spec.width is not None and initial.steps is None:
            raise ValueError("integers of few bits without the steps that codes are multiplied by")
        if initial.values.shape != values.shape:
            raise ValueError(f"integers {initial.values.shape} for a weight {values.shape}")
        self.spec, self.on = spec, True
        self.shape = tuple(values.shape if shape is None else shape)
        self.layout = _Layout.of(tuple(values.shape), spec.axis)
        q, weight = (self.layout.matrix(v) for v in (initial.values, values))
        steps = None if initial.steps is None else self.layout.matrix(initial.steps)
        self._tie(q)
        kept = slice(len(q) - len(self.repeated))
        scale, zero = self._by_output(initial.params)
        self.scale = LearnedScale(scale)
        self.register_buffer("zero", zero)
        self.register_buffer("steps", None if steps is None else torch.from_numpy(steps[kept]))
        size = scale.numpy() if steps is None else scale.numpy() * steps[kept]
        centred = q[kept].astype(np.float32) - zero.numpy()
        near = centred if steps is None else centred / steps[kept]
        left = np.clip(weight[kept].astype(np.float32) / size - near, -_REMAINDER, _REMAINDER)
        self.latent = nn.Parameter(torch.from_numpy((near + left) * size))

    def _tie(self, q: Array) -> None:
        """Find rows that repeat others, where the file has them once."""
        found = np.zeros(0, np.int64)
        if self.spec.width is not None and self.layout.outputs == 1:
            found = repeated_rows(q)
        self.register_buffer("repeated", torch.from_numpy(found))

    def _by_output(self, params: QParams) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zero points as float32 rows or columns."""
        shape = (-1, 1) if self.layout.outputs == 0 else (1, -1)
        scale, zero = (
            torch.from_numpy(np.array(v, np.float32, ndmin=1).reshape(shape))
            for v in (params.scale, params.zero_point)
        )
        same = bool((zero == zero[:1, :1]).all())  # as in every symmetric weight
        return scale, zero[:1, :1].clone() if same else zero

    def learn_scales(self, on: bool) -> None:
        """Whether the scales get gradients."""
        self.scale.change.requires_grad_(on)

    @property
    def grid(self) -> Grid:
        """The integers that values may become: codes where there are few bits."""
        width, pairs = self.spec.width, 1 - self.layout.outputs if self.spec.paired else None
        if width is None:
            return Grid(*self.spec.limits, pairs=pairs)
        half: int = 2 ** (width - 1)
        return Grid(-half, half - 1, self.steps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The quantized weight, in the shape of the graph's; ``x``, the float one, when off."""
        if not self.on:
            return x
        matrix = fake_quantized(self.latent, self.scale(), self.zero, self.grid, self._share)
        return self.layout.restored(self._whole(matrix)).reshape(self.shape)

    @property
    def is_table(self) -> bool:
        """Whether ``rows`` can be used: a matrix with a scale for each row, or one for all."""
        is_matrix = len(self.shape) == 2 and self.shape == self.layout.shape
        has_scales = self.layout.outputs == 0 or self.spec.axis is None
        return is_matrix and has_scales and not len(self.repeated)

    def rows(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """``forward(x)[index]``, without quantizing rows that are not asked for.

        index: int32 or int64 of any shape; negative numbers count from the end. Of a table of
        30,000 tokens, a batch reads a few hundred.
        """
        index = torch.where(index < 0, index + self.shape[0], index)
        if not self.on:
            return functional.embedding(index, x)
        own = index.reshape(-1)
        latent, scale, zero = (
            values if values.shape[0] == 1 else functional.embedding(own, values)
            for values in (self.latent, self.scale(), self.zero)
        )
        grid = replace(self.grid, steps=None if self.steps is None else self.steps[own])
        found = fake_quantized(latent, scale, zero, grid, self._share)
        return found.reshape(*index.shape, -1)

    @property
    def _share(self) -> float:
        """The factor of the scales' gradients (LSQ, as for activations)."""
        each = self.latent.numel() / self.scale.start.numel()
        return float((each * max(1, self.grid.high)) ** -0.5)

    def _whole(self, matrix: torch.Tensor) -> torch.Tensor:
        """With the rows that repeat others."""
        return torch.cat([matrix, matrix[self.repeated]]) if len(self.repeated) else matrix

    def settle(self) -> None:
        """Take the present scales as the start, so that any device computes the same numbers.

        With multipliers of blocks, rounded to what keeps every product of scale, multiplier and
        code exact in float32, in whichever order it is multiplied.
        """
        scale = self.scale().detach()
        if self.steps is not None:
            mantissa, exponent = torch.frexp(scale)
            whole = torch.round(mantissa * 2.0**_BITS_WITH_MULTIPLIERS)
            scale = torch.ldexp(whole, exponent - _BITS_WITH_MULTIPLIERS)
        self.scale.settle(scale)

    def rounded(self) -> Rounded:
        """The integers and scales of the forward pass, in the shape in which they are quantized."""
        own = self.scale().detach()
        found = self._whole(integers(self.latent.detach(), own, self.zero, self.grid))
        values = self.layout.restored(found).cpu().numpy().astype(self.spec.dtype)
        scale = own.cpu().numpy().reshape(-1)
        zero = np.broadcast_to(self.zero.cpu().numpy().reshape(-1), scale.shape)
        if self.spec.axis is None:
            scale, zero = scale[0], zero[0]
        params = QParams(np.asarray(scale), np.asarray(zero).astype(self.spec.dtype), self.spec)
        steps = None
        if self.steps is not None:
            steps = self.layout.restored(self._whole(self.steps)).cpu().numpy()
        return Rounded(np.ascontiguousarray(values), params, steps)

    def values(self) -> Array:
        """The float weight, float32, in the shape of the graph's."""
        found = self.layout.restored(self._whole(self.latent.detach())).reshape(self.shape)
        whole: Array = found.cpu().numpy().copy()
        return whole


@dataclass(frozen=True)
class _Layout:
    """A constant as a matrix whose channels with scales are along the axis ``outputs``.

    ``order``: the constant's axes as the matrix has them. The values of a channel are in the order
    in which they are summed: the input channels of one position of a kernel are neighbours
    (``weight_rounding.summed_first``).
    """

    shape: tuple[int, ...]
    outputs: int
    order: tuple[int, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], axis: int | None) -> _Layout:
        if len(shape) == 2:
            return cls(shape, 1 if axis is None else axis % 2, (0, 1))
        along = 0 if axis is None or not shape else axis % len(shape)
        others = [i for i in range(len(shape)) if i != along]
        return cls(shape, 0, (*(along,) * bool(shape), *others[1:], *others[:1]))

    def matrix(self, values: Array) -> Array:
        """A copy of the values as a matrix."""
        moved = values.transpose(self.order)
        rows = len(moved) if moved.ndim else 1
        return np.array(moved.reshape(rows, -1), order="C")

    def restored(self, matrix: torch.Tensor) -> torch.Tensor:
        """The values in their own shape: the inverse of ``matrix``."""
        moved = matrix.reshape([self.shape[i] for i in self.order])
        return moved.permute([self.order.index(i) for i in range(len(self.shape))])
