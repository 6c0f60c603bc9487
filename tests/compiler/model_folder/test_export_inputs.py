"""Models that take more than three inputs of tokens, or are one part of a larger model.

All need the extra ``export``; CI has none, so they skip there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from qcompile.compiler.model_folder import layout, torch_export
from qcompile.compiler.model_folder.torch_parity import TOLERANCE
from qcompile.errors import ModelError
from tests.command_line import assert_one_line, run
from tests.compiler.model_folder.test_torch_export import needs_optimum, needs_torch

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 64, "vocab_size": 90}  # fmt: skip
TOKENS = ["input_ids", "attention_mask"]


def save(folder: Path, name: str, config: str, **values: Any) -> Path:
    """A model of transformers with random weights, as a folder without a tokenizer."""
    import torch
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, config)(**values)
    model = getattr(transformers, name)(made)
    for parameter in model.parameters():  # positions and boxes weigh as much as tokens
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def interface(folder: Path) -> tuple[list[str], list[str]]:
    graph = onnx.load(folder / "model.onnx").graph
    return [t.name for t in graph.input], [t.name for t in graph.output]


def export(source: Path, out: Path, *options: object) -> dict[str, Any]:
    result = run("export", source, "-o", out, "--json", *options)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)["export"]
    assert found["parity"]["worst"] < TOLERANCE
    return found


@pytest.fixture
def layoutlm(tmp_path: Path) -> Path:
    values = {**SIZES, "max_position_embeddings": 40}
    return save(tmp_path / "in", "LayoutLMModel", "LayoutLMConfig", **values)


@needs_optimum
def test_boxes_are_kept(layoutlm: Path, tmp_path: Path) -> None:
    assert export(layoutlm, tmp_path / "out")["route"].startswith("optimum-onnx ")
    inputs, _outputs = interface(tmp_path / "out")
    assert sorted(inputs) == sorted([*TOKENS, "bbox", "token_type_ids"])


@needs_torch
def test_torch_keeps_boxes_too(layoutlm: Path, tmp_path: Path) -> None:
    folder = layout.read_folder(layoutlm)
    torch_export.export_folder(folder, tmp_path, routes=(torch_export.by_torch,))
    assert sorted(interface(tmp_path)[0]) == sorted([*TOKENS, "bbox", "token_type_ids"])


@needs_torch
def test_a_route_that_loses_boxes_is_not_taken(layoutlm: Path, tmp_path: Path) -> None:
    def by_loss(source: torch_export.Source, made: Path) -> str:
        torch_export.by_torch(source, made)
        proto = onnx.load(made / "model.onnx")
        (boxes,) = (t for t in proto.graph.input if t.name == "bbox")
        proto.graph.input.remove(boxes)
        onnx.save(proto, made / "model.onnx")
        return "loss"

    with pytest.raises(ModelError, match="loss: the file lost input 'bbox'"):
        torch_export.export_folder(layout.read_folder(layoutlm), tmp_path, routes=(by_loss,))


@needs_torch
def test_boxes_are_dropped_on_request_only(layoutlm: Path, tmp_path: Path) -> None:
    notes = export(layoutlm, tmp_path / "out", "--drop-input", "bbox")["notes"]
    assert notes[0] == "bbox is left at the model's default (--drop-input)"
    assert "bbox" not in interface(tmp_path / "out")[0]
    failed = run("export", layoutlm, "-o", tmp_path / "other", "--drop-input", "box")
    assert_one_line(failed, 2, "LayoutLMModel has no input 'box' to drop; there are: bbox, ")


@needs_torch
def test_an_unknown_input_is_refused_if_it_matters(tmp_path: Path) -> None:
    values = {**SIZES, "max_position_embeddings": 40, "task_type_vocab_size": 3}
    used = save(tmp_path / "used", "ErnieModel", "ErnieConfig", use_task_id=True, **values)
    refused = run("export", used, "-o", tmp_path / "out")
    assert_one_line(refused, 2, "ErnieModel takes task_type_ids, which the exported file would",
                    "qcompile export --drop-input task_type_ids")  # fmt: skip
    export(used, tmp_path / "out", "--drop-input", "task_type_ids")
    export(
        save(tmp_path / "unused", "ErnieModel", "ErnieConfig", use_task_id=False, **values),
        tmp_path / "out",
    )


@needs_torch
def test_the_encoder_of_t5(tmp_path: Path) -> None:
    values = {"vocab_size": 90, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1,
              "num_heads": 2, "decoder_start_token_id": 0}  # fmt: skip
    encoder = save(tmp_path / "encoder", "T5EncoderModel", "T5Config", **values)
    export(encoder, tmp_path / "out")
    assert interface(tmp_path / "out") == (TOKENS, ["last_hidden_state"])
    whole = save(tmp_path / "whole", "T5Model", "T5Config", **values)
    refused = run("export", whole, "-o", tmp_path / "other")
    assert_one_line(refused, 2, "it also takes decoder_input_ids: for T5EncoderModel alone: ")


@needs_optimum
@pytest.mark.parametrize("side", ["right", "left"])
def test_embedders_made_from_decoders(tmp_path: Path, side: str) -> None:
    values = {**SIZES, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 40}
    folder = save(tmp_path / "in", "Qwen3ForCausalLM", "Qwen3Config", **values)
    (folder / "tokenizer_config.json").write_text(json.dumps({"padding_side": side}))
    assert_one_line(run("export", folder, "-o", tmp_path / "out"), 2, "task is unknown")
    (folder / "modules.json").write_text("[]")  # of sentence-transformers
    export(folder, tmp_path / "out")
    assert interface(tmp_path / "out") == ([*TOKENS, "position_ids"], ["last_hidden_state"])


@needs_torch
def test_the_text_tower_of_clip(tmp_path: Path) -> None:
    values = {**SIZES, "max_position_embeddings": 40, "eos_token_id": 2, "projection_dim": 8}
    name = "CLIPTextModelWithProjection"
    export(save(tmp_path / "in", name, "CLIPTextConfig", **values), tmp_path / "out")
    assert interface(tmp_path / "out") == (TOKENS, ["last_hidden_state", "text_embeds"])
    made = onnx.load(tmp_path / "out" / "model.onnx").graph.output[1].type.tensor_type.shape
    assert [d.dim_param or d.dim_value for d in made.dim] == ["batch_size", 8]
    image = {**SIZES, "image_size": 8, "patch_size": 4}
    both = {"text_config": values, "vision_config": image}
    refused = run(
        "export",
        save(tmp_path / "both", "CLIPModel", "CLIPConfig", **both),
        "-o",
        tmp_path / "other",
    )
    assert_one_line(refused, 2, f"for {name} alone: transformers.{name}.from_pretrained(")
