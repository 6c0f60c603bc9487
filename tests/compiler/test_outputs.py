"""``--outputs``: other outputs are removed, and so is what only they need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import qcompile
from qcompile import Recipe
from qcompile.compiler.stages.options import CompileOptions
from qcompile.errors import RecipeError
from qcompile.rewriting.testing import model_proto, normal
from tests.command_line import run

TEXT = """g (float[B,S,8] x) => (float[B,8] first, float[B,S,8] all, float[B,S,8] other) {
    m = MatMul(x, w) all = Relu(m) p = Gather<axis = 1>(all, zero) first = MatMul(p, v)
    other = MatMul(all, u)
}"""
FEEDS = [{"x": normal(2, 4, 8, seed=i)} for i in range(3)]
UNTIMED = CompileOptions(bench=False)


def model() -> onnx.ModelProto:
    weights = {n: normal(8, 8, seed=i) for i, n in enumerate("wvu")}
    return model_proto(TEXT, zero=np.array(0), **weights)


def compiled(**settings: Any) -> qcompile.Result:
    return qcompile.compile(model(), FEEDS, options=UNTIMED, **settings)


@pytest.mark.parametrize("mode", ["static", "dynamic", "float"])
def test_only_these_outputs_are_left(mode: Any, tmp_path: Path) -> None:
    result = compiled(mode=mode, outputs=["first"])
    made = onnx.load_from_string(result.model)
    assert [o.name for o in made.graph.output] == ["first"]
    assert not [i.name for i in made.graph.initializer if i.name.startswith("u")]
    verdict = result.report.verdict
    assert verdict is not None and [o.name for o in verdict.outputs] == ["first"]
    assert any("1 of all positions" in note.text for note in result.report.notes)


def test_verify_compares_what_was_kept() -> None:
    result = compiled(outputs=["first", "other"])
    verdict = qcompile.verify(model(), result.model, FEEDS)
    assert [o.name for o in verdict.outputs] == ["first", "other"]


def test_an_unknown_output_is_an_error_that_lists_the_outputs() -> None:
    with pytest.raises(RecipeError, match="no output 'last', only 'first', 'all', 'other'"):
        compiled(outputs=["last"])


def test_recipes_without_it_keep_their_digests() -> None:
    assert Recipe().digest() == "5bf6f3c27aa4341f"
    assert Recipe(outputs=("first",)).digest() != Recipe().digest()


def test_a_lock_repeats_it(tmp_path: Path) -> None:
    source, data, lock = tmp_path / "m.onnx", tmp_path / "d.npz", tmp_path / "l.yaml"
    onnx.save(model(), source)
    np.savez(data, x=normal(24, 4, 8))
    common = ["--no-bench", "-q"]
    first, again = tmp_path / "first.onnx", tmp_path / "again.onnx"
    done = run("compile", source, "-o", first, "--data", data, "--outputs", "first",
               "--lock", lock, *common)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert run("compile", source, "-o", again, "--recipe", lock, *common).exit_code == 0
    assert first.read_bytes() == again.read_bytes()
    other = run("compile", source, "-o", again, "--recipe", lock, "--outputs", "all", *common)
    assert other.exit_code != 0 and "the lock says" in other.output
