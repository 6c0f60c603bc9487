"""Recipes, schemas, completion of the shell, and mistyped commands and options."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from click.shell_completion import ShellComplete

from qcompile.commands.cli import main
from qcompile.compiler.config.recipe import read_recipe, recipe_names
from tests.command_line import assert_one_line, run, run_module


def test_recipes_are_listed_with_what_they_set() -> None:
    rows = json.loads(run("recipes", "--json").stdout)
    assert [row["name"] for row in rows] == list(recipe_names())
    (peg,) = (row for row in rows if row["name"] == "paper-peg")
    assert "transforms" in peg["keys"] and peg["what"].startswith("Bondarenko et al. 2021, section")
    assert all(name in run("recipes").stdout for name in recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_the_text_of_a_recipe_is_a_recipe(name: str, tmp_path: Path) -> None:
    """Also with the keys that follow as comments, once they are none."""
    text = run("recipes", name).stdout
    path = tmp_path / "r.yaml"
    path.write_text(text)
    assert read_recipe(path) == read_recipe(name)
    own, _, keys = text.partition("# Keys that are not set")
    rest = "\n".join(line.removeprefix("# ") for line in keys.splitlines()[1:])
    path.write_text(own + "\n" + rest)
    assert read_recipe(path) == read_recipe(name)


def test_an_unknown_recipe_or_schema_names_the_nearest() -> None:
    assert_one_line(run("recipes", "acurate"), 2, "did you mean 'accurate'")
    assert_one_line(run("schema", "recipes2"), 2, "did you mean 'recipes'")


def test_every_schema_is_one_and_stands_alone() -> None:
    names = run("schema").stdout.split()
    assert {"recipe", "report", "verify", "bench", "recipes"} <= {*names}
    for name in names:
        found = json.loads(run("schema", name).stdout)
        jsonschema.Draft202012Validator.check_schema(found)
        referred = {part["$ref"].rpartition("/")[2] for part in parts(found) if "$ref" in part}
        assert referred == set(found.get("$defs", ()))


def parts(value: object) -> list[dict[str, str]]:
    if isinstance(value, dict):
        own = [value] if isinstance(value.get("$ref", ""), str) else []
        return own + [p for item in value.values() for p in parts(item)]
    return [p for item in value for p in parts(item)] if isinstance(value, list) else []


def completed(*words: str) -> list[str]:
    """What the shell offers for the last word."""
    shell = ShellComplete(main, {}, "qcompile", "_QCOMPILE_COMPLETE")
    return [item.value for item in shell.get_completions(list(words[:-1]), words[-1])]


def test_the_shell_completes_names() -> None:
    assert completed("rec") == ["recipes"]
    assert completed("compile", "--target", "c") == ["cpu", "cuda"]
    assert completed("compile", "--recipe", "paper-p") == ["paper-peg"]
    assert completed("compile", "--calibrator", "min") == ["minmax"]
    assert completed("compile", "--pipeline", "fold-constants,insert-q") == [
        "fold-constants,insert-qdq"
    ]
    assert "--min-cosine" in completed("compile", "--min-")
    assert completed("recipes", "fa") == ["fast"]


def test_completion_does_not_import_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(main), "get_command", lambda *_: pytest.fail("imported"))
    assert "verify" in completed("ver")


def test_mistyped_commands_and_options_name_the_nearest() -> None:
    assert_one_line(run("compil"), 2, "no such command 'compil', did you mean 'compile'?")
    assert_one_line(run("xyz"), 2, "expected demo, compile, verify")
    assert_one_line(run("compile", "--min-cosin", "1"), 2, "--min-cosine")


def test_help_names_the_targets() -> None:
    for command in ("compile", "bench"):
        text = " ".join(run(command, "--help").stdout.split())
        assert "cpu, cuda, qdq, tensorrt" in text


def test_python_runs_the_package() -> None:
    found = run_module("qcompile", "--version")
    assert found.returncode == 0 and "qcompile, version" in found.stdout
