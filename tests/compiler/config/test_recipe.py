"""Recipes: checked values in, a stable digest out, one line for every mistake."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qcompile.calibrators.percentile import Percentile
from qcompile.compiler.config.recipe import (
    Recipe,
    merge_settings,
    read_recipe,
    recipe_names,
    recipe_yaml,
)
from qcompile.errors import RecipeError
from qcompile.passes.transform.group_scales import GroupScales
from qcompile.passes.transform.permute_channels import PermuteChannels
from qcompile.rewriting.pipeline_spec import parse
from qcompile.rewriting.registry import targets

FULL = """
target: qdq
mode: static
calibrator: percentile{percentile=99.9}
pipeline: fold-constants
keep-float: [head.*, 7]
mask-padding: false
seed: 3
precision:
  role:ffn-in: 16
  "*softmax*": float
  7: 8
"""


def test_a_file_with_every_key(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(FULL)
    assert (
        read_recipe(path)
        == read_recipe(str(path))
        == Recipe(
            target="qdq",
            mode="static",
            calibrator="percentile{percentile=99.9}",
            pipeline="fold-constants",
            keep_float=("head.*", "7"),
            mask_padding=False,
            seed=3,
            precision=(("role:ffn-in", 16), ("*softmax*", "float"), ("7", 8)),
        )
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("targte: cpu", "unknown key 'targte', did you mean 'target'"),
        ("zzz: 1", "unknown key 'zzz', expected one of: target, mode, "),
        ("3: cpu", "unknown key '3'"),
        ("target: 3", "target is 3, expected a name"),
        ("mode: quick", "unknown mode 'quick'"),
        ("mode: statik", "unknown mode 'statik', did you mean 'static'"),
        ("mode: off", "mode is False, expected a name"),
        ("seed: 1.5", "seed is 1.5, expected a whole number"),
        ("seed: true", "seed is True, expected a whole number"),
        ("mask_padding: 1", "mask_padding is 1, expected true or false"),
        ("keep_float: head", "keep_float is 'head', expected a list of patterns"),
        ("precision: 16", "precision is 16, expected a mapping of patterns to 2 to 8, 16 or float"),
        ("precision: [a]", "precision is .'a'., expected a mapping of patterns"),
        ("precision: {a: 9}", "precision of 'a' is 9, expected 2 to 8, 16 or float"),
        ("precision: {a: '16'}", "precision of 'a' is '16', expected 2 to 8, 16 or float"),
        ("precision: {a: 16.0}", "precision of 'a' is 16.0, expected 2 to 8, 16 or float"),
        ("precision: {a: true}", "precision of 'a' is True, expected 2 to 8, 16 or float"),
        ("precision: {a: }", "precision of 'a' is None, expected 2 to 8, 16 or float"),
        ("precision: {a: 1}", "precision of 'a' is 1, expected 2 to 8, 16 or float"),
        ("precision: {a: 4.0}", "precision of 'a' is 4.0, expected 2 to 8, 16 or float"),
        ("weight_bits: 9", "weight_bits is 9, expected 2 to 8"),
        ("weight_bits: 1", "weight_bits is 1, expected 2 to 8"),
        ("weight_bits: true", "weight_bits is True, expected 2 to 8"),
        ("embedding_bits: 16", "embedding_bits is 16, expected 2 to 8"),
        ("embedding_bits: float", "embedding_bits is 'float', expected 2 to 8"),
        ("weight_block: 24", "weight_block is 24, expected a power of two from 16 on, or 0"),
        ("weight_block: 8", "weight_block is 8, expected a power of two from 16 on, or 0"),
        ("weight_block: -16", "weight_block is -16, expected a power of two"),
        ("weight_block: false", "weight_block is False, expected a power of two"),
        ("a: [", "is not YAML"),
        ("a: b: c", "is not YAML"),
        ("- target", "holds no mapping"),
        ("", "holds no mapping"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=rf"{said}") as caught:
        read_recipe(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: None, "cannot be read: No such file"),
        (lambda p: p.mkdir(), "cannot be read: Is a directory"),
        (lambda p: p.write_bytes(b"\xff\xfe\x00"), "is not YAML"),
        (lambda p: p.write_bytes(b"a\x00b"), "is not YAML"),
    ],
)
def test_no_recipe(tmp_path: Path, make: Callable[[Path], object], said: str) -> None:
    make(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match=rf"r\.yaml' {said}"):
        read_recipe(tmp_path / "r.yaml")


def test_options_win_over_the_file_where_they_are_given() -> None:
    base = Recipe(target="qdq", seed=5)
    given = {"target": None, "seed": 0, "keep_float": ("a",), "mask-padding": False}
    assert merge_settings(base, given, "options") == Recipe(
        target="qdq", seed=0, keep_float=("a",), mask_padding=False
    )


def test_the_digest_moves_with_every_setting() -> None:
    recipes = [
        Recipe(),
        Recipe(target="qdq"),
        Recipe(mode="float"),
        Recipe(calibrator="mse"),
        Recipe(pipeline="fold-constants"),
        Recipe(keep_float=("a",)),
        Recipe(keep_float=("a", "b")),
        Recipe(mask_padding=False),
        Recipe(keep_padding_rows=True),
        Recipe(seed=1),
        Recipe(precision=(("a", 16),)),
        Recipe(precision=(("a", "float"),)),
        Recipe(precision=(("a", 16), ("b", 8))),
        Recipe(precision=(("b", 8), ("a", 16))),
        Recipe(weight_bits=4),
        Recipe(embedding_bits=4),
        Recipe(weight_block=0),
        Recipe(weight_block=32),
    ]
    assert len({r.digest() for r in recipes}) == len(recipes)
    assert Recipe(seed=1).digest() == Recipe(seed=1).digest()


def test_a_recipe_without_newer_settings_keeps_its_digest() -> None:
    """As models have it in their metadata that were compiled before these settings came."""
    assert Recipe().digest() == "5bf6f3c27aa4341f"


def test_bits_of_weights_survive_yaml(tmp_path: Path) -> None:
    recipe = Recipe(weight_bits=3, embedding_bits=2, weight_block=0, precision=(("a", 5),))
    (tmp_path / "r.yaml").write_text(recipe_yaml(recipe, [], {}))
    assert read_recipe(tmp_path / "r.yaml") == recipe


def test_the_digest_is_the_same_in_another_process() -> None:
    code = "from qcompile import Recipe; print(Recipe(keep_float=('a', 'b'), seed=7).digest())"
    command = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, sys.argv[1]); {code}"]
    root = str(Path(__file__).parents[3])
    done = subprocess.run([*command, root], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == Recipe(keep_float=("a", "b"), seed=7).digest()


def test_calibrators_by_name_and_options() -> None:
    made = Recipe(calibrator="percentile{percentile=99.5}").make_calibrator()
    assert made == Percentile(percentile=99.5)
    with pytest.raises(RecipeError, match="unknown calibrator 'minmx', did you mean 'minmax'"):
        Recipe(calibrator="minmx").make_calibrator()
    for text in ("", "minmax,mse"):
        with pytest.raises(RecipeError, match="one calibrator expected"):
            Recipe(calibrator=text).make_calibrator()


# ---- named recipes


@pytest.mark.parametrize("name", recipe_names())
def test_named_recipes_are_read_by_name(name: str) -> None:
    made = read_recipe(name)
    assert made != Recipe()
    assert made.target in targets()
    made.make_calibrator()


def test_recipes_of_the_paper() -> None:
    assert read_recipe("paper-mp") == Recipe(
        target="qdq",
        transforms="none",
        precision=(("role:ffn-in", 16), ("role:ffn-out", 16), ("role:ffn-sum", 16), ("*", 8)),
    )
    assert read_recipe("paper-peg").precision == (("*", 8),)
    permute, groups = parse(read_recipe("paper-peg").transforms)
    assert permute == PermuteChannels()
    assert groups == GroupScales(6, doublings=0, only="role:ffn-in|role:ffn-out|role:ffn-sum")


def test_mixed_precision_has_attention_sums_too() -> None:
    assert read_recipe("mixed-precision") == Recipe(
        target="qdq",
        precision=(("role:residual-sum", 16), ("role:ffn-in", 16), ("role:ffn-out", 16)),
    )
    assert read_recipe("per-tensor") == Recipe(transforms="none")


@pytest.mark.parametrize(
    ("name", "hint"), [("mixed-precison", "; did you mean 'mixed-precision'?"), ("zzz", "")]
)
def test_an_unknown_name_lists_those_that_exist(name: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe(name)
    known = ", ".join(recipe_names())
    assert str(caught.value) == (
        f"unknown recipe {name!r}, expected a .yaml file or: {known}{hint}"
    )


def test_a_name_comes_before_a_file_and_a_path_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for source in ("./per-tensor", "per-tensor.yaml", Path("per-tensor")):
        with pytest.raises(RecipeError, match="cannot be read: No such file"):
            read_recipe(source)
    Path("per-tensor").write_text("seed: 3")
    Path("own").write_text("seed: 4")
    assert read_recipe("per-tensor").seed == 0
    assert read_recipe("./per-tensor").seed == read_recipe(Path("per-tensor")).seed == 3
    assert read_recipe("own").seed == 4
