"""Which operators take float16: by a provider's kernels, or by the definitions of ONNX.

A runtime that supports the standard operators in float16, such as TensorRT in strongly typed
networks, takes float16 where the operator's definition does in the opset of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Protocol

from qcompile.ir import Node, domain_of
from qcompile.targets.definitions import definition

_NAMES = {"f16": "tensor(float16)"}


class TypeTable(Protocol):
    """Says which types the inputs of operators take. ``missing``: ends a message where none do."""

    @property
    def missing(self) -> str:
        """Such as "has no float16 kernel"."""

    def takes(self, node: Node, opset: int, index: int, kind: str) -> bool:
        """True where an operator, in an opset of its domain, takes a type as an input."""


@dataclass(frozen=True)
class DefinedTypes:
    """The types that the operators of ONNX take by their definitions."""

    missing: str = "takes no float16 in this opset"

    def takes(self, node: Node, opset: int, index: int, kind: str) -> bool:
        """True where the definition allows the type (f16); False for operators outside ONNX."""
        return _NAMES[kind] in _allowed(node.op, domain_of(node), opset, index)


@cache
def _allowed(op: str, domain: str, opset: int, index: int) -> frozenset[str]:
    """The types of an input; variadic inputs repeat the last. Empty for unknown operators."""
    schema = definition(op, domain, opset)
    if schema is None or not schema.inputs:
        return frozenset()
    kind = schema.inputs[min(index, len(schema.inputs) - 1)].type_str
    variables = {t.type_param_str: t.allowed_type_strs for t in schema.type_constraints}
    return frozenset(variables.get(kind, [kind]))
