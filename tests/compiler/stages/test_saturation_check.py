"""Models whose sums may saturate are judged by exact sums and as x86 without VNNI computes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import qcompile
from qcompile import Gates, Options
from qcompile.commands.cli import main
from qcompile.compiler.config.recipe import Recipe
from qcompile.compiler.stages import saturation_check
from qcompile.compiler.stages.result import RejectedError
from qcompile.errors import ModelError
from qcompile.ir.model_io.to_proto import serialize
from qcompile.rewriting.testing import encoder, normal
from qcompile.runtime import session as runtime
from qcompile.runtime.evaluation.int16_saturation import saturated_product
from qcompile.runtime.evaluation.saturating_form import SaturatingForm
from qcompile.runtime.session import Session, SessionOptions
from tests.targets.test_instruction_sets import PLAIN, compiled, feeds, model

OPTION = 'add_session_config_entry("session.x64quantprecision", "1")'
LOOSE = Gates(min_cosine=None, min_worst_cosine=None, min_r2=None, max_latency_ratio=None)


def plain() -> bytes:
    """The linear of test_isa with all 8 bits: it saturates on its feeds."""
    return compiled(PLAIN).model


def again(gates: Gates = LOOSE, recipe: Recipe | None = None) -> Any:
    """A model that came in quantized, with another linear behind."""
    made = onnx.ModelProto.FromString(plain())
    made.graph.output[0].name = "z"
    made.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 4
    made.graph.node.add(op_type="MatMul", input=["y", "v"], output=["z"])
    made.graph.initializer.append(onnx.numpy_helper.from_array(normal(32, 4), "v"))
    options = Options(bench=False)
    return qcompile.compile(made, feeds(0.9), recipe=recipe, gates=gates, options=options).report


def test_both_results_are_reported_and_the_worse_counts() -> None:
    report = again()
    found = report.verdict
    assert found is not None and found.sums == "saturating"
    assert set(found.by_sums) == {"exact", "saturating"}
    exact, saturating = (found.by_sums[k].worst_cosine for k in ("exact", "saturating"))
    assert exact > 0.9999 > 0.998 > saturating == found.worst_cosine
    said = report.to_dict()["verify"]
    assert said["sums"] == "saturating" and said["by_sums"]["exact"]["sums"] == "exact"
    expected = {"session.x64quantprecision": "1"} if runtime.saturates() else {}
    assert said["by_sums"]["exact"]["session_options"] == expected
    assert said["by_sums"]["saturating"]["session_options"] == {}


def test_the_advice_names_both_figures_and_the_remedy() -> None:
    report = again()
    advice = report.to_dict()["saturation"]["advice"]
    assert advice in report.note_texts
    assert advice.startswith("outputs may differ on x86 without VNNI: 1 of 2 int8 operators have")
    there = report.verdict.by_sums["saturating"].worst_cosine
    assert (
        f"worst cosine {there:.4f} there" in advice and OPTION in advice and "--isa avx2" in advice
    )


def test_a_gate_that_saturating_sums_miss_fails_everywhere() -> None:
    with pytest.raises(RejectedError, match="on x86 without VNNI: output 'z': mean cosine"):
        again(Gates(min_cosine=0.999))
    assert again(Gates(min_cosine=0.999), PLAIN).failures == []


@pytest.mark.parametrize("name", ["avx2", "avx512-vnni"])
def test_a_recipe_that_names_processors_is_judged_by_those(name: str) -> None:
    found = again(recipe=Recipe(isa=name)).verdict
    assert found.by_sums == {}
    assert found.sums == ("saturating" if name == "avx2" else "exact")


def test_the_emulation_is_the_saturated_product() -> None:
    """Float steps around one product of integers, which numpy repeats to the last bit."""
    made = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (uint8[M,64] a) => (int32[M,5] y) { y = MatMulInteger(a, w) }"""
    )
    weight = np.random.default_rng(0).integers(-127, 128, (64, 5)).astype(np.int8)
    made.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    feed = {"a": np.random.default_rng(1).integers(128, 256, (7, 64)).astype(np.uint8)}
    exact, saturating = (
        saturation_check.IntegerSums(made).runner(kind, SessionOptions(threads=1)).run(feed)["y"]
        for kind in ("exact", "saturating")
    )
    np.testing.assert_array_equal(exact, feed["a"].astype(int) @ weight)
    np.testing.assert_array_equal(saturating, saturated_product(feed["a"], weight))
    assert (exact != saturating).any()


