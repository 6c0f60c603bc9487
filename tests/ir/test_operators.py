"""Families name operators that exist; domains have one spelling."""

from __future__ import annotations

from types import SimpleNamespace

import onnx
import pytest
from onnx.helper import make_node

from qcompile.ir import domain_of, is_layout, is_onnx_domain, is_op, op_name, operators

FAMILIES = sorted(
    name for name, value in vars(operators).items() if name.isupper() and isinstance(value, tuple)
)
# ONNX Runtime has it in ONNX's domain.
BESIDES = {"SimplifiedLayerNormalization"}


def unheard(ops: tuple[str, ...]) -> list[str]:
    """Names that neither ONNX has nor, with its domain, ONNX Runtime."""
    known = {s.name for s in onnx.defs.get_all_schemas() if not s.domain} | BESIDES
    runtime = pytest.importorskip("onnxruntime.capi.onnxruntime_pybind11_state")
    if hasattr(runtime, "get_all_operator_schema"):
        schemas = runtime.get_all_operator_schema()
        known |= {f"{s.domain}.{s.name}" if s.domain else s.name for s in schemas}
    return [op for op in ops if op not in known]


@pytest.mark.parametrize("family", FAMILIES)
def test_operators_of_a_family_exist_and_come_once(family: str) -> None:
    ops = getattr(operators, family)
    assert unheard(ops) == []
    assert len(set(ops)) == len(ops)


def test_an_operator_that_is_none_is_seen() -> None:
    assert unheard(("Relu", "Relo", "com.microsoft.Relu")) == ["Relo", "com.microsoft.Relu"]


@pytest.mark.parametrize("domain", ["", "ai.onnx"])
def test_onnx_has_two_spellings(domain: str) -> None:
    node = make_node("Reshape", [], [], domain=domain)
    assert (domain_of(node), op_name(node)) == ("", "Reshape")
    assert is_onnx_domain(node) and is_op(node, "Reshape") and is_layout(node)


def test_other_domains_stand_before_the_name() -> None:
    for node in (
        make_node("Gelu", [], [], domain="com.microsoft"),
        SimpleNamespace(op="Gelu", domain="com.microsoft"),
    ):
        assert (domain_of(node), op_name(node)) == ("com.microsoft", "com.microsoft.Gelu")
        assert not is_onnx_domain(node) and not is_op(node, "Gelu")
    assert op_name(SimpleNamespace(op="Gelu", domain=None)) == "Gelu"
