"""Operators that look values up, scatter or sort them."""

from __future__ import annotations

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


def _counted(indices: Tensor, size: int) -> Tensor:
    """Negative indices count from the end."""
    return torch.where(indices < 0, indices + size, indices)


def _gather(site: Site) -> Function:
    axis, known = site.attr("axis", 0), site.constant(1)
    if known is not None and known.ndim == 0:
        place = int(known)
        return lambda x, _: x.select(axis, place)
    counts = known is None or bool((known < 0).any())

    def gather(x: Tensor, indices: Tensor) -> Tensor:
        along = axis_in(axis, x.dim())
        if counts:
            indices = _counted(indices, x.shape[along])
        if x.dim() == 2 and along == 0 and x.is_floating_point():
            return functional.embedding(indices, x)  # with the fastest gradient
        rows = x.index_select(along, indices.reshape(-1))
        return rows.reshape(*x.shape[:along], *indices.shape, *x.shape[along + 1 :])

    return gather


def _gather_elements(site: Site) -> Function:
    axis = site.attr("axis", 0)

    def gather(x: Tensor, indices: Tensor) -> Tensor:
        return torch.gather(x, axis, _counted(indices, x.shape[axis]).to(torch.int64))

    return gather


def _gather_nd(site: Site) -> Function:
    """Leading ``batch_dims`` axes of both are paired; the last axis of indices is a coordinate."""
    paired = site.attr("batch_dims", 0)

    def gather(x: Tensor, indices: Tensor) -> Tensor:
        return x[(*_paired(x, indices, paired), *_coordinates(x, indices, paired))]

    return gather


def _paired(x: Tensor, indices: Tensor, count: int) -> list[Tensor]:
    """Indices of the paired axes, which broadcast against those of ``_coordinates``."""
    rank = indices.dim() - 1
    return [
        torch.arange(x.shape[i], device=x.device).reshape(
            [-1 if j == i else 1 for j in range(rank)]
        )
        for i in range(count)
    ]


def _coordinates(x: Tensor, indices: Tensor, first: int = 0) -> list[Tensor]:
    parts = indices.to(torch.int64).unbind(-1)
    return [_counted(part, x.shape[first + i]) for i, part in enumerate(parts)]


_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _scatter_nd(site: Site) -> Function:
    kind = site.attr("reduction", "none")
    if kind not in ("none", "add"):
        raise site.refusal(f"reduction {kind!r}")

    def scatter(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        return x.index_put(tuple(_coordinates(x, indices)), updates, accumulate=kind == "add")

    return scatter


def _scatter_elements(site: Site) -> Function:
    axis, kind = site.attr("axis", 0), site.attr("reduction", "none")

    def scatter(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        places = _counted(indices, x.shape[axis]).to(torch.int64)
        if kind == "none":
            return x.scatter(axis, places, updates)
        return x.scatter_reduce(axis, places, updates, _REDUCTIONS[kind])

    return scatter


def _top_k(site: Site) -> Function:
    """Of equal values the first comes first, as ONNX says; torch.topk promises no order."""
    axis, largest, given = site.attr("axis", -1), bool(site.attr("largest", 1)), site.attr("k")

    def top_k(x: Tensor, count: Numbers = given) -> tuple[Tensor, Tensor]:
        (size,) = in_order(count)
        values, places = torch.sort(x, dim=axis, descending=largest, stable=True)
        return values.narrow(axis, 0, size), places.narrow(axis, 0, size)

    return top_k


def _arg(site: Site) -> Function:
    """ArgMax or ArgMin: the first of equal values, or the last one where asked for."""
    find = torch.argmax if site.node.op == "ArgMax" else torch.argmin
    axis, keeps, last = (
        site.attr("axis", 0),
        bool(site.attr("keepdims", 1)),
        site.attr("select_last_index", 0),
    )

    def arg(x: Tensor) -> Tensor:
        if last:
            return x.shape[axis] - 1 - find(x.flip(axis), axis, keepdim=keeps)
        return find(x, axis, keepdim=keeps)

    return arg


def _cumulative_sum(site: Site) -> Function:
    exclusive, backwards = site.attr("exclusive", 0), site.attr("reverse", 0)

    def cumulative_sum(x: Tensor, axis: Numbers) -> Tensor:
        (along,) = in_order(axis)
        x = x.flip(along) if backwards else x
        sums = torch.cumsum(x, along, dtype=x.dtype)
        sums = sums - x if exclusive else sums
        return sums.flip(along) if backwards else sums

    return cumulative_sum


OPERATORS: Operators = {
    "ArgMax": Operator(_arg),
    "ArgMin": Operator(_arg),
    "CumSum": Operator(_cumulative_sum, numbers=(1,)),
    "Gather": Operator(_gather),
    "GatherElements": Operator(_gather_elements),
    "GatherND": Operator(_gather_nd),
    "NonZero": always(lambda x: torch.nonzero(x).T),
    "ScatterElements": Operator(_scatter_elements),
    "ScatterND": Operator(_scatter_nd),
    "TopK": Operator(_top_k, numbers=(1,)),
}
