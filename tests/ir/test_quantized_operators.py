"""The table of quantized operators agrees with the schemas of ONNX and of ONNX Runtime."""

from __future__ import annotations

from dataclasses import replace

import onnx
import pytest
from onnx.helper import make_node

from qcompile.ir.operators import MICROSOFT
from qcompile.ir.quantized_operators import (
    QUANTIZED,
    Operand,
    QuantizedOperator,
    byte_products,
    input_name,
    quantized_operator,
)

# Scales of QMoE's float8 formats, which hold no integers.
_OF_FLOAT8 = ("_global_", "_act_")


def inputs_of(op: str) -> list[str]:
    """Names of an operator's inputs in its newest schema."""
    domain, _, name = op.rpartition(".")
    if not domain:
        return [i.name for i in onnx.defs.get_schema(name).inputs]
    runtime = pytest.importorskip("onnxruntime.capi.onnxruntime_pybind11_state")
    if not hasattr(runtime, "get_all_operator_schema"):
        pytest.skip("this ONNX Runtime does not show its schemas")
    found = [s for s in runtime.get_all_operator_schema() if (s.domain, s.name) == (domain, name)]
    return [i.name for i in max(found, key=lambda s: s.since_version).inputs]


def stem(name: str, *endings: str) -> str:
    """``x_zero_points`` and ``X_scale`` without what they are: ``x``."""
    for ending in endings:
        name = name.casefold().removesuffix("s").removesuffix(ending)
    return name.rstrip("_")


def faults(row: QuantizedOperator, names: list[str]) -> list[str]:
    """Where a row says something else than the names of the inputs."""
    if row.repeats:
        names = [*names, "scale", "zero_point"]  # in ONNX one variadic input
    every = (*row.operands, row.result)
    parts = {
        "scale": [o.scale for o in every if o.scale is not None],
        "zero_point": [o.zero_point for o in every if o.zero_point is not None],
    }
    values = [o.value for o in row.operands if o.value is not None]
    beyond = [s for s in (*values, *parts["scale"], *parts["zero_point"]) if s >= len(names)]
    if beyond:
        return [f"no inputs {beyond}"]
    found = [] if values == sorted(values) else ["operands are out of order"]
    for what, slots in parts.items():
        named = {i for i, n in enumerate(names) if is_named(n, what)}
        found += [f"{names[i]} is no {what}" for i in set(slots) - named]
        found += [f"{names[i]} is missing" for i in named - set(slots)]
    for slot in values:
        if any(is_named(names[slot], what) for what in parts):
            found.append(f"{names[slot]} holds no values")
    for operand in every:
        known = [names[s] for s in (operand.scale, operand.zero_point) if s is not None]
        stems = {stem(n, "scale", "zero_point", "absmax") for n in known}
        if operand.value is not None and row.kind != "quantizer":
            value = names[operand.value].casefold()
            stems = {s for s in stems if not value.startswith(s)}
            found += [f"{value} has parameters of {s}" for s in stems]
        elif len(stems) > 1:
            found.append(f"{known} are not of one tensor")
    if row.bias is not None and names[row.bias] not in ("B", "C"):
        found.append(f"{names[row.bias]} is no bias")
    return found


def is_named(name: str, what: str) -> bool:
    if any(part in name for part in _OF_FLOAT8):
        return False
    return what in name or (what == "scale" and name == "absmax")


@pytest.mark.parametrize("op", QUANTIZED)
def test_rows_agree_with_the_schemas(op: str) -> None:
    assert faults(QUANTIZED[op], inputs_of(op)) == []


CONV = QUANTIZED["QLinearConv"]
MATMUL = QUANTIZED["MatMulInteger"]


@pytest.mark.parametrize(
    ("op", "row", "said"),
    [
        ("QLinearConv", replace(CONV, operands=CONV.operands[::-1]), ["operands are out of order"]),
        ("QLinearConv", replace(CONV, operands=CONV.operands[:1]), ["w_scale is missing"]),
        ("QLinearConv", replace(CONV, result=Operand(None, 7, 6)), ["y_zero_point is no scale"]),
        ("QLinearConv", replace(CONV, result=Operand(None, 6, 9)), ["no inputs [9]"]),
        ("QLinearConv", replace(CONV, bias=3), ["w is no bias"]),
        (
            "QLinearConv",
            replace(CONV, operands=(Operand(0, 4, 2), Operand(3, 1, 5))),
            ["x has parameters of w", "w has parameters of x"],
        ),
        (
            "MatMulInteger",
            replace(MATMUL, operands=(Operand(0, None, 3), Operand(1, None, 2))),
            ["a has parameters of b", "b has parameters of a"],
        ),
        ("MatMulInteger", replace(MATMUL, operands=(Operand(2),)), ["a_zero_point is missing"]),
    ],
)
def test_a_wrong_row_is_seen(op: str, row: QuantizedOperator, said: list[str]) -> None:
    assert set(said) <= set(faults(row, inputs_of(op)))


def test_inputs_are_named_by_what_they_are() -> None:
    node = make_node("QGemm", ["a", "as", "az", "b", "bs", "", "c", "ys"], ["y"], domain=MICROSOFT)
    row = QUANTIZED["com.microsoft.QGemm"]
    assert quantized_operator(node) is row
    assert [o.names(node) for o in row.operands] == [("a", "as", "az"), ("b", "bs", "")]
    assert row.parameters(node) == {"as", "az", "bs", "c", "ys"}
    assert input_name(node, None) == input_name(node, 8) == ""


def test_domains_are_told_apart() -> None:
    for domain in ("", "ai.onnx"):
        node = make_node("QLinearMatMul", list("abcdefgh"), ["y"], domain=domain)
        assert quantized_operator(node) is QUANTIZED["QLinearMatMul"]
    assert quantized_operator(make_node("QLinearMatMul", [], [], domain="own")) is None
    assert quantized_operator(make_node("QGemm", [], [])) is None


def test_operands_that_repeat() -> None:
    names = ["ys", "yz", "a", "as", "az", "b", "bs", "bz"]
    node = make_node("QLinearConcat", names, ["y"], domain=MICROSOFT)
    row = QUANTIZED["com.microsoft.QLinearConcat"]
    found = [o.names(node) for o in row.operands_of(node)]
    assert found == [("a", "as", "az"), ("b", "bs", "bz")]
    assert row.parameters(node) == {"ys", "yz", "as", "az", "bs", "bz"}


@pytest.mark.parametrize(
    ("op", "products"),
    [
        ("com.microsoft.DynamicQuantizeLSTM", [(0, 1), (0, 2)]),
        ("com.microsoft.QGemm", [(0, 3)]),
        ("ConvInteger", [(1, 0)]),
        ("com.microsoft.MatMulNBits", []),
        ("com.microsoft.QLinearAdd", []),
        ("MatMul", []),
    ],
)
def test_products_of_bytes(op: str, products: list[tuple[int, int]]) -> None:
    domain, _, name = op.rpartition(".")
    found = byte_products(make_node(name, [], [], domain=domain))
    assert [(a.value, b.value) for a, b in found] == products
