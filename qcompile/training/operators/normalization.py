"""Softmax, and normalization by mean and variance."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qcompile.training.operators.site import Function, Operator, Operators, Site, axis_in

_ONE_AXIS = 13  # before this opset, all axes from ``axis`` on were normalized together


class _MaskedSoftmax(torch.autograd.Function):
    """Softmax along an axis, with zero gradients where a whole row is masked by -inf.

    Such a row is NaN. Exported attention replaces it by Where, whose gradient is then 0 there; but
    0 · NaN is NaN again, so the gradient of every row would be lost.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: int) -> Tensor:
        result = torch.softmax(x, axis)
        ctx.save_for_backward(result)
        ctx.axis = axis
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        probabilities = torch.nan_to_num(ctx.saved_tensors[0])
        weighted = probabilities * gradient
        return weighted - probabilities * weighted.sum(ctx.axis, keepdim=True), None


def _softmax(site: Site) -> Function:
    log = site.node.op == "LogSoftmax"
    compute = torch.log_softmax if log else torch.softmax
    if "IsNaN" in site.readers and not log:
        compute = _MaskedSoftmax.apply
    if site.opset >= _ONE_AXIS:
        axis = site.attr("axis", -1)
        return lambda x: compute(x, axis)
    first = site.attr("axis", 1)

    def softmax(x: Tensor) -> Tensor:
        split = axis_in(first, x.dim())
        rows = x.reshape(math.prod(x.shape[:split]), math.prod(x.shape[split:]))
        return compute(rows, -1).reshape(x.shape)

    return softmax


def _layer_norm(site: Site) -> Function:
    axis, epsilon, outputs = site.attr("axis", -1), site.attr("epsilon", 1e-5), site.outputs

    def layer_norm(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Any:
        shape = x.shape[axis:]
        if scale.shape == shape and (bias is None or bias.shape == shape):
            result = functional.layer_norm(x, shape, scale, bias, epsilon)
        else:
            result = functional.layer_norm(x, shape, None, None, epsilon) * scale
            result = result if bias is None else result + bias
        if outputs < 2:
            return result
        axes = tuple(range(axis_in(axis, x.dim()), x.dim()))
        variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
        return result, mean, torch.rsqrt(variance + epsilon)

    return layer_norm


def _rms_norm(site: Site) -> Function:
    axis, epsilon = site.attr("axis", -1), site.attr("epsilon", 1e-5)
    if site.outputs > 1:
        raise site.refusal("its second result")

    def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
        axes = tuple(range(axis_in(axis, x.dim()), x.dim()))
        return x * torch.rsqrt(x.square().mean(axes, keepdim=True) + epsilon) * scale

    return rms_norm


def _skip_layer_norm(site: Site) -> Function:
    """com.microsoft.SkipLayerNormalization: of the sum of operands, which is the fourth result."""
    epsilon = site.attr("epsilon", 1e-5)
    if any(t.name for t in site.node.outputs[1:3]):
        raise site.refusal("mean or deviation as a result")

    def skip_layer_norm(
        x: Tensor,
        skip: Tensor,
        scale: Tensor,
        shift: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        total = x + skip if bias is None else x + skip + bias
        result = functional.layer_norm(total, total.shape[-1:], scale, shift, epsilon)
        return result, None, None, total

    return skip_layer_norm


def _skip_rms_norm(site: Site) -> Function:
    """com.microsoft.SkipSimplifiedLayerNormalization: as above, with the mean square alone."""
    epsilon = site.attr("epsilon", 1e-5)
    if any(t.name for t in site.node.outputs[1:3]):
        raise site.refusal("mean or deviation as a result")

    def skip_rms_norm(
        x: Tensor, skip: Tensor, scale: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        total = x + skip if bias is None else x + skip + bias
        mean = total.square().mean(-1, keepdim=True)
        return total * torch.rsqrt(mean + epsilon) * scale, None, None, total

    return skip_rms_norm


def _batch_norm(site: Site) -> Function:
    """With the statistics of the model: they are not trained."""
    epsilon = site.attr("epsilon", 1e-5)
    if site.attr("training_mode", 0):
        raise site.refusal("batch normalization in training mode")

    def batch_norm(
        x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
    ) -> Tensor:
        factor = scale * torch.rsqrt(variance + epsilon)
        shape = [-1] + [1] * (x.dim() - 2)
        return x * factor.reshape(shape) + (bias - mean * factor).reshape(shape)

    return batch_norm


def _instance_norm(site: Site) -> Function:
    epsilon = site.attr("epsilon", 1e-5)
    return lambda x, scale, bias: functional.instance_norm(x, weight=scale, bias=bias, eps=epsilon)


def _group_norm(site: Site) -> Function:
    """Scale and bias are per group below opset 21, per channel since."""
    groups, epsilon = site.attr("num_groups"), site.attr("epsilon", 1e-5)
    per_group = site.opset < 21

    def group_norm(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        if per_group:
            scale, bias = (t.repeat_interleave(x.shape[1] // groups) for t in (scale, bias))
        return functional.group_norm(x, groups, scale, bias, epsilon)

    return group_norm


def _lp_normalization(site: Site) -> Function:
    axis, order = site.attr("axis", -1), site.attr("p", 2)

    def normalize(x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, order, axis, keepdim=True)
        return torch.where(norm == 0, torch.zeros_like(x), x / norm)

    return normalize


OPERATORS: Operators = {
    "BatchNormalization": Operator(_batch_norm),
    "GroupNormalization": Operator(_group_norm),
    "InstanceNormalization": Operator(_instance_norm),
    "LayerNormalization": Operator(_layer_norm),
    "LogSoftmax": Operator(_softmax),
    "LpNormalization": Operator(_lp_normalization),
    "RMSNormalization": Operator(_rms_norm),
    "SimplifiedLayerNormalization": Operator(_rms_norm),
    "Softmax": Operator(_softmax),
    "com.microsoft.SkipLayerNormalization": Operator(_skip_layer_norm),
    "com.microsoft.SkipSimplifiedLayerNormalization": Operator(_skip_rms_norm),
}
