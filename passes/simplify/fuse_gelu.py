"""Recognizes GELU decomposed into elementary operators with Erf or Tanh.

    0.5 · x · (1 + Erf(x / √2))                          →   Gelu(x)
    0.5 · x · (1 + Tanh(√(2/π) · (x + 0.044715 · x³)))   →   Gelu(x) {approximate="tanh"}

The three factors may be multiplied in any order. Which operator is emitted is the target's choice
(ONNX Gelu-20, com.microsoft.Gelu or FastGelu). Refuses where a factor is missing, an inner tensor
is used elsewhere, or the target has no GELU at this opset. Source: ONNX Gelu-20.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from qcompile.ir import ONNX, Graph, Node, Refusal, Tensor, is_op, scalar
from qcompile.planning import Context
from qcompile.rewriting import NodeRewrite, Numerics, Stage

# Exporters write these constants in float32, some rounded to 4 digits (0.7979 for √(2/π)).
_TOLERANCE = 1e-3
_CUBIC = 0.044715


@dataclass(frozen=True)
class _Match:
    """``result`` is the GELU of ``x``; ``operator``: domain, name and opset of what is emitted."""

    x: Tensor
    result: Tensor
    operator: tuple[str, str, int]
    attrs: dict[str, str]


@dataclass(frozen=True)
class FuseGelu(NodeRewrite[_Match]):
    """Fuse decomposed GELU, exact or by tanh."""

    name: ClassVar[str] = "fuse-gelu"
    stage: ClassVar[Stage] = Stage.SIMPLIFY
    numerics: ClassVar[Numerics] = Numerics.ROUNDING
    after: ClassVar[tuple[str, ...]] = ("raise-opset",)
    ops: ClassVar[tuple[str, ...]] = ("Erf", "Tanh")

    def match(self, graph: Graph, ctx: Context, node: Node) -> _Match | Refusal | None:
        tanh = is_op(node, "Tanh")
        x = _tanh_argument(graph, node) if tanh else _erf_argument(graph, node)
        if x is None:  # a Tanh elsewhere needs no explanation
            reason = "no Gelu: the argument of Erf is not x / sqrt(2)"
            return None if tanh else Refusal(reason)
        result = _product(graph, node, x)
        if result is None:
            return Refusal(
                "no Gelu: not multiplied by 0.5 and x, or an inner tensor is used elsewhere"
            )
        operators = ctx.target.tanh_gelu if tanh else ctx.target.gelu
        operator = next((o for o in operators if o[0] != ONNX or graph.opset >= o[2]), None)
        if operator is None:
            return Refusal(f"target {ctx.target.name!r} has no Gelu at opset {graph.opset}")
        attrs = {"approximate": "tanh"} if tanh and operator[0] == ONNX else {}
        return _Match(x, result, operator, attrs)

    def rewrite(self, graph: Graph, ctx: Context, match: _Match) -> None:
        domain, op, _ = match.operator
        graph.substitute(match.result, op, [match.x], "gelu", match.attrs, domain=domain)


def _product(graph: Graph, node: Node, x: Tensor) -> Tensor | None:
    """The tensor ``0.5 · x · (1 + f)``, where ``f`` is the output of ``node``."""
    add = graph.only_consumer(node.outputs[0], "Add")
    if add is None or _constant_operand(add) != 1.0:
        return None
    missing_half, missing_x = True, True
    current = add.outputs[0]
    while missing_half or missing_x:
        mul = graph.only_consumer(current, "Mul", "Div")
        if mul is None:
            return None
        other = _other(mul, current)
        if other is None:
            return None
        if missing_x and other is x and is_op(mul, "Mul"):
            missing_x = False
        elif missing_half and _is_half(mul, other):
            missing_half = False
        elif missing_x and missing_half and _is_half_x(graph, other, x):
            missing_x = missing_half = False
        else:
            return None
        current = mul.outputs[0]
    return current


def _other(node: Node, tensor: Tensor) -> Tensor | None:
    """The operand that is not ``tensor``; None for a division that has ``tensor`` as divisor."""
    if is_op(node, "Div") and node.inputs[0] is not tensor:
        return None
    return next((t for t in node.inputs if t is not tensor), None)


def _is_half(node: Node, other: Tensor) -> bool:
    return scalar(other) == (2.0 if is_op(node, "Div") else 0.5)


def _is_half_x(graph: Graph, tensor: Tensor, x: Tensor) -> bool:
    node = graph.producer(tensor, "Mul", "Div")
    if node is None or not any(t is x for t in node.inputs):
        return False
    other = _other(node, x)
    return other is not None and _is_half(node, other)


def _constant_operand(node: Node) -> float | None:
    return next((s for t in node.inputs if (s := scalar(t)) is not None), None)


def _near(value: float | None, expected: float) -> bool:
    return value is not None and math.isclose(value, expected, rel_tol=_TOLERANCE)


def _erf_argument(graph: Graph, node: Node) -> Tensor | None:
    """x of ``Erf(x / √2)``."""
    inner = graph.producer(node.inputs[0], "Div", "Mul")
    if inner is None:
        return None
    expected = math.sqrt(2) if is_op(inner, "Div") else math.sqrt(0.5)
    if is_op(inner, "Div") and scalar(inner.inputs[0]) is not None:
        return None
    return _variable_operand(inner) if _near(_constant_operand(inner), expected) else None


def _variable_operand(node: Node) -> Tensor | None:
    return next((t for t in node.inputs if scalar(t) is None), None)


def _tanh_argument(graph: Graph, node: Node) -> Tensor | None:
    """x of ``Tanh(√(2/π) · (x + 0.044715 · x³))``."""
    outer = graph.producer(node.inputs[0], "Mul")
    if outer is None:
        return None
    inner = _variable_operand(outer)
    add = graph.producer(inner, "Add") if inner is not None else None
    if not _near(_constant_operand(outer), math.sqrt(2 / math.pi)) or add is None:
        return None
    for x, cubic in (add.inputs, reversed(add.inputs)):
        if _is_cubic(graph, cubic, x):
            return x
    return None


def _is_cubic(graph: Graph, tensor: Tensor, x: Tensor) -> bool:
    """True for ``0.044715 · x³``, its factors in any order and grouping."""
    factors = _factors(graph, tensor, x)
    constants = [s for t in factors if (s := scalar(t)) is not None]
    powers = len([t for t in factors if t is x])
    product = math.prod(constants)
    return powers == 3 and len(factors) == 3 + len(constants) and _near(product, _CUBIC)


def _factors(graph: Graph, tensor: Tensor, x: Tensor, depth: int = 4) -> list[Tensor]:
    """The factors that ``tensor`` is the product of, back to ``x``; x³ counts as three."""
    node = graph.producer(tensor)
    if tensor is x or node is None or depth == 0:
        return [tensor]
    if is_op(node, "Pow") and scalar(node.inputs[1]) == 3.0:
        return _factors(graph, node.inputs[0], x, depth - 1) * 3
    if is_op(node, "Mul"):
        return [f for t in node.inputs for f in _factors(graph, t, x, depth - 1)]
    return [tensor]
