"""Precision by pattern: 8, 16 or float for a tensor, through the plan to a model that runs."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest

import qcompile
from qcompile import Gates, Options, Recipe
from qcompile.compiler.config.recipe import read_recipe
from qcompile.compiler.report import ledger
from qcompile.errors import RecipeError
from qcompile.ir import Graph
from qcompile.ir.model_io.to_proto import serialize
from qcompile.passes.plan.plan_interior import PlanInterior
from qcompile.passes.plan.plan_operands import PlanOperands
from qcompile.passes.simplify.raise_opset import RaiseOpset
from qcompile.planning import Decision, PassSettings
from qcompile.planning.context import Precision
from qcompile.quant import Array, sqnr_db
from qcompile.rewriting.registry import target
from qcompile.rewriting.testing import context, encoder, normal, parse, run_pass
from qcompile.runtime.session import Session, SessionOptions
from tests.encoder_files import token_feeds

UNTIMED = Options(bench=False, threads=1)
OFF = Gates(min_cosine=None, min_worst_cosine=None, min_r2=None)
CPU_16 = "16-bit integers have no kernel on target 'cpu': left float"


def decided(
    name: str, precision: dict[str, Precision], graph: Graph | None = None, **choices: Any
) -> dict[str, list[Decision]]:
    """Decisions by tensor, after both passes of the plan."""
    ctx = context(name, precision=tuple(precision.items()), **choices)
    run_pass(graph or encoder(1), RaiseOpset(), PlanOperands(), PlanInterior(), ctx=ctx)
    found: dict[str, list[Decision]] = {}
    for decision in ctx.plan.decisions:
        found.setdefault(decision.tensor, []).append(decision)
    asked = {r.tensor: r.spec for r in ctx.requests}
    for tensor, spec in asked.items():
        assert [d.spec for d in found[tensor] if d.spec is not None] == [spec]
    return found


def types(found: dict[str, list[Decision]], *names: str) -> str:
    """Integer types in one line, ``float`` among them."""
    return " ".join(d.spec.dtype if d.spec else "float" for n in names for d in found[n])


# ---- choices


def test_the_first_pattern_that_matches_counts() -> None:
    choices = context(precision=(("a*", 8), ("role:x", 16), ("*", "float"))).choices
    first, second, third = choices.precision
    assert choices.precision_of(["ab", "role:x"]) is first
    assert choices.precision_of(["b", "role:x"]) is second
    assert choices.precision_of(["b", "role:y"]) is third
    assert PassSettings().precision_of(["a"]) is None
    assert choices.asks_wide and not context(precision=(("a", "float"),)).choices.asks_wide


# ---- target qdq: every tensor by itself


def test_weights_next_to_sixteen_bits_need_no_bound_on_pairs() -> None:
    """Only uint8 data is multiplied by kernels that add in int16."""
    found = decided("qdq", {"role:ffn-in": 16})
    paired = {name: found[name][0].spec for name in ("wf0", "wh0", "wq0")}
    assert {n: s is not None and s.paired for n, s in paired.items()} == {
        "wf0": False,
        "wh0": True,
        "wq0": True,
    }


def test_sixteen_bits_by_role_for_that_tensor_alone() -> None:
    found = decided("qdq", {"role:residual-sum": 16, "role:ffn-in": 16})
    assert types(found, "u0", "x0", "y0") == "uint16 uint16 uint16"
    assert types(found, "a", "r0", "h0", "g0", "wf0", "wh0") == "uint8 " * 4 + "int8 int8"
    assert found["u0"][0].reason == "16 bits by precision pattern 'role:residual-sum'"
    assert found["h0"][0].reason == "quantized where it is made"


def test_roles_of_one_layer() -> None:
    found = decided("qdq", {"role:*-sum@1": 16}, encoder(2))
    assert types(found, "u0", "y0", "u1", "y1") == "uint8 uint8 uint16 uint16"


def test_the_order_of_patterns_makes_exceptions() -> None:
    found = decided("qdq", {"role:*-weight": 8, "role:probabilities": "float", "*": 16})
    assert types(found, "wf0", "words", "p0", "x0", "t") == "int8 int8 float uint16 uint16"


def test_a_float_tensor_leaves_the_weight_beside_it_alone() -> None:
    found = decided("qdq", {"role:ffn-in": "float"})
    assert types(found, "x0", "wf0", "u0") == "float int8 uint8"
    assert found["x0"][0].reason == "kept float by precision pattern 'role:ffn-in'"


def test_a_float_weight_leaves_the_data_beside_it_alone() -> None:
    found = decided("qdq", {"role:query-weight": "float", "role:key-weight": 16})
    assert types(found, "wq0", "wk0", "wv0", "a") == "float int16 int8 uint8"
    (wide,) = (d.spec for d in found["wk0"])
    assert str(wide) == "int16:sym:channel[1]"


def test_a_node_stands_for_all_that_it_reads_and_makes() -> None:
    found = decided("qdq", {"MatMul:fm0": 16, "Softmax:p0": "float"})
    assert types(found, "wf0", "x0", "p0", "r0") == "int16 uint16 float uint8"


def test_a_name_behind_layout_operators_stands_for_the_same_values() -> None:
    """The context is quantized where it is made, c0; the linear reads it as cr0."""
    for pattern in ("c0", "ct0", "cr0", "Reshape:cr0", "role:context"):
        found = decided("qdq", {pattern: 16})
        assert types(found, "c0", "r0") == "uint16 uint8", pattern


def test_keep_float_knows_roles_and_comes_first() -> None:
    found = decided("qdq", {"*": 16}, keep_float=("role:ffn-out@0",))
    assert types(found, "h0", "wh0", "x0") == "float float uint16"
    assert found["wh0"][0].reason == "kept float by pattern 'role:ffn-out@0'"


def test_what_stays_float_for_other_reasons_keeps_its_reason() -> None:
    found = decided("qdq", {"role:attention-output": 16})
    assert types(found, "gm0", "g0") == "float uint16"
    assert "the bias is added first" in found["gm0"][0].reason


@pytest.mark.parametrize(
    ("length", "why"),
    [
        ("S", "probabilities in rows of any length: 8 bits resolve rows of up to 64"),
        ("65", "probabilities in rows of 65: 8 bits resolve rows of up to 64"),
        ("64", None),
    ],
)
def test_probabilities_in_rows_that_8_bits_do_not_resolve_stay_float(
    length: str, why: str | None
) -> None:
    text = f"g (float[N,8] x, float[N,{length}] s) => (float[N,8] y)"
    nodes = "p = Softmax(s) r = Relu(x) t = Transpose(r) u = MatMul(t, p) y = Neg(u)"
    found = decided("qdq", {}, parse(f"{text} {{ {nodes} }}"))
    assert types(found, "r", "p") == ("uint8 float" if why else "uint8 uint8")
    assert found["p"][0].reason == why or why is None


@pytest.mark.parametrize("pattern", ["p0", "role:probabilities", "Softmax:p0", "*"])
def test_what_the_user_asks_for_probabilities_wins(pattern: str) -> None:
    assert types(decided("qdq", {}), "p0") == "float"
    assert types(decided("qdq", {pattern: 8}), "p0") == "uint8"
    assert types(decided("qdq", {pattern: 16}), "p0") == "uint16"


@pytest.mark.parametrize(
    ("name", "mode", "longest"),
    [
        ("cpu", "static", 64),
        ("cpu", "dynamic", 64),
        ("qdq", "static", 64),
        ("tensorrt", "static", 32),
    ],
)
def test_so_does_a_mixture_by_probabilities(name: str, mode: str, longest: int) -> None:
    """Rows of a table weighted by probabilities, as in a codebook or a soft prompt."""
    for rows, kept in ((longest, False), (longest + 1, True)):
        graph = parse(
            f"g (float[N,{rows}] x) => (float[N,8] y) {{ p = Softmax(x) y = MatMul(p, w) }}",
            w=normal(rows, 8),
        )
        found = decided(name, {}, graph, mode=mode)
        (decision,) = found["p"]
        assert (decision.spec is None) == kept, rows
        assert not kept or f"bits resolve rows of up to {longest}" in decision.reason


# ---- target cpu: a linear runs in integers as a whole


def test_without_16_bit_kernels_the_linear_stays_float() -> None:
    found = decided("cpu", {"role:ffn-in": 16, "role:value-weight": 16})
    assert types(found, "x0", "wf0", "r0", "wh0") == "float float uint8 int8"
    assert found["wf0"][0].reason == found["x0"][0].reason == CPU_16
    assert types(found, "wq0", "wk0", "wv0") == "int8 int8 float"
    integer, kept = sorted(found["a"], key=lambda d: d.spec is None)
    assert [u.node for u in integer.uses] == ["MatMul:qm0", "MatMul:km0"]
    assert [u.node for u in kept.uses] == ["MatMul:vm0", "Add:u0"]


def test_what_the_target_leaves_float_is_precise_enough() -> None:
    """Sums and results of linears have no quantizer there: the linears keep their integers."""
    found = decided("cpu", {"role:residual-sum": 16, "role:ffn-out": "float"})
    assert types(found, "wf0", "wh0", "r0") == "int8 int8 uint8"


def test_float_by_node_on_cpu() -> None:
    found = decided("cpu", {"MatMul:fm0": "float"})
    assert types(found, "wf0", "x0", "wh0") == "float float int8"
    assert found["x0"][0].reason == "kept float by precision pattern 'MatMul:fm0'"


@pytest.mark.parametrize(("name", "kept"), [("cpu", "float"), ("qdq", "int16")])
def test_weight_only_mode_looks_at_weights_alone(name: str, kept: str) -> None:
    found = decided(name, {"role:ffn-in-weight": 16, "role:ffn-in": 16}, mode="weight-only")
    assert types(found, "wf0", "wh0", "x0") == f"{kept} int8 float"


def test_dynamic_ranges_are_of_8_bits() -> None:
    ctx = context("cpu", mode="dynamic", precision=(("role:ffn-in", 16),))
    ctx.target = replace(target("cpu"), wide=target("qdq").wide)
    run_pass(encoder(1), RaiseOpset(), PlanOperands(), ctx=ctx)
    (found,) = (d for d in ctx.plan.decisions if d.tensor == "x0")
    assert found.reason == "16-bit integers need calibrated ranges, mode dynamic: left float"


# ---- the opset


@pytest.mark.parametrize(
    ("name", "mode", "bits", "opset"),
    [
        ("qdq", "static", 16, 21),
        ("qdq", "weight-only", 16, 21),
        ("qdq", "float", 16, 20),
        ("qdq", "static", 8, 20),
        ("qdq", "static", "float", 20),
        ("cpu", "static", 16, 17),
    ],
)
def test_the_opset_is_raised_for_16_bits_where_the_target_has_them(
    name: str, mode: str, bits: Precision, opset: int
) -> None:
    graph = encoder(1)
    run_pass(graph, RaiseOpset(), ctx=context(name, mode=mode, precision=(("x0", bits),)))
    assert graph.opset == opset


def test_an_opset_that_cannot_be_raised_leaves_the_tensor_float() -> None:
    graph = parse(
        """g (bool c, float[N,8] x) => (float[N,8] y) {
            m = MatMul(x, w)
            r = Relu(m)
            i = If (c) <
                then_branch = yes () => (float[1,8] p) { p = ReduceMax <axes = [0]> (x) },
                else_branch = no () => (float[1,8] q) { q = ReduceMin <axes = [0]> (x) }
            >
            y = Add(r, i)
        }""",
        w=normal(8, 8),
    )
    found = decided("qdq", {"r": 16, "w": 16}, graph)
    assert types(found, "r", "w", "m") == "float float uint8"
    reason = "16-bit integers need opset 21, the model stays at 17: left float"
    assert found["r"][0].reason == found["w"][0].reason == reason


# ---- mistakes


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("layer.*", "precision pattern 'layer.*' matches no node and no tensor"),
        ("role:ffn-inn", "precision pattern 'role:ffn-inn' matches no role, this model has: atten"),
        ("role:ffn-in@1", "precision pattern 'role:ffn-in@1' matches no role"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(pattern: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        decided("qdq", {"*": 16, pattern: "float"})
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_keep_float_by_a_role_that_is_not_there_is_an_error() -> None:
    with pytest.raises(RecipeError, match="--keep-float 'role:pooler' matches no role"):
        decided("cpu", {}, keep_float=("role:pooler",))
    graph = parse("g (int64[N] x) => (int64[N] y) { y = Neg(x) }")  # fmt: skip
    with pytest.raises(RecipeError, match="matches no role, this model has: none"):
        decided("cpu", {"role:*": 8}, graph)


# ---- compiled models, in ONNX Runtime


def feeds(count: int = 8) -> list[dict[str, Array]]:
    return token_feeds(count, 4, 16, padded=(1, 11), seed=0)


def named() -> Recipe:
    """The named recipe as a value."""
    return read_recipe("mixed-precision")


def compiled(recipe: Recipe | str, outlier: float = 1.0) -> tuple[qcompile.Result, float]:
    """The result and the SQNR in dB of its outputs, as written, on tokens that set its ranges."""
    model = serialize(encoder(2, width=64, outlier=outlier))
    result = qcompile.compile(model, feeds(), recipe=recipe, gates=OFF, options=UNTIMED)
    seen = feeds()[2:6]  # the second is held back
    options = SessionOptions(threads=1)
    before, after = (Session(m, options) for m in (model, result.model))
    tokens = [f["attention_mask"] == 1 for f in seen]
    sides = [
        np.concatenate([s.run(f)["out"][t] for f, t in zip(seen, tokens, strict=True)])
        for s in (before, after)
    ]
    return result, sqnr_db(sides[0], sides[1])


def test_sixteen_bits_where_the_outliers_are_bring_the_answers_back() -> None:
    """One of 64 channels is 40 times larger: 255 steps over 6 of its sigma leave the others little.

    step = 40 * 6 / 255 = 0.94 where their sigma is 1, noise step^2 / 12 = 0.07 or 11 dB, and it
    adds up over sums and FFN inputs. 65,535 steps add 48 dB: what remains is the noise of the other
    tensors and of int8 weights, which without outliers leaves some 27 dB.
    """
    result, mixed = compiled("mixed-precision", 40.0)
    _, narrow = compiled(replace(named(), precision=(), transforms="none"), 40.0)
    assert narrow < 13
    assert mixed > narrow + 8
    wide = [r for r in result.report.ledger if r.kind == "activation" and r.dtype == "uint16"]
    assert {r.tensor for r in wide} == {f"{n}{i}" for n in "uxhy" for i in (0, 1)}
    assert all("16 bits by precision pattern" in r.reason and r.high is not None for r in wide)


def test_groups_of_the_paper_are_six_of_equal_size_in_the_ffn_alone() -> None:
    result, grouped = compiled("paper-peg", 40.0)
    _, narrow = compiled(Recipe(target="qdq", transforms="none"), 40.0)
    assert grouped > narrow + 3  # the wide channel keeps a tenth of the others to itself, not all
    found = {r.tensor for r in result.report.ledger if "6 groups of channels" in r.reason}
    assert found == {f"{n}{i}" for n in "xhy" for i in (0, 1)}
    reasons = {s.reason for s in result.report.skips if s.pass_name == "group-scales"}
    assert "no pattern of the option 'only' matches it: one scale" in reasons


def test_small_keeps_int8_kernels() -> None:
    small = read_recipe("small")
    assert (small.target, small.mode) == ("cpu", None)
    assert (small.weight_bits, small.embedding_bits) == (6, 4)


@pytest.mark.parametrize(
    ("recipe", "words", "opset"),
    [("paper-w4a8", "4", 21), ("paper-w4a32", "4", 21), ("paper-w4a8-emb2", "2", 25)],
)
def test_recipes_of_few_bits(recipe: str, words: str, opset: int) -> None:
    result, _ = compiled(recipe)
    rows = [r for r in result.report.ledger if r.kind == "weight"]
    types = {r.tensor: r.dtype.rpartition("int")[2] for r in rows}
    assert types.pop("words") == words
    assert set(types.values()) == {"4"}
    assert sum(r.bytes for r in result.report.ledger) == len(result.model)
    found = onnx.load_from_string(result.model)
    assert {o.domain: o.version for o in found.opset_import}[""] == opset
    onnx.checker.check_model(found, full_check=True)
    assert "low-bit-qdq" in {note.code for note in result.report.notes}


def test_accuracy_first_keeps_attention_float() -> None:
    assert read_recipe("accurate").attention == "float"
    assert compiled("accurate")[0].report.int8_products == 0


def test_all_of_it_in_16_bits_is_nearly_float() -> None:
    """8 bits more than 8 are 48 dB more for each tensor and weight."""
    recipe = Recipe(target="qdq", transforms="none", precision=(("*", 16),))
    result, noise = compiled(recipe, 40.0)
    assert noise > 50
    found = onnx.load_from_string(result.model)
    assert {o.domain: o.version for o in found.opset_import}[""] == 21
    onnx.checker.check_model(found)
    assert not any(n.domain for n in found.graph.node)


def test_the_report_and_the_file_alone_show_16_bits() -> None:
    result, _ = compiled("mixed-precision")
    report = json.loads(result.report.to_json())
    assert report["recipe"]["precision"] == [
        ["role:residual-sum", 16], ["role:ffn-in", 16], ["role:ffn-out", 16]
    ]  # fmt: skip
    counts = Counter((r["kind"], r["dtype"]) for r in report["ledger"])
    assert counts["activation", "uint16"] == counts["quantization", "uint16"] == 8
    rows = ledger.ledger_rows(onnx.load_from_string(result.model), len(result.model))
    assert sum(r.dtype == "uint16" for r in rows) == 8
    assert sum(r.bytes for r in rows) == len(result.model)


@pytest.mark.parametrize("calibrator", ["moving-average", "percentile", "entropy", "mse"])
def test_every_calibrator_gives_16_bit_ranges(calibrator: str) -> None:
    recipe = replace(named(), calibrator=calibrator)
    result, noise = compiled(recipe)
    assert noise > 5  # entropy clips the 8-bit tensors hard
    assert any(r.dtype == "uint16" for r in result.report.ledger)


def test_on_cpu_the_recipe_leaves_ffn_inputs_float() -> None:
    result, _ = compiled(replace(named(), target="cpu"))
    assert result.report.int8_linears == 2 * 5
    assert sum(r.reason == CPU_16 and r.kind == "weight" for r in result.report.ledger) == 2
