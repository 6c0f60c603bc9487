"""Weights of 2 to 7 bits: which get them, in which blocks, and why others do not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest

import qcompile
from qcompile import Gates, Options
from qcompile.compiler.search import precision_candidates
from qcompile.ir import Graph, Refusal
from qcompile.ir.model_io.to_proto import serialize
from qcompile.passes.plan.plan_convolutions import PlanConvolutions
from qcompile.passes.plan.plan_interior import PlanInterior
from qcompile.passes.plan.plan_operands import PlanOperands
from qcompile.passes.plan.plan_recurrent import PlanRecurrent
from qcompile.passes.plan.plan_stored import PlanStored
from qcompile.passes.simplify import raise_opset
from qcompile.passes.simplify.raise_opset import RaiseOpset
from qcompile.planning import Context, Decision
from qcompile.planning.context import Precision, WeightKind
from qcompile.planning.precision import few_bits
from qcompile.quant import QSpec
from qcompile.rewriting.testing import context, encoder, normal, parse, run_pass
from tests.command_line import run
from tests.compiler.model_folder.written_folder import write_folder, write_text
from tests.encoder_files import token_feeds

OFF = Gates(min_cosine=None, min_worst_cosine=None, min_r2=None)
PLAN = (PlanOperands(), PlanConvolutions(), PlanRecurrent(), PlanInterior(), PlanStored())
TABLE = 1 << 14  # bytes from which a table is quantized where its bits are asked for


def planned(
    name: str,
    precision: Mapping[str, Precision] | None = None,
    graph: Graph | None = None,
    **choices: Any,
) -> tuple[Context, dict[str, Decision]]:
    """The context, and decisions by tensor, of weights and of activations with a type."""
    ctx = context(name, precision=tuple((precision or {}).items()), **choices)
    run_pass(graph or encoder(1), RaiseOpset(), *PLAN, ctx=ctx)
    found: dict[str, Decision] = {}
    for decision in ctx.plan.decisions:
        if decision.tensor not in found or decision.spec is not None:
            found[decision.tensor] = decision
    return ctx, found


def widths(found: dict[str, Decision], *names: str) -> str:
    """Bits and block of each tensor in one line."""
    specs = [found[name].spec for name in names]
    return " ".join("float" if s is None else f"{s.bits}/{s.block or 0}" for s in specs)


def lookup(rows: int, channels: int) -> Graph:
    text = f"g (int64[N] i) => (float[N,{channels}] y) {{ y = Gather(t, i) }}"
    return parse(text, t=normal(rows, channels))


# ---- which weights


@pytest.mark.parametrize(
    ("bits", "linear", "table"),
    [
        (2, "2/16", "2/16"),
        (3, "3/32", "3/64"),
        (4, "4/32", "4/64"),
        (5, "5/0", "5/0"),
        (7, "7/0", "7/0"),
        (8, "8/0", "8/0"),
    ],
)
def test_settings_are_for_all_linear_layers_or_the_token_table(
    bits: int, linear: str, table: str
) -> None:
    _, found = planned("qdq", weight_bits=bits)
    assert widths(found, "wq0", "wf0", "wh0") == f"{linear} {linear} {linear}"
    assert widths(found, "words", "kinds", "x0") == "8/0 8/0 8/0"
    _, found = planned("qdq", embedding_bits=bits)
    assert widths(found, "words", "kinds", "wq0") == f"{table} 8/0 8/0"


@pytest.mark.parametrize(("block", "shown"), [(0, 0), (16, 16), (128, 128)])
def test_a_block_that_is_asked_for_is_for_both_kinds_and_all_few_bits(
    block: int, shown: int
) -> None:
    _, found = planned("qdq", {"wh0": 8}, weight_bits=6, embedding_bits=4, weight_block=block)
    assert widths(found, "wf0", "words", "wh0") == f"6/{shown} 4/{shown} 8/0"


@pytest.mark.parametrize("name", ["cpu", "qdq"])
def test_such_a_weight_has_no_other_bound(name: str) -> None:
    _, found = planned(name, weight_bits=4)
    spec = QSpec("int8", symmetric=True, granularity="channel", axis=1, width=4, block=32)
    assert found["wq0"].spec == spec
    assert str(spec) == "int8:sym:channel[1]:4-bit:block 32"


def test_a_transposed_weight_keeps_its_axis() -> None:
    graph = parse(
        "g (float[N,8] x) => (float[N,4] y) { y = Gemm<transB = 1>(x, w) }", w=normal(4, 8)
    )
    _, found = planned("cpu", graph=graph, weight_bits=4)
    assert str(found["w"].spec) == "int8:sym:channel[0]:4-bit:block 32"


def test_patterns_win_over_settings() -> None:
    precision: dict[str, Precision] = {
        "role:ffn-out-weight@0": 8,
        "role:query-weight": 2,
        "wk0": "float",
        "role:value-weight": 16,
    }
    _, found = planned("qdq", precision, weight_bits=4)
    assert widths(found, "wh0", "wq0", "wk0", "wv0", "wf0") == "8/0 2/16 float 16/0 4/32"


def test_every_weight_has_a_role() -> None:
    names = ("query", "key", "value", "attention-output", "ffn-in", "ffn-out", "embedding")
    roles: dict[str, Precision] = {f"role:{n}-weight": 4 for n in names}
    _, found = planned("qdq", roles)
    assert {d.spec.bits for d in found.values() if d.kind == "weight" and d.spec} == {4}


# ---- activations


def test_activations_keep_what_the_rule_says() -> None:
    """Also that probabilities in rows of any length stay float, as without a pattern."""
    _, plain = planned("qdq")
    _, found = planned("qdq", {"*": 4})
    kept = [n for n, d in plain.items() if d.kind == "activation"]
    assert [(found[n].spec, found[n].reason) for n in kept] == [
        (plain[n].spec, plain[n].reason) for n in kept
    ]
    assert found["p0"].spec is None and found["x0"].spec is not None
    assert {d.spec.bits for d in found.values() if d.kind == "weight" and d.spec} == {4}


def test_a_pattern_of_few_bits_hides_later_ones_from_an_activation() -> None:
    _, found = planned("qdq", {"MatMul:fm0": 4, "*": 16})
    assert widths(found, "wf0", "x0", "r0", "wh0") == "4/32 8/0 16/0 16/0"


# ---- reasons


@pytest.mark.parametrize(
    ("name", "mode", "bits", "reason"),
    [
        ("cpu", "static", 4, "4 bits in the file, int8 in the run (weight_bits)"),
        ("cpu", "dynamic", 6, "6 bits in the file, int8 in the run (weight_bits)"),
        ("cpu", "weight-only", 2, "2 bits in the file (weight_bits)"),
        ("qdq", "static", 4, "4 bits in the file, float in the run (weight_bits)"),
        ("qdq", "static", 3, "3 bits, 4 in the file, float in the run (weight_bits)"),
        ("qdq", "weight-only", 7, "7 bits, 8 in the file, float in the run (weight_bits)"),
        ("cuda", "weight-only", 4, "4 bits in the file, float in the run (weight_bits)"),
        ("cuda", "weight-only", 2, "2 bits, 4 in the file, float in the run (weight_bits)"),
        ("cuda", "weight-only", 5, "5 bits, 8 in the file, float in the run (weight_bits)"),
    ],
)
def test_what_is_in_the_file_and_in_the_run(name: str, mode: str, bits: int, reason: str) -> None:
    _, found = planned(name, mode=mode, weight_bits=bits)
    assert found["wf0"].reason == reason


def test_the_pattern_is_named() -> None:
    _, found = planned("cpu", {"wf0": 4})
    reason = "4 bits in the file, int8 in the run (precision pattern 'wf0')"
    assert found["wf0"].reason == reason


# ---- refusals: 8 bits, with the reason


def test_a_target_that_has_no_few_bits() -> None:
    ctx, found = planned("tensorrt", mode="static", weight_bits=4)
    assert widths(found, "wf0") == "8/0"
    why = "8 bits, not 4 (weight_bits): target 'tensorrt' stores weights in 8 bits"
    assert found["wf0"].reason == why
    note = ctx.remarks["weight-bits-unused"]
    assert note == f"weight_bits 4 applies to no linear layer's weight: {why}"


def test_rules_without_int8_by_channel() -> None:
    graph, ctx = encoder(1), context("cpu")
    asymmetric = QSpec("int8", symmetric=False)
    refusal = few_bits(graph, ctx, asymmetric, 4, "linear")
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "few bits are for int8 by channel, target 'cpu' has int8:asym:tensor"


@pytest.mark.parametrize("name", ["cpu", "qdq"])
def test_kernels_of_convolutions_keep_8_bits(name: str) -> None:
    graph = parse(
        """g (float[1,4,8,8] x) => (float[1,4,6,6] y) {
            r = Relu(x) c = Conv(r, w) d = Conv<pads = [1, 1, 1, 1]>(c, w) y = Relu(d) }""",
        w=normal(4, 4, 3, 3),
    )
    _, found = planned(name, {"w": 4}, graph)
    assert widths(found, "w") == "8/0"
    why = "few bits are for weights of linear layers and for tables"
    assert found["w"].reason == f"8 bits, not 4 (precision pattern 'w'): {why}"


def test_recurrent_layers_keep_8_bits() -> None:
    graph = parse(
        "g (float[T,B,8] x) => (float[T,1,B,64] y) { y = GRU<hidden_size = 64>(x, w, r) }",
        w=normal(1, 192, 8),
        r=normal(1, 192, 64),
    )
    _, found = planned("cpu", {"r": 3}, graph)
    assert widths(found, "r") == "8/0"
    assert found["r"].reason.startswith("8 bits, not 3 (precision pattern 'r'): few bits are for")


def test_settings_do_not_touch_convolutions() -> None:
    graph = parse("g (float[1,4,8,8] x) => (float[1,4,6,6] y) { c = Conv(x, w) y = Relu(c) }",
                  w=normal(4, 4, 3, 3))  # fmt: skip
    ctx, found = planned("cpu", graph=graph, weight_bits=4)
    assert "weight_bits" not in found["w"].reason
    assert "weight_bits 4 applies to no linear" in ctx.remarks["weight-bits-unused"]


def test_patterns_that_leave_no_weight_to_a_setting_are_named() -> None:
    ctx, _ = planned("cpu", {"*": 8}, weight_bits=4)
    assert "weight-bits-unused" in ctx.remarks
    assert planned("cpu", {"wf0": 8}, weight_bits=4)[0].remarks == {}


def test_mode_float_says_that_nothing_has_these_bits() -> None:
    ctx, _ = planned("cpu", mode="float", weight_bits=4)
    why = "target 'cpu' finds none to quantize in mode float"
    assert ctx.remarks["weight-bits-unused"].endswith(f"linear layer's weight: {why}")


# ---- small tables


@pytest.mark.parametrize(
    ("bits", "rows", "shown"),
    [
        (None, 1 << 14, "8/0"),
        (None, 1 << 10, "float"),
        (4, 1 << 10, "4/64"),
        (8, 1 << 10, "8/0"),
        (4, TABLE // 64 - 1, "float"),
    ],
)
def test_small_tables_are_quantized_where_their_bits_are_asked_for(
    bits: int | None, rows: int, shown: str
) -> None:
    _, found = planned("cpu", graph=lookup(rows, 16), embedding_bits=bits)
    assert widths(found, "t") == shown
    if bits and shown == "float":
        assert found["t"].reason == "table under 16384 bytes: not worth the additional nodes"


# ---- the opset


@pytest.mark.parametrize(
    ("name", "mode", "bits", "opset"),
    [
        ("cpu", "static", 4, 21),
        ("cpu", "static", 2, 21),
        ("cpu", "weight-only", 6, 21),
        ("cpu", "static", 8, 17),
        ("cpu", "float", 4, 17),
        ("qdq", "static", 4, 21),
        ("qdq", "static", 3, 21),
        ("qdq", "static", 2, 25),
        ("qdq", "static", 6, 20),
        ("tensorrt", "static", 4, 20),
        ("cuda", "weight-only", 4, 17),
    ],
)
@pytest.mark.parametrize("setting", ["weight_bits", "embedding_bits", "pattern"])
def test_the_opset_is_raised_to_that_of_the_types(
    name: str, mode: str, bits: int, opset: int, setting: str
) -> None:
    graph, given = encoder(1), {} if setting == "pattern" else {setting: bits}
    precision: Any = (("x0", bits),) if setting == "pattern" else ()
    run_pass(graph, RaiseOpset(), ctx=context(name, mode=mode, precision=precision, **given))
    assert graph.opset == opset


def stuck(op: str) -> Graph:
    """A graph that stays at opset 17, because of reductions in its bodies."""
    return parse(
        f"""g (bool c, float[N,8] x) => (float[N,8] y) {{
            m = MatMul(x, w)
            i = If (c) <
                then_branch = yes () => (float[1,8] p) {{ p = {op} <axes = [0]> (x) }},
                else_branch = no () => (float[1,8] q) {{ q = {op} <axes = [0]> (x) }}
            >
            y = Add(m, i)
        }}""",
        w=normal(8, 8),
    )


def test_an_opset_that_cannot_be_raised_leaves_8_bits() -> None:
    for name in ("cpu", "qdq"):
        _, found = planned(name, {"w": 4}, stuck("ReduceMax"))
        assert widths(found, "w") == "8/0"
        reason = "4 bits need opset 21, the model stays at 17"
        assert found["w"].reason == f"8 bits, not 4 (precision pattern 'w'): {reason}"


def test_the_next_lower_opset_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 bits take a type of 4 where the model cannot get to opset 25."""
    monkeypatch.setitem(raise_opset._CHANGED, "Softmax", 24)
    monkeypatch.setattr(raise_opset, "convert_opset", lambda *_: Refusal("it failed"))
    graph = encoder(1)
    ctx, found = planned("qdq", graph=graph, weight_bits=2)
    assert graph.opset == 21 and widths(found, "wf0") == "2/16"
    assert [s.reason for s in ctx.skips if s.pass_name == "raise-opset"] == [
        "Softmax has another meaning in opset 25, and it failed"
    ]


