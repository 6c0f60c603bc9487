"""Operators that compute value by value, with numpy's broadcasting: arithmetic and comparisons."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from qcompile.training.operators.site import (
    Function,
    Numbers,
    Operator,
    Operators,
    Site,
    always,
    in_order,
    torch_type,
)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """Integers are divided as in C: the fraction is cut off."""
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _modulo(site: Site) -> Function:
    function: Function = torch.fmod if site.attr("fmod", 0) else torch.remainder
    return function


def _power(site: Site) -> Function:
    """The result has the type of the base. torch is much faster with a number as exponent."""
    exponent = site.scalar(1)
    if exponent is not None:
        return lambda x, _: torch.pow(x, exponent).to(x.dtype)
    return lambda x, y: torch.pow(x, y).to(x.dtype)


def _clip(site: Site) -> Function:
    """Limits are attributes below opset 11."""
    low, high = site.attr("min"), site.attr("max")

    def clip(x: Tensor, lo: Numbers = low, hi: Numbers = high) -> Tensor:
        limits = [None if v is None else in_order(v)[0] for v in (lo, hi)]
        return x if limits == [None, None] else torch.clamp(x, *limits)

    return clip


def _cast(site: Site) -> Function:
    kind = torch_type(site, site.attr("to"))
    return lambda x: x.to(kind)


def _is_infinite(site: Site) -> Function:
    signs = site.attr("detect_negative", 1), site.attr("detect_positive", 1)
    tests: dict[tuple[int, int], Function] = {
        (1, 1): torch.isinf,
        (1, 0): torch.isneginf,
        (0, 1): torch.isposinf,
    }
    return tests.get(signs, lambda x: torch.zeros_like(x, dtype=torch.bool))


def _shift(site: Site) -> Function:
    left = site.attr("direction") == "LEFT"
    function: Function = torch.bitwise_left_shift if left else torch.bitwise_right_shift
    return function


def _folded(function: Function) -> Operator:
    """An operator on any number of operands."""
    return always(lambda *operands: reduce(function, operands))


def _mean(*operands: Tensor) -> Any:
    return sum(operands[1:], operands[0]) / len(operands)


_FUNCTIONS = {
    "Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "Add": torch.add,
    "And": torch.logical_and, "Asin": torch.asin, "Asinh": torch.asinh, "Atan": torch.atan,
    "Atanh": torch.atanh, "BitwiseAnd": torch.bitwise_and, "BitwiseNot": torch.bitwise_not,
    "BitwiseOr": torch.bitwise_or, "BitwiseXor": torch.bitwise_xor, "Ceil": torch.ceil,
    "Cos": torch.cos, "Cosh": torch.cosh, "Div": _divide, "Equal": torch.eq, "Exp": torch.exp,
    "Floor": torch.floor, "Greater": torch.gt, "GreaterOrEqual": torch.ge, "IsNaN": torch.isnan,
    "Less": torch.lt, "LessOrEqual": torch.le, "Log": torch.log, "Mean": _mean, "Mul": torch.mul,
    "Neg": torch.neg, "Not": torch.logical_not, "Or": torch.logical_or,
    "Reciprocal": torch.reciprocal, "Round": torch.round, "Sign": torch.sign, "Sin": torch.sin,
    "Sinh": torch.sinh, "Sqrt": torch.sqrt, "Sub": torch.sub, "Tan": torch.tan,
    "Where": torch.where, "Xor": torch.logical_xor,
}  # fmt: skip

OPERATORS: Operators = {
    **{name: always(function) for name, function in _FUNCTIONS.items()},
    "BitShift": Operator(_shift),
    "Cast": Operator(_cast),
    "CastLike": always(lambda x, like: x.to(like.dtype)),
    "Clip": Operator(_clip, numbers=(1, 2)),
    "IsInf": Operator(_is_infinite),
    "Max": _folded(torch.maximum),
    "Min": _folded(torch.minimum),
    "Mod": Operator(_modulo),
    "Pow": Operator(_power),
    "Sum": _folded(torch.add),
}
