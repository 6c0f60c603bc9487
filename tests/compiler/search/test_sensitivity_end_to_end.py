"""Which tensors cost accuracy: items, their errors, and the policy that lifts the worst."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import qcompile
from qcompile import Gates, Options, Recipe
from qcompile.compiler.config.recipe import read_recipe
from qcompile.compiler.search.policy import Sensitivity
from qcompile.compiler.search.precision_candidates import escaped
from qcompile.compiler.search.sensitivity import Meter, Score, first_samples
from qcompile.errors import DataError, GateError, RecipeError, TargetError
from qcompile.ir.analysis.name_patterns import matches
from qcompile.ir.model_io.to_proto import serialize
from qcompile.quant import Array
from qcompile.rewriting.testing import encoder
from tests.encoder_files import token_feeds

OFF = Gates(min_cosine=None, min_worst_cosine=None, min_r2=None)
OPEN = replace(OFF, max_latency_ratio=None)
QUICK = Options(bench=False, threads=1)
# No rewriting by ranges: it would take the outliers out of sight.
QDQ = Recipe(target="qdq", transforms="none")
CPU = Recipe(target="cpu", transforms="none")


def feeds(count: int = 4, batch: int = 4) -> list[dict[str, Array]]:
    return token_feeds(count, batch, padded=(0, 4))


@pytest.fixture(scope="module")
def model() -> bytes:
    """An encoder with one wide channel in the FFN input of each layer, x0 and x1."""
    return serialize(encoder(2, width=16, outlier=40.0))


@pytest.fixture(scope="module")
def ranked(model: bytes) -> Sensitivity:
    return qcompile.sensitivity(model, feeds(), recipe=QDQ, gates=OFF, options=QUICK)


def names(found: Sensitivity) -> list[str]:
    return [row.item.name for row in found.rows]


# ---- ranking


def test_the_wide_tensors_come_first(ranked: Sensitivity) -> None:
    assert set(names(ranked)[:4]) == {"x0", "y0", "x1", "y1"}
    first = ranked.rows[0]
    assert first.alone is not None and first.raised is not None
    assert first.alone.error > 10 * ranked.rows[4].error > 0
    assert first.raised.error < ranked.quantized.error
    assert {r.item.kinds for r in ranked.rows} == {"activation", "weight"}


def test_errors_lie_between_all_off_and_all_on(ranked: Sensitivity) -> None:
    assert ranked.unquantized.error < 1e-9 < ranked.quantized.error
    errors = [row.error for row in ranked.rows]
    assert errors == sorted(errors, reverse=True)


def test_one_measure_takes_half_of_the_runs(model: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = Meter.__call__

    def counted(self: Meter, on: Collection[int], samples: int = 0) -> Score:
        calls.append(len(on))
        return original(self, on, samples)

    monkeypatch.setattr(Meter, "__call__", counted)
    alone = qcompile.sensitivity(
        model, feeds(), recipe=QDQ, gates=OFF, options=QUICK, measure="alone"
    )
    assert len(calls) == len(alone.rows) + 2 and calls.count(1) == len(alone.rows)
    assert all(row.raised is None for row in alone.rows)
    calls.clear()
    lifted = qcompile.sensitivity(
        model, feeds(), recipe=QDQ, gates=OFF, options=QUICK, measure="lifted"
    )
    assert len(calls) == len(alone.rows) + 2
    left = [row.raised.error for row in lifted.rows if row.raised is not None]
    assert left == sorted(left) and lifted.rows[0].alone is None


@pytest.mark.parametrize(
    ("by", "first", "pattern"),
    [
        ("role", {"ffn-in", "ffn-sum"}, {"role:ffn-in": 16}),
        ("layer", {"layer 0", "layer 1"}, {"role:*@0": 16}),
    ],
)
def test_groups(model: bytes, by: Any, first: set[str], pattern: dict[str, int]) -> None:
    found = qcompile.sensitivity(
        model, feeds(), recipe=QDQ, gates=OFF, options=QUICK, by=by, measure="alone"
    )
    assert names(found)[0] in first
    lifts = [dict(row.item.raised) for row in found.rows]
    assert pattern in lifts
    covered = [s for row in found.rows for s in row.item.switches]
    assert sorted(covered) == sorted(found.found.meter.everything)


def test_weights_and_data_are_told_apart(model: bytes) -> None:
    found = qcompile.sensitivity(model, feeds(), recipe=QDQ, gates=OFF, options=QUICK, by="kind")
    assert names(found) == ["activations", "weights"]
    assert dict(found.rows[1].item.raised) == {"role:*-weight": 16}
    with pytest.raises(RecipeError, match="weight and data of an operator together"):
        qcompile.sensitivity(model, feeds(), recipe=CPU, gates=OFF, options=QUICK, by="kind")


def test_on_cpu_an_operator_is_one_item(model: bytes) -> None:
    found = qcompile.sensitivity(model, feeds(), recipe=CPU, gates=OFF, options=QUICK)
    assert len(found.rows) == 12
    assert set(names(found)[:2]) == {"MatMul:fm0", "MatMul:fm1"}
    assert dict(found.rows[0].item.raised) == {names(found)[0]: "float"}
    assert found.rows[0].item.roles == "ffn-in-weight"


def test_what_has_16_bits_becomes_float(model: bytes) -> None:
    recipe = replace(QDQ, precision=(("x0", 16),))
    found = qcompile.sensitivity(
        model, feeds(), recipe=recipe, gates=OFF, options=QUICK, measure="alone"
    )
    lifts = {row.item.name: dict(row.item.raised) for row in found.rows}
    assert lifts["x0"] == {"x0": "float"} and lifts["x1"] == {"x1": 16}


def test_samples_are_cut_where_the_batch_may_be() -> None:
    given = feeds(2, 4)
    assert [len(f["ids"]) for f in first_samples(given, 6, True)] == [4, 2]
    assert [len(f["ids"]) for f in first_samples(given, 6, False)] == [4, 4]
    assert [len(f["ids"]) for f in first_samples(given, 4, True)] == [4]


@pytest.mark.parametrize("name", ["a[0]", "b*", "c?d", "plain/x:0"])
def test_an_escaped_name_matches_itself_alone(name: str) -> None:
    assert matches(escaped(name), [name])
    others = ["a0", "bcd", "cxd", "plain/x:1", "b*x"]
    assert not matches(escaped(name), others)


# ---- policy


def compiled(model: bytes, recipe: Recipe, gates: Gates = OPEN) -> qcompile.Result:
    return qcompile.compile(model, feeds(), recipe=recipe, gates=gates, options=QUICK)


def test_a_policy_lifts_as_many_as_the_gate_needs(model: bytes) -> None:
    """The compiled model is as good as predicted, up to what ONNX Runtime's integer kernels do."""
    gates = replace(OPEN, min_cosine=0.998)
    found = qcompile.sensitivity(model, feeds(), recipe=QDQ, gates=gates, options=QUICK)
    assert found.quantized.failures
    policy = found.policy()
    assert 0 < len(policy.raised) < len(found.rows) / 2
    fewer = found.policy(len(policy.raised) - 1)
    assert fewer.predicted.failures and not policy.predicted.failures
    verdict = compiled(model, policy.recipe).report.verdict
    assert verdict is not None and verdict.error < found.quantized.error / 5
    assert abs(verdict.outputs[0].mean_cosine - policy.predicted.mean_cosine) < 1e-3


