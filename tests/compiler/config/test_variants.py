"""Variants: names, files, and settings that do not contradict what was asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qcompile.compiler.config.recipe import Recipe
from qcompile.compiler.config.variants import TABLE, variants_named
from qcompile.compiler.model_folder import layout
from qcompile.errors import RecipeError
from qcompile.runtime.evaluation.closeness import Gates


def names(*given: str) -> list[str]:
    return [v.name for v in variants_named(given)]


def test_names_lists_and_suffixes() -> None:
    assert names("int8,q4", "int8", "fp16") == ["int8", "q4", "fp16"]
    assert names("q8", "qint8_avx512_vnni", "int8-avx2") == [
        "int8",
        "int8_avx512_vnni",
        "int8_avx2",
    ]
    with pytest.raises(RecipeError, match="unknown variant 'int9', did you mean 'int8'"):
        names("q4,int9")
    with pytest.raises(RecipeError, match="unknown variant ''"):
        names("")


@pytest.mark.parametrize(
    ("model", "file"),
    [
        ("model.onnx", "onnx/model_q4.onnx"),
        ("onnx/model.onnx", "onnx/model_q4.onnx"),
        ("text/encoder.onnx", "text/encoder_q4.onnx"),
    ],
)
def test_files_are_where_others_look(model: str, file: str) -> None:
    assert TABLE["q4"].file(model) == file


def test_each_file_is_known_as_a_converted_one(tmp_path: Path) -> None:
    """A second run must not compile what the first made."""
    (tmp_path / "onnx").mkdir()
    files = [v.file("model.onnx") for v in TABLE.values()]
    assert len(set(files)) == len(TABLE)
    for name in ("model.onnx", *files):
        (tmp_path / name).touch()
    assert layout.read_folder(tmp_path).models == ("model.onnx",)


def test_settings_that_contradict_are_refused() -> None:
    assert TABLE["fp16"].recipe(Recipe(seed=3)) == Recipe(seed=3, target="cuda", mode="float")
    assert TABLE["q4"].recipe(Recipe(weight_bits=4)).mode == "weight-only"
    with pytest.raises(RecipeError, match="'q4' has weight_bits 4, but 6 was asked for"):
        TABLE["q4"].recipe(Recipe(weight_bits=6))
    with pytest.raises(RecipeError, match="isa 'avx2', but 'arm64' was asked for"):
        TABLE["int8_avx2"].recipe(Recipe(isa="arm64"))


def test_a_gate_that_was_given_stays() -> None:
    assert TABLE["q4"].own_gates(Gates()) == replace(Gates(), max_latency_ratio=None)
    assert TABLE["q4"].own_gates(Gates(max_latency_ratio=0.9)) == Gates(max_latency_ratio=0.9)
    assert TABLE["int8"].own_gates(Gates()) == Gates()


def test_the_page_has_all_of_them() -> None:
    page = (Path(__file__).parents[3] / "docs" / "variants.md").read_text()
    rows = [[cell.strip() for cell in x.split("|")[1:4]] for x in page.splitlines() if "|" in x]
    for variant in TABLE.values():
        dtype = f'`dtype: "{variant.dtype}"`' if variant.dtype else ""
        assert [f"`{variant.name}`", f"`model_{variant.suffix}.onnx`", dtype] in rows
