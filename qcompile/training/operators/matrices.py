"""Matrix multiplications."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.training.operators.site import Function, Operator, Operators, Site, always


def _gemm(site: Site) -> Function:
    alpha, beta = site.attr("alpha", 1.0), site.attr("beta", 1.0)
    turn_a, turn_b = site.attr("transA", 0), site.attr("transB", 0)

    def gemm(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        a, b = a.T if turn_a else a, b.T if turn_b else b
        if c is not None:
            return torch.addmm(c, a, b, beta=beta, alpha=alpha)
        return a @ b if alpha == 1 else alpha * (a @ b)

    return gemm


def _fused_matmul(site: Site) -> Function:
    """com.microsoft.FusedMatMul: ``transBatch`` moves the first axis to the last but one."""
    alpha = site.attr("alpha", 1.0)
    turns = [(site.attr(f"transBatch{x}", 0), site.attr(f"trans{x}", 0)) for x in "AB"]

    def turned(x: Tensor, index: int) -> Tensor:
        batch, inner = turns[index]
        x = x.movedim(0, -2) if batch else x
        return x.transpose(-1, -2) if inner and x.dim() > 1 else x

    def multiply(a: Tensor, b: Tensor) -> Tensor:
        result = turned(a, 0) @ turned(b, 1)
        return result if alpha == 1 else alpha * result

    return multiply


def _einsum(site: Site) -> Function:
    equation = site.attr("equation")
    return lambda *operands: torch.einsum(equation, *operands)


OPERATORS: Operators = {
    "Einsum": Operator(_einsum),
    "Gemm": Operator(_gemm),
    "MatMul": always(torch.matmul),
    "com.microsoft.FusedMatMul": Operator(_fused_matmul),
}