def test_a_model_that_cannot_be_emulated_is_judged_by_exact_sums(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise ModelError("no room")

    monkeypatch.setattr(runtime, "saturates", lambda: False)
    monkeypatch.setattr(saturation_check, "saturating_form", fail)
    for recipe in (Recipe(), Recipe(isa="avx2")):
        report = again(recipe=recipe)
        assert report.verdict.sums == "exact"
        assert report.to_dict()["verify"]["not_emulated"][0]["node"] == "the model"
        assert any(
            n.startswith("the result of the model on x86 without") for n in report.note_texts
        )


def test_verify_shows_a_row_for_both(tmp_path: Path) -> None:
    files = {"a.onnx": model().SerializeToString(), "b.onnx": plain()}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    np.savez(tmp_path / "x.npz", x=np.concatenate([f["x"] for f in feeds(0.9)]))
    common = ["verify", *(str(tmp_path / n) for n in files), "--data", str(tmp_path / "x.npz")]
    found = CliRunner().invoke(main, common)
    assert found.exit_code == 1  # the default gates hold for all processors
    assert "y, exact sums" in found.output and "y, x86 without VNNI" in found.output
    assert OPTION in found.output and "on x86 without VNNI: output 'y'" in found.output
    found = CliRunner().invoke(main, [*common, "--isa", "avx512-vnni"])
    assert found.exit_code == 0 and "VNNI" not in found.output


def test_the_line_about_processors_comes_first(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(plain())
    np.savez(tmp_path / "x.npz", x=np.concatenate([f["x"] for f in feeds(0.9)]))
    given = ["compile", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "o.onnx"), "--no-bench"]
    found = CliRunner().invoke(main, [*given, "--data", str(tmp_path / "x.npz"), "--force"])
    assert found.stdout.startswith("processors: outputs may differ on x86 without VNNI")
    assert found.stdout.count("outputs may differ") == 1


@pytest.mark.parametrize("target", ["cpu", "qdq"])
@pytest.mark.parametrize("attention", ["scores", "all"])
def test_an_encoder_compiled_by_default_is_the_same_everywhere(target: str, attention: str) -> None:
    """By bound, and seen: what x86 without VNNI computes, there or emulated, is bit-equal."""
    rng = np.random.default_rng(0)
    data = [
        {"ids": rng.integers(0, 64, (2, 6)), "attention_mask": np.ones((2, 6), np.int64)}
        for _ in range(8)
    ]
    recipe = Recipe(target=target, attention=attention)  # type: ignore[arg-type]
    result = qcompile.compile(
        serialize(encoder(2, width=16)),
        data,
        recipe=recipe,
        gates=LOOSE,
        options=Options(bench=False),
    )
    assert result.report.to_dict()["saturation"]["same_without_vnni"]
    options = SessionOptions(threads=1)
    runs = [
        saturation_check.IntegerSums(result.model).runner(kind, options).run(data[0])["out"]
        for kind in ("exact", "saturating")
    ]
    shifted = Session(result.model, SessionOptions(threads=1, exact=False)).run(data[0])["out"]
    np.testing.assert_array_equal(shifted, runs[1])
    np.testing.assert_array_equal(runs[0], runs[1])


def test_data_that_can_be_read_once_is_enough_for_both() -> None:
    """A generator: it is kept where the candidate has to run twice."""
    gates = Gates(min_cosine=None, min_worst_cosine=None, min_r2=None)
    once = (feed for feed in feeds(0.9))
    found = qcompile.verify(model(), plain(), once, gates=gates)
    again = qcompile.verify(model(), plain(), feeds(0.9), gates=gates)
    assert set(found.by_sums) == {"exact", "saturating"} and found.samples == again.samples
    for kind, verdict in found.by_sums.items():
        assert verdict.worst_cosine == again.by_sums[kind].worst_cosine


def test_operators_that_cannot_be_emulated_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        saturation_check, "saturating_form", lambda *_: SaturatingForm(model(), (), (("n", "why"),))
    )
    monkeypatch.setattr(runtime, "saturates", lambda: False)
    session = saturation_check.IntegerSums(model()).runner("saturating", SessionOptions(threads=1))
    assert session.left == (("n", "why"),)


