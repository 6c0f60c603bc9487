"""The pooling of a sentence-transformers folder, in both spellings of its configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qcompile.compiler.config.recipe import Recipe
from qcompile.compiler.model_folder.layout import read_folder
from qcompile.compiler.model_folder.sentence_pooling import with_folder_pooling
from qcompile.errors import ModelError

OLD, NEW = "sentence_transformers.models", "sentence_transformers.sentence_transformer.modules"
MEAN = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}


def folder(path: Path, config: Any, *more: str, place: str = OLD) -> Path:
    """A folder with a transformer, its pooling, and more modules."""
    modules = [{"idx": 0, "path": "", "type": f"{place}.Transformer"}]
    modules.append({"idx": 1, "path": "1_Pooling", "type": f"{place}.Pooling"})
    for i, name in enumerate(more, 2):
        modules.append({"idx": i, "path": f"{i}_{name}", "type": f"{place}.{name}"})
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    (path / "modules.json").write_text(json.dumps(modules))
    return path


def chosen(path: Path, **settings: Any) -> tuple[str, bool]:
    recipe = with_folder_pooling(Recipe(pooling="auto", **settings), read_folder(path))
    return recipe.pooling, recipe.normalize


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (MEAN, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_lasttoken": True}, "lasttoken"),
        ({"pooling_mode": "weightedmean", "include_prompt": True}, "weightedmean"),
        ({"pooling_mode": ["mean_sqrt_len_tokens"]}, "mean_sqrt_len_tokens"),
    ],
)
def test_pooling_of_the_folder(tmp_path: Path, config: Any, kind: str) -> None:
    assert chosen(folder(tmp_path, config)) == (kind, False)


@pytest.mark.parametrize("place", [OLD, NEW])
def test_a_module_normalizes(tmp_path: Path, place: str) -> None:
    assert chosen(folder(tmp_path, MEAN, "Normalize", place=place)) == ("mean", True)


def test_normalize_may_be_asked_for(tmp_path: Path) -> None:
    assert chosen(folder(tmp_path, MEAN), normalize=True) == ("mean", True)


def test_a_pooling_that_is_named_stays(tmp_path: Path) -> None:
    recipe = Recipe(pooling="cls")
    assert with_folder_pooling(recipe, read_folder(tmp_path)) is recipe


@pytest.mark.parametrize(
    ("config", "more", "message"),
    [
        (MEAN, ("Dense", "Normalize"), "modules.json has a module 'Dense', which stays outside"),
        (MEAN, ("Pooling",), "has a module 'Pooling'"),
        ({**MEAN, "pooling_mode_cls_token": True}, (), "names cls and mean, expected one pooling"),
        ({"pooling_mode_cls_token": False}, (), "names none, expected one pooling"),
        ({"pooling_mode": "median"}, (), "names pooling 'median', expected one of mean, cls"),
        ({"pooling_mode": {"mean": 1}}, (), "names pooling {'mean': 1}, expected one of"),
        ({**MEAN, "include_prompt": False}, (), "leaves prompts out"),
        ([], (), "1_Pooling/config.json holds no mapping"),
    ],
)
def test_what_is_not_put_into_a_graph(
    tmp_path: Path, config: Any, more: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ModelError) as e:
        chosen(folder(tmp_path, config, *more))
    assert message in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("modules.json", "{", "modules.json cannot be read"),
        ("modules.json", "[1]", "modules.json holds no list of modules"),
        ("modules.json", "[]", "modules.json has no module 'Pooling'"),
        ("modules.json", None, "pooling auto needs 'modules.json' in folder"),
        ("1_Pooling/config.json", "[" * 100_000, "1_Pooling/config.json cannot be read"),
        ("1_Pooling/config.json", None, "pooling auto needs '1_Pooling/config.json'"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    file = folder(tmp_path, MEAN) / name
    file.unlink()
    if text is not None:
        file.write_text(text)
    with pytest.raises(ModelError) as e:
        chosen(tmp_path)
    assert message in str(e.value) and "\n" not in str(e.value)
