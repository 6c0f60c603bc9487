"""Instruction sets: what a recipe's isa makes of a target, and what the report says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest

import qcompile
from qcompile.compiler.config.recipe import Recipe
from qcompile.compiler.stages.options import CompileOptions
from qcompile.compiler.stages.result import Result
from qcompile.errors import RecipeError
from qcompile.ir.model_io import write_model
from qcompile.quant import QSpec, qparams, quantize
from qcompile.quant.affine import weight_range
from qcompile.rewriting.registry import targets
from qcompile.rewriting.testing import model_proto, normal
from qcompile.runtime import kernels
from qcompile.runtime.evaluation.closeness import Gates
from qcompile.targets.instruction_sets import TABLE, fitted
from qcompile.targets.target import OpRule, Target
from tests.command_line import run

INNER = 64
PLAIN = Recipe(isa="avx512-vnni")  # all 8 bits


def model() -> onnx.ModelProto:
    """A linear whose first column is large throughout: pairs of it leave int16."""
    weight = normal(INNER, 32)
    weight[:, 0] = 1
    return model_proto(
        f"g (float[N,{INNER}] x) => (float[N,32] y) {{ y = MatMul(x, w) }}", w=weight
    )


def feeds(low: float) -> list[dict[str, np.ndarray]]:
    """Values from low to 1: the nearer low is to 1, the more of them are quantized near 255."""
    rng = np.random.default_rng(0)
    return [{"x": rng.uniform(low, 1, (4, INNER)).astype(np.float32)} for _ in range(8)]


def compiled(recipe: Recipe, verify: bool = True) -> Result:
    options = CompileOptions(bench=False, verify=verify, force=True)
    return qcompile.compile(model(), feeds(0.9), recipe=recipe, gates=Gates(), options=options)


def beside_u8(target: Target) -> list[tuple[OpRule, QSpec]]:
    """Rules of uint8 data, each with what int8 it is multiplied by."""
    rules = [r for r in (*target.rules, target.product) if r is not None]
    return [
        (r, s)
        for r in rules
        for s in (r.weight, r.right)
        if r.activation is not None and r.activation.dtype == "uint8"
        if s is not None and s.dtype == "int8"
    ]


@pytest.mark.parametrize("target", targets().values(), ids=targets())
def test_a_targets_own_integers_fit_every_processor(target: Target) -> None:
    for rule, spec in beside_u8(target):
        assert spec.paired or 255 * 2 * spec.limits[1] < 1 << 15, rule


@pytest.mark.parametrize("target", targets().values(), ids=targets())
@pytest.mark.parametrize("name", TABLE)
def test_all_eight_bits_where_the_recipe_names_a_processor_that_takes_them(
    target: Target, name: str
) -> None:
    made = fitted(target, name)
    if TABLE[name].saturates:
        assert made is target
    for _, spec in beside_u8(made):
        assert (spec.paired or spec.reduced) == TABLE[name].saturates


def test_weight_only_kernels_have_no_sums_to_bound() -> None:
    for target in targets().values():
        assert not any(r.weight.paired for r in target.weight_only if r.weight is not None)


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


@pytest.mark.parametrize("name", ["", "avx2"])
def test_by_default_no_sum_can_saturate(name: str) -> None:
    report = compiled(Recipe(isa=name)).report
    found = report.to_dict()["saturation"]
    assert found["isa"] == (name or "any")
    assert (found["same_without_vnni"], found["linears"], found["can_saturate"]) == (True, 1, 0)
    assert found["advice"] == "" and not any("VNNI" in n for n in report.note_texts)
    assert report.verdict is not None and report.verdict.by_sums == {}


def test_what_can_happen_is_told_without_a_run() -> None:
    found = compiled(PLAIN, verify=False).report.to_dict()["saturation"]
    assert (found["same_without_vnni"], found["rows"][0]["did"]) == (False, None)


def test_where_vnni_is_promised_only_exact_sums_count() -> None:
    report = compiled(PLAIN).report
    found = report.to_dict()["saturation"]
    assert (found["can_saturate"], found["did_saturate"], found["advice"]) == (1, 0, "")
    assert found["rows"][0]["did"] is None
    assert report.verdict is not None
    assert (report.verdict.sums, report.verdict.by_sums) == ("exact", {})
    assert report.verdict.worst_cosine > 0.999


def test_weights_in_a_data_file_are_looked_at_too(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compiled(PLAIN).report.to_dict()["saturation"]
    monkeypatch.setattr(write_model, "PROTOBUF_LIMIT", 1000)
    result = compiled(PLAIN)
    assert result.written.data is not None
    assert result.report.to_dict()["saturation"] == found and found["can_saturate"] == 1


def test_native_is_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "instruction_sets", lambda: ["AVX512F", "AVX2"])
    assert Recipe(isa="native").isa == "avx512"
    assert Recipe(isa="native").digest() == Recipe(isa="avx512").digest()
    assert Recipe(isa="any").isa == "" and Recipe(isa="AVX2").isa == "avx2"
    with pytest.raises(RecipeError, match="isa is 3, expected a name"):
        Recipe(isa=3)  # type: ignore[arg-type]
    monkeypatch.setattr(kernels, "instruction_sets", list)
    with pytest.raises(RecipeError, match="isa native: this machine has none of them, expected"):
        Recipe(isa="native")


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(RecipeError, match="unknown isa 'avx3', did you mean 'avx2'"):
        Recipe(isa="avx3")
    found = run("compile", "m.onnx", "-o", "o.onnx", "--isa", "avx3")
    assert found.exit_code == 2 and "unknown isa 'avx3'" in found.output


@pytest.mark.parametrize("right", ["k", "c"])
def test_operands_that_are_no_result_of_a_node(right: str) -> None:
    """An input of the model is looked at; a constant that is no matrix has a bound."""
    made = model_proto(
        f"""g (float[2,4] x, int8[2,4,2] k) => (int32[2,2,2] y)
        <float s = {{0.01}}, uint8 z = {{0}},
         int8[2,4,2] c = {{127,1,127,1,1,1,1,1,1,1,1,1,1,1,1,1}}>
        {{ a = QuantizeLinear(x, s, z)
          y = MatMulInteger(a, {right}, z) }}"""
    )
    feed = {"x": np.full((2, 4), 2.55, np.float32), "k": np.full((2, 4, 2), 127, np.int8)}
    options = CompileOptions(bench=False, force=True)
    report = qcompile.compile(made, [feed], mode="static", options=options).report
    (row,) = report.to_dict()["saturation"]["rows"]
    assert (row["can"], row["did"]) == ((1, 16) if right == "k" else (1, None))
