"""fuzz.py: a few hundred cases of each kind, and that it sees what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

import qcompile
from benchmarks.robustness import _corrupt_files, _random_graphs, _random_operators, fuzz
from benchmarks.robustness import _differential_check as checks
from qcompile.errors import ModelError
from qcompile.rewriting.testing import model_proto, normal
from tests.command_line import run_module


def case(seed: int) -> tuple[onnx.ModelProto, list[dict[str, Any]]]:
    model = _random_operators.build(seed)
    return model, _random_graphs.feeds(model, seed)


@pytest.mark.parametrize(("kind", "count"), [("graphs", 20), ("models", 120), ("data", 60)])
def test_nothing_goes_wrong(kind: str, count: int) -> None:
    end = run_module("benchmarks.robustness.fuzz", kind, "--count", count)
    assert (end.returncode, end.stderr) == (0, ""), end.stdout
    assert f"'good': {count}" in end.stdout


def test_a_seed_is_one_model_and_one_damage() -> None:
    model = case(5)[0].SerializeToString()
    assert case(5)[0].SerializeToString() == model
    damage = _corrupt_files.damage
    for fields in (True, False):
        made = [damage(model, seed, model, fields=fields) for seed in (1, 2, 1)]
        assert made[0] == made[2] != made[1]
        assert made[0] != model


def test_fewer_operators_are_a_prefix() -> None:
    build = _random_operators.build
    short, full = (build(8, count).graph.node for count in (2, 12))
    assert 0 < len(short) < len(full)
    assert list(short) == list(full[: len(short)])


def spoil_weight(model: onnx.ModelProto) -> None:
    """Two columns of the largest integer weight exchanged."""
    weights = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8]
    weight = max(weights, key=lambda t: int(np.prod(t.dims)))
    values = onnx.numpy_helper.to_array(weight)
    weight.CopyFrom(onnx.numpy_helper.from_array(values[:, ::-1].copy(), weight.name))


def rename_output(model: onnx.ModelProto) -> None:
    model.graph.node.add(op_type="Identity", input=[model.graph.output[0].name], output=["other"])
    model.graph.output[0].name = "other"


def lose_input(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "nowhere"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_weight, "wrong: output 0 differs by"),
        (rename_output, "wrong: outputs changed"),
        (lose_input, "wrong: does not run"),
    ],
)
def test_a_wrong_model_is_seen(
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[onnx.ModelProto], None],
    words: str,
) -> None:
    real = qcompile.compile

    def wrong(*args: Any, **options: Any) -> Any:
        model = onnx.ModelProto.FromString(real(*args, **options).model)
        spoil(model)
        data = model.SerializeToString()
        row = SimpleNamespace(bytes=len(data))
        return SimpleNamespace(model=data, report=SimpleNamespace(ledger=[row]))

    monkeypatch.setattr(qcompile, "compile", wrong)
    text = "random (float[B,8] x) => (float[B,6] y) { y = MatMul(x, w) }"
    model = model_proto(text, w=normal(8, 6))
    feeds = _random_graphs.feeds(model, 0)
    (fault,) = checks.check(model, feeds, [checks.Form("cpu", "static")])
    assert words in fault and "[cpu/static]" in fault


@pytest.mark.parametrize(
    ("error", "words"), [(ModelError("no"), "refused: no"), (KeyError("k"), "crashed: KeyError")]
)
def test_what_is_raised_is_told(
    monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def fail(*_args: Any, **_options: Any) -> Any:
        raise error

    monkeypatch.setattr(qcompile, "compile", fail)
    (fault,) = checks.check(*case(0), [checks.Form("cpu", "float")])
    assert words in fault


def test_a_float_model_may_not_move_further_than_rounding() -> None:
    reference = [[np.full((2, 3), 1.0)]]
    for off, wrong in ((2.0**-20, False), (2.0**-15, True)):
        found = checks._compare([[reference[0][0] + off]], reference, [2.0**-16], checks.largest)
        assert bool(found) == wrong


def test_what_goes_wrong_is_kept_as_small_as_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(case: Any) -> list[str]:
        case.files(tmp_path)
        nodes = len(onnx.load(tmp_path / "model.onnx").graph.node)
        return ["wrong: so"] if nodes > 3 else ["refused: so"]

    monkeypatch.setattr(fuzz, "judge", judge)
    fuzz.keep(fuzz.graph_case(8), ["wrong: so"], tmp_path / "dest")
    folder = tmp_path / "dest" / "graphs-8"
    kept, whole = onnx.load(folder / "model.onnx"), case(8)[0]
    assert 3 < len(kept.graph.node) < len(whole.graph.node)
    replay = "python -m benchmarks.robustness.fuzz graphs --start 8 --count 1"
    assert replay in (folder / "fault.txt").read_text()
