"""Gates in recipes: the command line wins, and lock, report and search know them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import qcompile
from qcompile.compiler.config.lockfile import read_lockfile
from qcompile.compiler.config.recipe import Recipe, read_recipe, recipe_yaml
from qcompile.errors import RecipeError
from qcompile.runtime.evaluation.closeness import Gates
from tests.command_line import assert_one_line, compile_args, run


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text("transforms: none\ngates: {max-abs: 1.0e-9, min_cosine: null}\n")
    return path


def test_a_gate_of_a_recipe_fails_and_the_command_line_wins(
    model: Path, data: Path, recipe: Path
) -> None:
    args = compile_args(model, data, "--recipe", recipe, "--search-time", 0)
    assert_one_line(run(*args), 1, "largest difference", "(--max-abs)")
    found = run(*args, "--max-abs", 100, "--json")
    assert found.exit_code == 0, found.output
    gates = json.loads(found.stdout)["gates"]
    assert (gates["max_abs"], gates["min_cosine"], gates["min_worst_cosine"]) == (100, None, 0.9)


def test_a_gate_of_a_recipe_starts_the_search(model: Path, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("transforms: none\ntarget: qdq\ngates: {min-sqnr: 200}\n")
    result = run(*compile_args(model, data, "--recipe", path, "--search-time", 20))
    assert_one_line(result, 1, "(--min-sqnr)", "search")


def test_sensitivity_measures_with_the_gates_of_a_recipe(
    model: Path, data: Path, tmp_path: Path
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("transforms: none\ngates: {min-sqnr: 500}\n")
    policy = tmp_path / "policy.yaml"
    args = ("sensitivity", model, "--data", data, "-o", policy, "--by", "role", "--recipe")
    assert "which raises 6:" in run(*args, path).stdout
    assert "which raises 6:" not in run(*args, "per-tensor").stdout


def test_the_lock_keeps_them(model: Path, data: Path, tmp_path: Path) -> None:
    path, lock = tmp_path / "r.yaml", tmp_path / "lock.yaml"
    path.write_text("transforms: none\ngates: {max-abs: 100}\n")
    assert run(*compile_args(model, data, "--recipe", path, "--lock", lock)).exit_code == 0
    assert read_lockfile(lock).recipe.gates == (("max_abs", 100),)
    again = run(*compile_args(model, data, "--recipe", lock, "--max-abs", "1e-9"))
    assert_one_line(again, 1, "(--max-abs)")


def test_python_takes_them_unless_gates_are_given(model: Path, data: Path) -> None:
    recipe = Recipe(transforms="none", gates=(("max_abs", 1e-9),))
    options = qcompile.Options(bench=False)
    with pytest.raises(qcompile.RejectedError, match="--max-abs"):
        qcompile.compile(model, data, recipe=recipe, options=options)
    result = qcompile.compile(model, data, recipe=recipe, gates=Gates(), options=options)
    assert result.report.passed


def test_they_survive_yaml_and_change_the_digest(tmp_path: Path) -> None:
    recipe = Recipe(gates=(("max_abs", 0.5), ("min_cosine", None)))
    path = tmp_path / "r.yaml"
    path.write_text(recipe_yaml(recipe, (), {}))
    assert read_recipe(path) == recipe and recipe.digest() != Recipe().digest()
    assert recipe.make_gates() == Gates(max_abs=0.5, min_cosine=None)


@pytest.mark.parametrize(
    ("gates", "said"),
    [
        ((("min_cosin", 1.0),), "unknown gate 'min_cosin', did you mean 'min_cosine'"),
        ((("min_cosine", False),), "'min_cosine' is False, expected a number, or null"),
        ((("min_cosine", "high"),), "'min_cosine' is 'high', expected a number, or null"),
    ],
)
def test_mistakes_are_named(gates: tuple[tuple[str, float], ...], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Recipe(gates=gates)
