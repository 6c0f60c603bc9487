"""The task is what config.json's architectures say, or an error that lists the tasks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from qcompile.compiler.model_folder.tasks import TASKS, check_text, read_json, task_named, task_of
from qcompile.errors import ModelError


def config(folder: Path, **keys: object) -> Path:
    (folder / "config.json").write_text(json.dumps(keys))
    return folder


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("BertModel", "feature-extraction"),
        ("DebertaV2ForSequenceClassification", "text-classification"),
        ("MPNetForTokenClassification", "token-classification"),
        ("RobertaForQuestionAnswering", "question-answering"),
        ("DistilBertForMaskedLM", "fill-mask"),
        ("T5EncoderModel", "feature-extraction"),
        ("CLIPTextModelWithProjection", "feature-extraction"),
        ("DPRQuestionEncoder", "feature-extraction"),
    ],
)
def test_architectures(tmp_path: Path, architecture: str, task: str) -> None:
    assert task_of(config(tmp_path, architectures=[architecture])).name == task


@pytest.mark.parametrize(
    "keys", [{}, {"architectures": []}, {"architectures": "x"}, {"architectures": [3]},
             {"architectures": ["T5ForConditionalGeneration"]},
             {"architectures": ["GPT2LMHeadModel"]}, {"architectures": ["GPT2DoubleHeadsModel"]}],
)  # fmt: skip
def test_unknown_architectures(tmp_path: Path, keys: dict[str, object]) -> None:
    with pytest.raises(
        ModelError, match=r"task is unknown: give --task, one of feature-extraction"
    ):
        task_of(config(tmp_path, **keys))


def test_a_folder_of_sentence_transformers_holds_an_encoder(tmp_path: Path) -> None:
    """Embedders made from decoders keep the architecture that they were trained as."""
    (tmp_path / "modules.json").write_text("[]")
    assert task_of(config(tmp_path, architectures=["Qwen3ForCausalLM"])).name == TASKS[0].name


def test_names() -> None:
    assert [task_named(task.name) for task in TASKS] == list(TASKS)
    with pytest.raises(ModelError, match="unknown task 'translation', expected one of feature-"):
        task_named("translation")


@pytest.mark.parametrize(
    ("text", "said"), [("{", "is not JSON"), ("[]", "holds list"), ("[" * 9**5, "is not JSON")]
)
def test_damaged_json(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=said):
        task_of(tmp_path)


def test_missing_json(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gone\.json cannot be read"):
        read_json(tmp_path / "gone.json")


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"image_size": 32, "architectures": ["ViTForImageClassification"]},
         "--task image-classification DIR"),
        ({"num_channels": 3, "architectures": ["ResNetModel"]}, "--task feature-extraction DIR"),
        ({"num_channels": 3, "model_type": "sam"}, "DIR, then qcompile compile DIR -o OUT"),
    ],
)  # fmt: skip
def test_a_model_of_images_is_refused_with_the_commands_for_it(
    tmp_path: Path, keys: dict[str, object], named: str
) -> None:
    with pytest.raises(ModelError, match=re.escape(named)) as caught:
        check_text(config(tmp_path, **keys))
    message = str(caught.value)
    assert "\n" not in message and f"optimum-cli export onnx --model {tmp_path}" in message


@pytest.mark.parametrize(
    "keys", [{"vocab_size": 9}, {"image_size": 32, "text_config": {}},
             {"vocab_size": 9, "num_channels": 3}, {}],
)  # fmt: skip
def test_models_of_text_are_not(tmp_path: Path, keys: dict[str, object]) -> None:
    check_text(config(tmp_path, **keys))
