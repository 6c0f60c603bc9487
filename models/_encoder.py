"""Exports a BERT-like encoder to ONNX and checks it, for the recipes in this folder.

It gets the inputs input_ids, attention_mask and token_type_ids (int64, batch_size x
sequence_length) and the output last_hidden_state, the same two axes dynamic, or logits of a
classifier. Every export is run in ONNX Runtime on several shapes, with padding, and compared with
torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models._common import fail, make_folder, need

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUT = "last_hidden_state"
DYNAMIC = {0: "batch_size", 1: "sequence_length"}
SHAPES = ((2, 16), (1, 7), (3, 33))
TOLERANCE = 1e-4
OPSETS = range(14, 26)


def is_classifier(model: Any) -> bool:
    """True for a model with a head on the first position."""
    return type(model).__name__.endswith("ForSequenceClassification")


def output_of(model: Any) -> str:
    """The name of the output."""
    return "logits" if is_classifier(model) else OUTPUT


def output_axes(model: Any) -> dict[int, str]:
    """The dynamic axes of the output."""
    return {0: DYNAMIC[0]} if is_classifier(model) else DYNAMIC


@dataclass(frozen=True)
class Recipe:
    """Exporter, opset, and transformers' implementation of attention."""

    exporter: str = "torchscript"
    opset: int = 17
    attention: str = "sdpa"


def add_recipe_options(parser: argparse.ArgumentParser, default: Recipe) -> None:
    """Adds the options that make a Recipe."""
    parser.add_argument("--exporter", choices=sorted(EXPORTERS), default=default.exporter)
    parser.add_argument(
        "--opset", type=int, default=default.opset, choices=OPSETS, metavar="N", help="14 to 25"
    )
    parser.add_argument("--attention", choices=("eager", "sdpa"), default=default.attention)


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The Recipe that parsed options describe."""
    return Recipe(args.exporter, args.opset, args.attention)


def example(vocabulary: int, batch: int, length: int) -> tuple[Any, Any, Any]:
    """Example inputs: random tokens, with padding at the end of every row but the first."""
    torch = need("torch")
    generator = torch.Generator().manual_seed(batch * 1000 + length)
    ids = torch.randint(0, vocabulary, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, length - 2 * row :] = 0
    types = torch.zeros_like(ids)
    types[:, length // 2 :] = 1
    return ids, mask, types


@contextmanager
def narrow_forward(model: Any) -> Iterator[None]:
    """Hides all but three inputs and one output: tracing transformers 5 fails with the others."""
    original = model.forward

    def forward(input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
        feeds = zip(INPUTS, (input_ids, attention_mask, token_type_ids), strict=True)
        return original(**dict(feeds))[0]

    model.forward = forward
    yield
    del model.forward


def export_torchscript(model: Any, path: Path, recipe: Recipe) -> None:
    """The legacy exporter of torch.onnx, which traces the model."""
    with narrow_forward(model):
        need("torch").onnx.export(
            model,
            example(model.config.vocab_size, *SHAPES[0]),
            str(path),
            dynamo=False,
            opset_version=recipe.opset,
            input_names=list(INPUTS),
            output_names=[output_of(model)],
            dynamic_axes={**dict.fromkeys(INPUTS, DYNAMIC), output_of(model): output_axes(model)},
        )


def export_dynamo(model: Any, path: Path, recipe: Recipe) -> None:
    """The exporter of torch.onnx that goes through torch.export."""
    torch = need("torch")
    need("onnxscript")
    axes = {axis: torch.export.Dim(name) for axis, name in DYNAMIC.items()}
    torch.onnx.export(
        model,
        kwargs=dict(zip(INPUTS, example(model.config.vocab_size, *SHAPES[0]), strict=True)),
        f=str(path),
        dynamo=True,
        opset_version=recipe.opset,
        input_names=list(INPUTS),
        output_names=[output_of(model)],
        dynamic_shapes=dict.fromkeys(INPUTS, axes),
        external_data=False,
        verbose=False,
    )


def export_optimum(model: Any, path: Path, recipe: Recipe) -> None:
    """The function that optimum's main_export calls with the loaded model."""
    need("optimum.exporters.onnx").onnx_export_from_model(
        model=model,
        output=path.parent,
        opset=recipe.opset,
        task="text-classification" if is_classifier(model) else "feature-extraction",
        do_validation=False,
    )


EXPORTERS: dict[str, Callable[[Any, Path, Recipe], None]] = {
    "dynamo": export_dynamo,
    "optimum": export_optimum,
    "torchscript": export_torchscript,
}


def differences(model: Any, path: Path) -> Iterator[float]:
    """The largest absolute difference between torch and ONNX Runtime, shape by shape."""
    torch, runtime = need("torch"), need("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for shape in SHAPES:
        tensors = example(model.config.vocab_size, *shape)
        feeds = {name: tensor.numpy() for name, tensor in zip(INPUTS, tensors, strict=True)}
        with torch.no_grad():
            expected = model(*tensors)[0].numpy()
        found = session.run([output_of(model)], feeds)[0]
        if found.shape != expected.shape:
            fail(f"{path}: output has shape {found.shape}, torch gives {expected.shape}", 1)
        yield float(abs(found - expected).max())


def vary_vectors(model: Any) -> None:
    """Moves biases and LayerNorm gains away from their initial 0 and 1, as training does.

    Equal ones would be exported as a single constant with many Identity nodes.
    """
    torch = need("torch")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=model.config.initializer_range)


def write_encoder(model: Any, dest: Path, recipe: Recipe) -> Path:
    """Exports a transformers encoder to dest/model.onnx with its config.json, and checks it."""
    path = make_folder(dest) / "model.onnx"
    model.eval().config.save_pretrained(dest)
    EXPORTERS[recipe.exporter](model, path, recipe)
    worst = max(differences(model, path))
    if not worst < TOLERANCE:
        fail(f"{path}: differs from torch by {worst:.1e}, at most {TOLERANCE:.0e} expected", 1)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, differs from torch by {worst:.1e} at most")
    return path
