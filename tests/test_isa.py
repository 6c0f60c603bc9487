"""Instruction sets: what a recipe's isa makes of a target, and what the report says."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest

import qcompile
from qcompile import machine, writing
from qcompile.compare import Gates
from qcompile.errors import RecipeError
from qcompile.isa import TABLE, fitted
from qcompile.job import Options, Result
from qcompile.qtypes import QSpec, qparams, quantize, weight_range
from qcompile.recipe import Recipe
from qcompile.registry import targets
from qcompile.target import Target
from qcompile.testing import normal

INNER = 64


def model() -> onnx.ModelProto:
    """A linear whose first column is large throughout: pairs of it leave int16."""
    made = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[N,{INNER}] x) => (float[N,32] y) {{ y = MatMul(x, w) }}"""
    )
    weight = normal(INNER, 32)
    weight[:, 0] = 1
    made.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    return made


def feeds(low: float) -> list[dict[str, np.ndarray]]:
    """Values from low to 1: the nearer low is to 1, the more of them are quantized near 255."""
    rng = np.random.default_rng(0)
    return [{"x": rng.uniform(low, 1, (4, INNER)).astype(np.float32)} for _ in range(8)]


def compiled(recipe: Recipe, held_back: float = 1.0, verify: bool = True) -> Result:
    """``held_back``: by what the feed that is not calibrated with is multiplied."""
    given = feeds(0.9)
    given[1] = {"x": given[1]["x"] * np.float32(held_back)}
    options = Options(bench=not verify, verify=verify, bench_rounds=1, force=True)
    return qcompile.compile(model(), given, recipe=recipe, gates=Gates(), options=options)


@pytest.mark.parametrize("target", targets().values(), ids=targets())
@pytest.mark.parametrize("name", TABLE)
def test_weights_beside_u8_fit_the_instruction_set(target: Target, name: str) -> None:
    made = fitted(target, name)
    if not TABLE[name].saturates:
        assert made == target
    pairs = [
        (r.activation, s)
        for r in (*made.rules, *filter(None, [made.product]))
        for s in (r.weight, r.right)
    ]
    for activation, spec in pairs:
        if (
            activation is None
            or spec is None
            or (activation.dtype, spec.dtype) != ("uint8", "int8")
        ):
            continue
        fits = 255 * 2 * spec.limits[1] < 1 << 15
        assert fits == TABLE[name].saturates


def test_no_name_leaves_the_target() -> None:
    target = targets()["cpu"]
    assert fitted(target, "") is target


def test_seven_bits_reach_from_64_to_64() -> None:
    spec = QSpec("int8", symmetric=True, granularity="channel", axis=1, narrow=True, reduced=True)
    weight = normal(8, 3)
    found = quantize(weight, qparams(weight_range(weight, spec), spec))
    assert (np.abs(found).max(0) == 64).all()
    assert str(spec) == "int8:sym:channel[1]:7-bit"
    with pytest.raises(ValueError, match="reduced range is for int8"):
        replace(spec, dtype="int16")


def test_the_report_says_where_answers_differ() -> None:
    report = compiled(Recipe()).report
    found = report.saturation
    assert (found["isa"], found["same_without_vnni"]) == ("any", False)
    assert (found["linears"], found["can_saturate"], found["did_saturate"]) == (1, 1, 1)
    assert any("answers differ on x86 without VNNI" in n and "isa: avx2" in n for n in report.notes)
    assert json.loads(report.to_json())["saturation"]["rows"][0]["did"] > 0


def test_small_values_may_saturate_but_did_not() -> None:
    report = compiled(Recipe(), held_back=0.1).report
    found = report.saturation
    assert (found["can_saturate"], found["did_saturate"]) == (1, 0)
    assert not any("VNNI" in n for n in report.notes)


def test_what_can_happen_is_told_without_a_run() -> None:
    found = compiled(Recipe(), verify=False).report.saturation
    assert (found["same_without_vnni"], found["rows"][0]["did"]) == (False, None)


def test_weights_in_a_data_file_are_looked_at_too(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compiled(Recipe()).report.saturation
    monkeypatch.setattr(writing, "LIMIT", 1000)
    result = compiled(Recipe())
    assert result.written.data is not None
    assert result.report.saturation == found


def test_with_seven_bits_answers_are_the_same() -> None:
    result = compiled(Recipe(isa="avx2"))
    assert result.report.saturation["same_without_vnni"]
    assert not any("VNNI" in n for n in result.report.notes)
    weights = [
        onnx.numpy_helper.to_array(t)
        for t in onnx.ModelProto.FromString(result.model).graph.initializer
        if t.data_type == onnx.TensorProto.INT8
    ]
    assert max(int(np.abs(w.astype(int)).max()) for w in weights) == 64


def test_where_vnni_is_promised_nothing_is_run() -> None:
    found = compiled(Recipe(isa="avx512-vnni")).report.saturation
    assert (found["can_saturate"], found["did_saturate"]) == (1, 0)
    assert found["rows"][0]["did"] is None


def test_a_machine_that_saturates_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "instruction_sets", lambda: ["AVX512F", "AVX2"])
    assert machine.saturates()
    assert any("this machine is one" in n for n in compiled(Recipe()).report.notes)
    for others in (["AVX512-VNNI", "AVX2"], ["AMX-INT8", "AVX2"], ["I8MM"], []):
        monkeypatch.setattr(machine, "instruction_sets", lambda o=others: o)
        assert not machine.saturates()


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(RecipeError, match="unknown isa 'avx3', did you mean 'avx2'"):
        Recipe(isa="avx3")


@pytest.mark.parametrize("right", ["k", "c"])
def test_operands_that_are_no_result_of_a_node(right: str) -> None:
    """An input of the model is looked at; a constant that is no matrix has a bound."""
    made = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[2,4] x, int8[2,4,2] k) => (int32[2,2,2] y)
        <float s = {{0.01}}, uint8 z = {{0}},
         int8[2,4,2] c = {{127,1,127,1,1,1,1,1,1,1,1,1,1,1,1,1}}>
        {{ a = QuantizeLinear(x, s, z)
          y = MatMulInteger(a, {right}, z) }}"""
    )
    feed = {"x": np.full((2, 4), 2.55, np.float32), "k": np.full((2, 4, 2), 127, np.int8)}
    report = qcompile.compile(made, [feed], mode="static", options=Options(bench=False)).report
    (row,) = report.saturation["rows"]
    assert (row["can"], row["did"]) == ((1, 16) if right == "k" else (1, None))
