"""Commands take folders as compile writes them, and find the tokenizer that is in them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

import qcompile
from qcompile.compiler.model_folder.model_file import model_file
from qcompile.data.tokenizer import folder_near
from qcompile.errors import ModelError, RecipeError
from qcompile.rewriting.testing import model_proto
from qcompile.runtime.evaluation.user_metric import Batch
from tests.command_line import assert_one_line, run
from tests.compiler.model_folder.written_folder import write_folder
from tests.encoder_files import save_encoder

QUICK = ("--rounds", 1, "--seconds", 0.01)


@pytest.fixture
def folder(tmp_path: Path, model: Path) -> Path:
    """A folder with its model in onnx/, as optimum and transformers.js have it."""
    place = tmp_path / "encoder" / "onnx"
    place.mkdir(parents=True)
    shutil.copy(model, place / "model.onnx")
    return place.parent


def test_a_folder_stands_for_its_model(folder: Path, model: Path) -> None:
    assert model_file(folder) == folder / "onnx" / "model.onnx"
    assert model_file(folder / "onnx") == folder / "onnx" / "model.onnx"
    assert model_file(model) == model
    shutil.copy(model, folder / "onnx" / "model_quantized.onnx")  # a version of the same model
    assert model_file(folder) == folder / "onnx" / "model.onnx"


def test_a_folder_with_several_models_says_which_to_name(folder: Path, model: Path) -> None:
    shutil.copy(model, folder / "onnx" / "decoder.onnx")
    for command in (("inspect", folder), ("bench", folder), ("diff", folder, folder)):
        assert_one_line(run(*command), 2, "several models, name one", "onnx/decoder.onnx")


def test_a_folder_without_a_model_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"holds no \.onnx file$"):
        model_file(tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").touch()
    with pytest.raises(ModelError, match="first: qcompile export"):
        model_file(tmp_path / "empty")


def test_inspect_diff_and_bench_take_folders(folder: Path, model: Path) -> None:
    shown = json.loads(run("inspect", folder, "--json").stdout)
    assert shown["bytes"] == model.stat().st_size
    assert "the same bytes" in run("diff", folder, model).stdout
    (found,) = json.loads(run("bench", folder, model, *QUICK, "--json").stdout)
    assert len(found["models"]) == 2


def test_verify_and_sensitivity_take_folders(folder: Path, model: Path, data: Path) -> None:
    found = json.loads(run("verify", folder, model, "--data", data, "--json").stdout)
    assert found["passed"] is True
    args = ("sensitivity", folder, "--data", data, "--by", "role", "--measure", "alone", "--json")
    assert json.loads(run(*args).stdout)["source"] == "model.onnx"


def test_python_takes_folders(folder: Path, model: Path, data: Path) -> None:
    assert qcompile.verify(folder, str(model), data).passed
    options = qcompile.Options(verify=False, bench=False)
    assert qcompile.compile(folder, data, recipe="per-tensor", options=options).report.bytes
    assert qcompile.session(folder).get_inputs()


@pytest.mark.parametrize("place", ["", "onnx"])
def test_the_tokenizer_is_in_the_models_folder_or_around_onnx(tmp_path: Path, place: str) -> None:
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / "tokenizer.json").touch()
    assert folder_near(tmp_path / place / "model.onnx") == tmp_path
    assert folder_near(b"", tmp_path / place) == tmp_path
    (tmp_path / "other").mkdir()
    assert folder_near(tmp_path / "other" / "model.onnx", b"a model in memory") is None


def test_text_without_any_tokenizer_says_what_is_missing(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "x.txt"
    text.write_text("one\ntwo\n")
    result = run("verify", folder, folder, "--data", text)
    assert_one_line(
        result, 2, "needs a tokenizer", "--tokenizer", "the model's own folder has none"
    )


def test_json_of_bench_takes_a_file_or_nothing(folder: Path, tmp_path: Path) -> None:
    (found,) = json.loads(run("bench", "--json", folder, *QUICK).stdout)
    assert len(found["models"]) == 1
    for name in ("--json", "--json=-"):
        assert json.loads(run("bench", folder, *QUICK, name).stdout)
    file = tmp_path / "figures.json"
    assert "model.onnx" in run("bench", "--json", file, folder, *QUICK).stdout
    assert json.loads(file.read_text())[0]["models"]
    assert_one_line(run("bench", folder, "--json", "figures.txt"), 2, "expected a .json file or -")


def number_of_batches(_feeds: Sequence[Batch], outputs: Sequence[Batch]) -> float:
    """A metric: how many batches there are."""
    return float(len(outputs))


def test_verify_measures_a_metric_of_both(model: Path, data: Path) -> None:
    found = qcompile.verify(model, model, data, metric=number_of_batches)
    assert found.metric is not None and found.metric.reference == found.metric.compiled > 0
    gates = qcompile.Gates(min_metric=1e6)
    assert not qcompile.verify(model, model, data, metric=number_of_batches, gates=gates).passed
    with pytest.raises(RecipeError, match="--min-metric needs a --metric"):
        qcompile.verify(model, model, data, gates=gates)
    assert_one_line(
        run("verify", model, model, "--data", data, "--metric", "labels"), 2, "labelled"
    )


def test_inspect_wraps_no_names_without_a_terminal(tmp_path: Path, data: Path) -> None:
    proto = onnx.load(save_encoder(tmp_path / "long.onnx"))
    long = "a_name_of_a_weight_that_is_longer_than_any_terminal_is_wide." * 4
    old = proto.graph.initializer[0].name
    proto.graph.initializer[0].name = long
    for node in proto.graph.node:
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = long
    onnx.save(proto, tmp_path / "long.onnx")
    assert long in run("inspect", tmp_path / "long.onnx", "--all").stdout


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """A folder with a model that answers "a" where the only word is a, else "other"."""
    folder = write_folder(tmp_path / "classifier")
    tokens = "int64[batch_size,sequence_length] "
    table = np.zeros((16, 2), np.float32)
    table[:, 1], table[2] = 1, (2, 0)  # the vocabulary is padding, unknown, a, …
    proto = model_proto(
        f"""g ({tokens} input_ids, {tokens} attention_mask) => (float[batch_size,2] logits) {{
            e = Gather(table, input_ids) f = Cast<to = 1>(attention_mask)
            u = Unsqueeze(f, last) m = Mul(e, u) logits = ReduceSum<keepdims = 0>(m, one) }}""",
        table=table,
        last=np.array([2]),
        one=np.array([1]),
    )
    onnx.save(proto, folder / "model.onnx")
    config = {"architectures": ["BertForSequenceClassification"], "id2label": {0: "a", 1: "other"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_verify_compares_labels(classifier: Path, tmp_path: Path) -> None:
    rows = [{"text": w, "label": "a" if w == "a" else "other"} for w in "abcdabcdab"]
    rows[0]["label"] = "other"
    text = tmp_path / "x.jsonl"
    text.write_text("\n".join(map(json.dumps, rows)))
    args = ("verify", classifier, classifier, "--data", text, "--metric", "labels")
    found = run(*args, "--json")
    assert json.loads(found.stdout)["metric"] == {"float": 90, "compiled": 90}, found.output
    assert "reference 90.0000, candidate 90.0000" in run(*args, "--min-metric", 90).stdout
    assert_one_line(run(*args, "--min-metric", 91), 1, "(--min-metric)")
    first = json.loads(run(*args, "--samples", 4, "--json").stdout)  # one of them is wrong
    assert first["metric"] == {"float": 75, "compiled": 75}