def test_a_policy_file_is_a_recipe(ranked: Sensitivity, model: bytes, tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    policy = ranked.policy(3)
    path.write_text(policy.to_yaml("made here"))
    assert read_recipe(path) == policy.recipe
    assert yaml.safe_load(path.read_text())["precision"] == dict.fromkeys(names(ranked)[:3], 16)
    assert path.read_text().count("alone") >= 3
    ledger = compiled(model, read_recipe(path)).report.ledger
    wide = {r.tensor for r in ledger if r.dtype == "uint16" and r.kind == "activation"}
    assert wide == set(names(ranked)[:3])


def test_a_policy_keeps_what_the_recipe_said(model: bytes, tmp_path: Path) -> None:
    recipe = Recipe("qdq", keep_float=("u0",), transforms="none", precision=(("u1", "float"),))
    found = qcompile.sensitivity(
        model, feeds(), recipe=recipe, gates=OFF, options=QUICK, measure="alone"
    )
    assert not {"u0", "u1"} & set(names(found))
    path = tmp_path / "p.yaml"
    path.write_text(found.policy(1).to_yaml("x"))
    assert read_recipe(path) == replace(recipe, precision=((names(found)[0], 16), ("u1", "float")))


def test_nothing_is_lifted_where_the_gates_pass(ranked: Sensitivity) -> None:
    policy = ranked.policy()
    assert policy.raised == () and policy.recipe.precision == ()
    assert "precision" not in policy.to_yaml("x")


def test_a_gate_that_no_policy_reaches(model: bytes) -> None:
    gates = replace(OFF, max_abs=-1.0)
    found = qcompile.sensitivity(
        model, feeds(), recipe=QDQ, gates=gates, options=QUICK, measure="alone"
    )
    with pytest.raises(GateError, match="with all items raised"):
        found.policy()


def test_plain_values_are_json(ranked: Sensitivity) -> None:
    found = json.loads(json.dumps(ranked.to_dict(), allow_nan=False))
    assert found["rows"][0]["item"] == names(ranked)[0]


def test_nothing_to_rank(model: bytes) -> None:
    with pytest.raises(TargetError, match="nothing is quantized"):
        qcompile.sensitivity(model, feeds(), recipe=Recipe(keep_float=("*",)), options=QUICK)
    with pytest.raises(DataError):
        qcompile.sensitivity(model, [], recipe=QDQ, options=QUICK)
