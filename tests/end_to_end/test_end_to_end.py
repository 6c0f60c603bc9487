"""The whole path on the real demo model: paraphrase-MiniLM-L3-v2 from its pip package."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

import qcompile
from qcompile import Gates, Options, Recipe, RejectedError
from qcompile.commands.demo import model_path
from qcompile.compiler.stages.pipelines import SIMPLIFY
from qcompile.data.feeds import Feeds, input_specs
from qcompile.data.open_data import sample_feeds
from qcompile.ir.model_io.read_model import load
from qcompile.runtime.session import Session, SessionOptions, optimized_ops

LINEARS = 18  # three layers of six
LAYERS = 3
UNTIMED = Options(bench=False, threads=2)


@pytest.fixture(scope="module")
def model() -> Path:
    return model_path()


@pytest.fixture(scope="module")
def feeds(model: Path) -> Feeds:
    return sample_feeds(input_specs(load(model)))


@pytest.fixture(scope="module")
def static(model: Path, feeds: Feeds) -> qcompile.Result:
    return qcompile.compile(model, feeds, options=UNTIMED)


def test_static_is_small_and_close(static: qcompile.Result) -> None:
    report = static.report
    assert report.size_ratio < 0.27
    assert report.verdict is not None and report.verdict.samples >= 16
    for output in report.verdict.outputs:
        assert output.mean_cosine > 0.99
        assert output.worst_cosine > 0.98


def assert_fast_forms(ops: Counter[str]) -> None:
    """What ONNX Runtime makes of the model: integer products, no slow fusions, no leftovers."""
    assert ops["com.microsoft.MatMulIntegerToFloat"] == LINEARS + LAYERS  # and the scores
    # By tanh where quantized in wide steps: those of the last layer are 0.004.
    assert (ops["com.microsoft.FastGelu"], ops["com.microsoft.Gelu"]) == (LAYERS - 1, 1)
    assert ops["QuantizeLinear"] == 12 + 2 * LAYERS  # Q, K and V share one; query and key
    for slow in ("DequantizeLinear", "com.microsoft.SkipLayerNormalization", "Erf"):
        assert ops[slow] == 0, slow


def test_onnx_runtime_runs_integer_products_and_nothing_slow(static: qcompile.Result) -> None:
    assert_fast_forms(optimized_ops(static.model))


def test_without_the_lowering_that_assertion_fails(model: Path, feeds: Feeds) -> None:
    """Left as Q/DQ, tables are dequantized in every run and biases stay outside the products."""
    pipeline = f"{SIMPLIFY},plan-operands,insert-qdq"
    result = qcompile.compile(model, feeds, pipeline=pipeline, options=UNTIMED)
    ops = optimized_ops(result.model)
    with pytest.raises(AssertionError):
        assert_fast_forms(ops)
    assert ops["DequantizeLinear"] and ops["com.microsoft.BiasGelu"]


def test_ledger_adds_up_and_gives_a_reason_for_every_float_weight(static: qcompile.Result) -> None:
    ledger = static.report.ledger
    assert sum(row.bytes for row in ledger) == len(static.model)
    integers = [r for r in ledger if r.kind == "weight" and r.dtype == "int8"]
    assert len(integers) == LINEARS + 1  # and the word embeddings
    assert all(r.sqnr_db is not None and r.sqnr_db > 30 for r in integers)
    assert all(row.reason for row in ledger)
    activations = [r for r in ledger if r.kind == "activation" and r.dtype == "uint8"]
    assert len(activations) == 12 + LAYERS  # and the queries
    keys = [r for r in ledger if r.kind == "activation" and r.dtype == "int8"]
    assert len(keys) == static.report.int8_products == LAYERS
    assert all(r.low is not None and r.high is not None for r in activations)


def test_names_types_and_metadata_survive(model: Path, static: qcompile.Result) -> None:
    before, after = onnx.load(model), onnx.load_from_string(static.model)
    assert [i.SerializeToString() for i in before.graph.input] == [
        i.SerializeToString() for i in after.graph.input
    ]
    assert [o.name for o in before.graph.output] == [o.name for o in after.graph.output]
    props = {p.key: p.value for p in after.metadata_props}
    assert props["qcompile.target"] == "cpu"
    assert props["qcompile.recipe"] == static.report.digest
    onnx.checker.check_model(after, full_check=False)


def test_same_input_gives_the_same_bytes(
    model: Path, feeds: Feeds, static: qcompile.Result
) -> None:
    again = qcompile.compile(model.read_bytes(), feeds, options=UNTIMED)
    assert again.model == static.model


def test_the_report_is_json_with_everything_in_it(static: qcompile.Result) -> None:
    found = json.loads(static.report.to_json())
    assert found["passed"] and found["int8_linears"] == LINEARS
    assert found["calibration"]["padding_left_out"] is True
    assert {p["name"] for p in found["passes"]} >= {"insert-qdq", "lower-linears"}
    assert found["environment"]["onnxruntime"]


@pytest.mark.parametrize("mode", ["dynamic", "weight-only"])
def test_modes_without_ranges(model: Path, feeds: Feeds, mode: str) -> None:
    recipe = Recipe(mode=mode)  # type: ignore[arg-type]
    result = qcompile.compile(model, feeds, recipe=recipe, options=UNTIMED)
    assert result.report.int8_linears == LINEARS
    assert result.report.size_ratio < 0.28


def test_mode_float_changes_nothing_but_speed(model: Path, feeds: Feeds) -> None:
    """Fusions reorder float sums: 1e-4 is 30 times the largest difference in float32 seen."""
    gates = Gates(max_abs=1e-4)
    result = qcompile.compile(model, feeds, mode="float", gates=gates, options=UNTIMED)
    assert result.report.int8_linears == 0
    assert not result.report.failures


@pytest.mark.parametrize("calibrator", ["moving-average", "percentile", "entropy", "mse"])
def test_every_calibrator_works_on_a_real_model(model: Path, feeds: Feeds, calibrator: str) -> None:
    """Entropy clips hardest: it is the one that loses most on a transformer."""
    result = qcompile.compile(model, feeds, calibrator=calibrator, options=UNTIMED, gates=Gates())
    assert result.report.int8_linears == LINEARS


@pytest.mark.parametrize("target", ["cpu", "qdq"])
def test_a_small_memory_budget_changes_nothing(model: Path, feeds: Feeds, target: str) -> None:
    """Not even where tensors that every part of a batch has, as positions, are quantized: qdq."""
    made = [
        qcompile.compile(
            model,
            feeds,
            calibrator="mse",
            target=target,
            options=Options(bench=False, verify=False, threads=2, max_memory=limit),
        )
        for limit in (None, 95_000_000)
    ]
    assert made[0].model == made[1].model


def test_target_qdq_is_standard_and_fully_quantized(model: Path, feeds: Feeds) -> None:
    """Per-tensor W8A8 of everything loses accuracy here, as in the paper: the gate is off."""
    gates = Gates(min_cosine=0.8, min_worst_cosine=0.7)
    result = qcompile.compile(model, feeds, target="qdq", gates=gates, options=UNTIMED)
    found = onnx.load_from_string(result.model)
    inserted = {"QuantizeLinear", "DequantizeLinear"}
    assert {n.domain for n in found.graph.node if n.op_type in inserted} == {""}
    assert not any(n.domain for n in found.graph.node)
    assert sum(n.op_type == "QuantizeLinear" for n in found.graph.node) > 3 * 12


def test_batch_mates_and_padding_do_not_change_a_sentence(static: qcompile.Result) -> None:
    """Static ranges: every row is computed alone. 1e-5: sums of 384 floats in another order."""
    session = Session(static.model, SessionOptions(threads=2))
    ids = np.array([[101, 2023, 2003, 1037, 3231, 102]], np.int64)
    alone = session.run({"input_ids": ids, "attention_mask": np.ones_like(ids)})["461"]
    padded = np.pad(ids, ((0, 0), (0, 5)))
    mates = np.vstack([padded, np.full_like(padded, 2054)])
    mask = np.vstack([padded != 0, np.ones_like(padded)]).astype(np.int64)
    together = session.run({"input_ids": mates, "attention_mask": mask})["461"]
    np.testing.assert_allclose(together[:1], alone, atol=1e-5)


def test_a_failed_gate_rejects_and_force_overrides(model: Path, feeds: Feeds) -> None:
    impossible = Gates(min_cosine=1.0)
    with pytest.raises(RejectedError, match="mean cosine") as caught:
        qcompile.compile(model, feeds, mode="dynamic", gates=impossible, options=UNTIMED)
    assert caught.value.result.report.failures
    forced = Options(bench=False, threads=2, force=True)
    result = qcompile.compile(model, feeds, mode="dynamic", gates=impossible, options=forced)
    assert result.report.failures and result.model


def test_keep_float_leaves_a_layer_alone(model: Path, feeds: Feeds) -> None:
    pattern = "*layer.0/output/dense/MatMul"
    result = qcompile.compile(model, feeds, keep_float=[pattern], options=UNTIMED)
    assert result.report.int8_linears == LINEARS - 1
    assert any(pattern in row.reason for row in result.report.ledger)


def test_verify_and_bench_from_python(
    model: Path, feeds: Feeds, static: qcompile.Result, tmp_path: Path
) -> None:
    static.save(tmp_path / "int8.onnx")
    verdict = qcompile.verify(model, tmp_path / "int8.onnx", list(feeds)[:2])
    assert verdict.passed and verdict.samples == 16
    from qcompile.runtime.latency import TimingOptions as Timing

    quick = Timing(threads=2, rounds=2, seconds=0.01, min_runs=2, warmup=1)
    found = qcompile.bench(
        [model, static.model], dims={"batch_size": 1, "sequence_length": 8}, options=quick
    )
    assert [len(t.rounds) for t in found.timings] == [2, 2]
    assert found.shapes["input_ids"] == [1, 8]