def linear_behind(body: str, weight: str = "int8[64,4] w") -> onnx.ModelProto:
    """Data through a quantizer to a product with a weight whose pairs leave int16."""
    made = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
        g (float[N,64] x) => (float[N,4] y) <float s = {{0.01}}, uint8 z = {{0}}, int8 o = {{0}}>
        {{ q = QuantizeLinear(x, s, z) {body} }}"""
    )
    values = np.full((64, 4), 127, np.int8)
    if weight.startswith("int8[4"):
        values = values.T.copy()
    made.graph.initializer.append(onnx.numpy_helper.from_array(values, "w"))
    return made


DATA = "d = DequantizeLinear(q, s, z)"


@pytest.mark.parametrize(
    ("body", "weight"),
    [
        (f"{DATA} v = DequantizeLinear(w, s, o) y = MatMul(d, v)", "int8[64,4]"),
        (f"{DATA} v = DequantizeLinear(w, s, o) t = Transpose(v) y = MatMul(d, t)", "int8[4,64]"),
        (f"{DATA} v = DequantizeLinear(w, s, o) t = Identity(v) y = MatMul(d, t)", "int8[64,4]"),
        ("i = MatMulInteger(q, w, z) y = Cast<to = 1>(i)", "int8[64,4]"),
        ("y = com.microsoft.DynamicQuantizeMatMul(x, w, s)", "int8[64,4]"),
    ],
)
def test_products_are_found_as_the_runtime_fuses_them(body: str, weight: str) -> None:
    assert not saturation_check.IntegerSums(linear_behind(body, weight)).same


def in_a_body() -> onnx.ModelProto:
    made = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (uint8[2,64] a, bool c) => (int32[2,4] y)
        { y = If (c) <
            then_branch = t () => (int32[2,4] u) { u = MatMulInteger(a, w) },
            else_branch = e () => (int32[2,4] v) { n = MatMulInteger(a, w) v = Neg(n) }
          > }"""
    )
    weight = np.full((64, 4), 127, np.int8)
    made.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    return made


def test_products_in_bodies_are_bounded_and_said_not_to_be_emulated() -> None:
    sums = saturation_check.IntegerSums(in_a_body())
    assert not sums.same and sums.kinds == ("exact", "saturating")
    feed = {"a": np.full((2, 64), 255, np.uint8), "c": np.array(True)}
    exact = sums.runner("exact", SessionOptions(threads=1)).run(feed)["y"]
    assert (exact == 64 * 255 * 127).all()  # on every processor
    found = qcompile.verify(in_a_body(), in_a_body(), [feed])
    assert bool(found.not_emulated) != runtime.saturates()


def test_what_is_not_emulated_is_no_figure() -> None:
    """QAttention: its saturation is known to be possible, and not what it does."""
    made = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
        g (uint8[1,3,8] x) => (float[1,3,8] y)
        <float s = {0.01}, float[24] b = {0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0},
         uint8 z = {0}, int8 o = {0}>
        { y = com.microsoft.QAttention<num_heads = 2>(x, w, b, s, s, , z, o) }"""
    )
    weight = np.random.default_rng(0).integers(64, 128, (8, 24)).astype(np.int8)
    made.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    feed = {"x": np.random.default_rng(1).integers(150, 256, (1, 3, 8)).astype(np.uint8)}
    found = qcompile.verify(made, made, [feed], gates=LOOSE)
    assert found.sums == "saturating" and set(found.by_sums) == {"exact", "saturating"}
    assert bool(found.not_emulated) != runtime.saturates()
    advice = saturation_check.saturation_advice(saturation_check.IntegerSums(made), found)
    assert ("elsewhere" in advice) == runtime.saturates()


def test_integers_of_one_sign_are_nothing_to_warn_of() -> None:
    """int8 data by int8 filters is added in int32."""
    made = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (int8[1,4,5,5] x) => (int8[1,2,5,5] y) <float s = {0.1}, int8 z = {0}>
        { y = QLinearConv(x, s, z, w, s, z, s, z) }"""
    )
    kernel = np.full((2, 4, 1, 1), 127, np.int8)
    made.graph.initializer.append(onnx.numpy_helper.from_array(kernel, "w"))
    assert saturation_check.IntegerSums(made).same
