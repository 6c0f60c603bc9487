"""The Python entry point of training: what ``qcompile train`` does, as a function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qcompile.compiler.config import lockfile
from qcompile.compiler.config.recipe import Recipe, merge_settings
from qcompile.compiler.model_folder.model_file import compile_one
from qcompile.compiler.progress import Callback, shown_progress
from qcompile.compiler.stages.options import CompileOptions, Request, TrainingOptions
from qcompile.compiler.stages.result import Result
from qcompile.planning.context import WeightBits
from qcompile.runtime.evaluation.closeness import Gates
from qcompile.runtime.session import custom_operators
from qcompile.system.progress import Progress


def train(
    model: str | Path,
    training: TrainingOptions,
    *,
    target: str | None = None,
    weight_bits: WeightBits | None = None,
    embedding_bits: WeightBits | None = None,
    weight_block: int | None = None,
    seed: int | None = None,
    recipe: Recipe | str | Path | None = None,
    gates: Gates | None = None,
    options: CompileOptions | None = None,
    custom_ops: Sequence[str | Path] = (),
    progress: Progress | Callback | None = None,
) -> Result:
    """Train a model with the target's quantizers in the loop, and compile it.

    ``model``: a transformers folder with one model, whose config.json names the task, or an .onnx
    file with ``options.tokenizer``, a folder that has the same files. ``training``: the texts, and
    how long to learn from them. ``gates`` without a value are those of ``compile`` where the float
    model is the teacher, else only those on size, latency and in the recipe: a model that learned
    from labels need not be close to the float one. Other settings are those of ``compile``. Needs
    torch (extra ``train``).

    Raises TrainingError where an operator cannot be trained or torch is missing, and what
    ``compile`` raises; RejectedError also where the metric drops by more than
    ``training.max_drop`` points.
    """
    settings = {
        "target": target,
        "weight_bits": weight_bits,
        "embedding_bits": embedding_bits,
        "weight_block": weight_block,
        "seed": seed,
    }
    chosen = merge_settings(lockfile.recipe_of(recipe), settings, "train()")
    usual = Gates() if training.distill else Gates().without_defaults()
    request = Request(
        Path(model),
        str(training.data),
        recipe=chosen,
        gates=gates or chosen.make_gates(usual),
        options=replace(options or CompileOptions(), training=training),
    )
    with custom_operators(custom_ops), shown_progress(progress) as shown:
        result = compile_one(replace(request, progress=shown))
    request.options.forget()
    return result