# ---- searches


@pytest.mark.parametrize(("name", "raised"), [("cpu", "float"), ("qdq", 16)])
def test_a_search_raises_few_bits_to_8(name: str, raised: Precision) -> None:
    graph, ctx = encoder(1), context(name, precision=(("wf0", 4),), mode="static")
    run_pass(graph, RaiseOpset(), PlanOperands(), PlanInterior(), ctx=ctx)
    origins = precision_candidates.record_origins(graph, ctx)
    kinds = {n: o for o in origins.values() for n in o.own if o.kind == "weight"}
    bits = {n: precision_candidates._raised_bits(ctx, o) for n, o in kinds.items()}
    assert (bits["wf0"], bits["wh0"]) == (8, raised)


# ---- compiled


def test_compile_takes_them_and_reports_them() -> None:
    feeds = token_feeds(8, 4, 16, padded=(1, 11), seed=0)
    model = serialize(encoder(2, width=64))
    result = qcompile.compile(
        model, feeds, weight_bits=4, embedding_bits=6, weight_block=16, gates=OFF,
        options=Options(bench=False, threads=1),
    )  # fmt: skip
    report = json.loads(result.report.to_json())
    keys = ("weight_bits", "embedding_bits", "weight_block")
    assert [report["recipe"][k] for k in keys] == [4, 6, 16]
    reasons = {r["tensor"]: r["reason"] for r in report["ledger"] if r["kind"] == "weight"}
    assert reasons["wf1"] == "4 bits in the file, int8 in the run (weight_bits)"
    onnx.checker.check_model(onnx.load_from_string(result.model))


def test_few_bits_of_a_folder(tmp_path: Path) -> None:
    folder, text = write_folder(tmp_path / "in"), write_text(tmp_path / "text.txt")
    done = run(
        "compile", folder, "-o", tmp_path / "out", "--data", text, "--no-bench",
        "--weight-bits", 4, "--min-cosine", 0.1, "--min-worst-cosine", 0.1,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "model.report.json").read_text())
    assert report["recipe"]["weight_bits"] == 4
    assert any("4 bits in the file" in row["reason"] for row in report["ledger"])


def test_both_kinds_have_a_setting() -> None:
    kinds: tuple[WeightKind, ...] = ("linear", "table")
    choices = context("cpu", weight_bits=3, embedding_bits=5).choices
    assert [choices.bits_of(k) for k in kinds] == [("weight_bits", 3), ("embedding_bits", 5)]
    assert choices.few_bits == {3, 5}
    assert context("cpu", precision=(("a", 7), ("b", 16), ("c", "float"))).choices.few_bits == {7}
