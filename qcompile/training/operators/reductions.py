"""Reductions over axes, which are an attribute or an input: ReduceMean, ReduceSum, …"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qcompile.training.operators.site import (
    Function,
    Numbers,
    Operator,
    Operators,
    Site,
    axis_in,
    in_order,
)

Axes = tuple[int, ...]
Reduce = Callable[[Tensor, Axes, bool], Tensor]


def _sum(x: Tensor, axes: Axes, keeps: bool) -> Tensor:
    return torch.sum(x, axes, keepdim=keeps, dtype=x.dtype)


def _mean(x: Tensor, axes: Axes, keeps: bool) -> Tensor:
    if x.is_floating_point():
        return torch.mean(x, axes, keepdim=keeps)
    total = _sum(x, axes, keeps)
    return torch.div(total, x.numel() // max(1, total.numel()), rounding_mode="trunc")


def _product(x: Tensor, axes: Axes, keeps: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = torch.prod(x, axis, keepdim=keeps, dtype=x.dtype)
    return x


def _length(x: Tensor, axes: Axes, keeps: bool) -> Tensor:
    """The gradient of the length of a zero vector is 0, not NaN."""
    return torch.linalg.vector_norm(x, 2, axes, keepdim=keeps)


def _reduction(reduce: Reduce) -> Operator:
    def make(site: Site) -> Function:
        keeps, given = bool(site.attr("keepdims", 1)), site.attr("axes")
        skips = bool(site.attr("noop_with_empty_axes", 0))

        def run(x: Tensor, axes: Numbers = given) -> Tensor:
            chosen = tuple(axis_in(a, x.dim()) for a in in_order(axes or []))
            if not chosen and skips:
                return reduce(x.unsqueeze(-1), (-1,), False)  # of each value alone
            return reduce(x, chosen or tuple(range(x.dim())), keeps)

        return run

    return Operator(make, numbers=(1,))


OPERATORS: Operators = {
    "ReduceL1": _reduction(lambda x, axes, keeps: _sum(x.abs(), axes, keeps)),
    "ReduceL2": _reduction(_length),
    "ReduceLogSum": _reduction(lambda x, axes, keeps: _sum(x, axes, keeps).log()),
    "ReduceLogSumExp": _reduction(lambda x, axes, keeps: torch.logsumexp(x, axes, keeps)),
    "ReduceMax": _reduction(lambda x, axes, keeps: torch.amax(x, axes, keeps)),
    "ReduceMean": _reduction(_mean),
    "ReduceMin": _reduction(lambda x, axes, keeps: torch.amin(x, axes, keeps)),
    "ReduceProd": _reduction(_product),
    "ReduceSum": _reduction(_sum),
    "ReduceSumSquare": _reduction(lambda x, axes, keeps: _sum(x.square(), axes, keeps)),
}
