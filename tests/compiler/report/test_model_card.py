"""The model card: the float card's metadata where they still hold, figures, code that loads it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import yaml

from qcompile.compiler.config.recipe import Recipe
from qcompile.compiler.report.model_card import CardFacts, CardRow, front_matter, model_card
from qcompile.compiler.report.notes import Note
from qcompile.compiler.report.report import Report
from qcompile.runtime.evaluation.closeness import Closeness, Gates, Verdict
from qcompile.runtime.latency import Comparison, Timing
from qcompile.system.processor import Environment
from qcompile.targets.runtime_versions import OLDEST

OLD = """---
license: mit
language: en
tags: sentence-similarity
pipeline_tag: sentence-similarity
library_name: sentence-transformers
model-index: [{name: x, results: []}]
base_model: some/pretrained
---
# Float
Scores of the float model.
"""
FACTS = CardFacts("small", "me/small", "org/float", OLD, "feature-extraction", "AutoModel", False)


def report() -> Report:
    old, new = Timing("float", [[8.0]] * 4), Timing("compiled", [[2.0]] * 4)
    outputs = [
        Closeness("a", cosine=[0.99, 0.97]),
        Closeness("b", cosine=[1.0, 1.0]),
        Closeness("ids", exact=True, cosine=[0.0]),
    ]
    return Report(
        source="model.onnx", target="cpu", mode="static", recipe=Recipe(), digest="", pipeline="",
        gates=Gates(), float_bytes=8_000_000, bytes=2_000_000,
        environment=Environment("x86_64", ["AVX512-VNNI"], "3", "1", "1.32.0", "0", "2"),
        verdict=Verdict(outputs, [], 32), speed=Comparison([old, new], {"ids": [8, 16]}, 2),
    )  # fmt: skip


def row(measured: Report | None = None, file: str = "onnx/model_quantized.onnx") -> CardRow:
    return CardRow(file, "int8", "q8", measured or report())


def test_metadata_that_still_hold_are_kept() -> None:
    found = front_matter(model_card(FACTS, [row()]))
    assert found == {
        "language": "en",
        "license": "mit",
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-similarity", "onnx", "qcompile"],
        "base_model": "org/float",
        "base_model_relation": "quantized",
    }


def test_without_a_float_card_the_folder_says_what_it_is() -> None:
    bare = replace(FACTS, float_card="", base_model=None, repository=None)
    assert front_matter(model_card(bare, [row()])) == {
        "pipeline_tag": "feature-extraction",
        "tags": ["onnx", "qcompile"],
        "base_model_relation": "quantized",
    }
    found = front_matter(model_card(replace(bare, embeds_sentences=True), [row()]))
    assert found["library_name"] == "sentence-transformers"


def test_figures_and_how_they_were_measured() -> None:
    text = model_card(FACTS, [row()])
    line = next(x for x in text.splitlines() if "model_quantized.onnx`" in x)
    assert line == (
        "| `onnx/model_quantized.onnx` | int8 | 2.0 MB | 25% | 0.9800 | 0.9700 "
        "| 2.00 ms, float 8.00 | 4.00 |"
    )
    assert "ids [8, 16], threads: 2, x86_64 with AVX512-VNNI, onnxruntime 1.32.0" in text
    assert "on 32 samples" in text and "[org/float](https://huggingface.co/org/float)" in text
    assert "Scores of the float model" not in text and "Padded positions" not in text


def test_what_was_not_measured_is_not_shown() -> None:
    bare = replace(report(), verdict=None, speed=None, provider_missing="CPUExecutionProvider")
    text = model_card(FACTS, [row(bare)])
    assert "| 25% |  |  |  |  |" in text and "Not compared" in text and "Latency:" not in text
    elsewhere = replace(report(), provider_missing="CPUExecutionProvider")
    assert "2.00 ms" not in model_card(FACTS, [row(elsewhere)])  # not the target's own
    random = replace(report(), notes=[Note("made-up-inputs", "")])
    assert "on 32 random inputs" in model_card(FACTS, [row(random)])


def test_padding_is_explained_where_it_is_removed() -> None:
    removed = replace(report(), notes=[Note("padding-skipped", "")])
    assert "Padded positions" in model_card(FACTS, [row(removed)])


def test_it_says_which_onnxruntime_the_files_need() -> None:
    newer = replace(report(), notes=[Note("oldest-runtime", "the file needs onnxruntime 9.9")])
    text = model_card(FACTS, [row(), row(newer, "b.onnx"), row(file="c.onnx")])
    assert text.count(f"- Needs onnxruntime {OLDEST} or later.") == 1
    assert [x for x in text.splitlines() if "9.9" in x] == [
        "- `b.onnx`: the file needs onnxruntime 9.9."
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, 'SentenceTransformer("me/small", backend="onnx", model_kwargs={"file_name": "onnx/m'),
        ({"task": "text-classification"}, 'CrossEncoder("me/small", backend="onnx"'),
        (
            {"float_card": ""},
            'FeatureExtraction.from_pretrained("me/small", file_name="model_quantized.onnx")',
        ),
        (
            {"float_card": "", "auto_class": "AutoModelForTokenClassification"},
            "import ORTModelForTokenClassification",
        ),
        ({"repository": None}, 'pipeline("feature-extraction", "small", { dtype: "q8" })'),
    ],
)
def test_code_that_loads_it(changes: dict[str, Any], said: str) -> None:
    assert said in model_card(replace(FACTS, **changes), [row()])


def test_an_embedding_is_for_onnx_runtime_alone() -> None:
    pooled = replace(report(), recipe=Recipe(pooling="mean"))
    text = model_card(FACTS, [row(pooled)])
    assert text.count("```") == 2 and 'InferenceSession("onnx/model_quantized.onnx")' in text


@pytest.mark.parametrize(
    "card",
    ["", "# no front matter", "---\nlicense: mit", "---\n- a\n---", "---\na: [\n---",
     "---\na: &x 1\nb: *x\n---", "---\n" + "a: 1\n" * 20_000 + "---"],
)  # fmt: skip
def test_front_matter_that_cannot_be_read_is_none(card: str) -> None:
    assert front_matter(card) == {}
    yaml.safe_load(model_card(replace(FACTS, float_card=card), [row()]).split("---\n")[1])


def test_names_cannot_end_a_cell_or_a_string() -> None:
    text = model_card(replace(FACTS, repository=None, name='a"b'), [row(file="a|b.onnx")])
    assert "`a\\|b.onnx`" in text and '"a\\"b"' in text
