"""Embeddings from the compiled model: those of the float model, pooled outside."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import pytest

import qcompile
from qcompile import Recipe
from qcompile.compiler.config.recipe import merge_settings
from qcompile.compiler.stages.options import CompileOptions
from qcompile.errors import RecipeError
from qcompile.ir.pooling import PoolingKind
from qcompile.quant import Array
from qcompile.runtime.session import Session, SessionOptions
from qcompile.targets.target import Mode
from tests.command_line import assert_one_line, run
from tests.encoder_files import token_feeds

FAST = CompileOptions(bench=False)
THREAD = SessionOptions(threads=1)


def outputs(path: Path, feed: dict[str, Array]) -> dict[str, Array]:
    return Session(path, THREAD).run(feed)


def means(states: Array, mask: Array) -> Array:
    marks = mask[..., None].astype(np.float32)
    found = (states * marks).sum(1) / marks.sum(1)
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True))


@pytest.mark.parametrize("mode", ["float", "dynamic"])
def test_pooling_inside_equals_pooling_outside(model: Path, tmp_path: Path, mode: Mode) -> None:
    """Of one compiled model with states and another with embeddings: the same integers inside."""
    states, embeddings = tmp_path / "states.onnx", tmp_path / "embeddings.onnx"
    qcompile.compile(model, mode=mode, options=FAST).save(states)
    result = qcompile.compile(model, mode=mode, pooling="mean", normalize=True, options=FAST)
    result.save(embeddings)
    (feed,) = token_feeds(1, padded=(1, 3))
    found = outputs(embeddings, feed)
    assert list(found) == ["sentence_embedding"]
    expected = means(outputs(states, feed)["out"], feed["attention_mask"])
    # Sums of at most 7 values of a vector of length 1, in another order.
    np.testing.assert_allclose(found["sentence_embedding"], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("target", "kind"), [("cpu", "mean"), ("cpu", "max"), ("qdq", "mean"), ("tensorrt", "cls")]
)
def test_static_models_are_compared_with_the_pooled_float_model(
    model: Path, target: str, kind: PoolingKind
) -> None:
    data = token_feeds(padded=(1, 3))
    result = qcompile.compile(
        model, data, target=target, pooling=kind, options=replace(FAST, force=True)
    )
    verdict = result.report.verdict
    assert verdict is not None
    (output,) = verdict.outputs
    assert output.name == "sentence_embedding" and output.flip_share is None
    assert output.mean_cosine > 0.98


def test_the_digest_and_the_lock_know_the_pooling(model: Path, data: Path, tmp_path: Path) -> None:
    plain = Recipe(mode="dynamic")
    pooled = replace(plain, pooling="mean")
    assert len({r.digest() for r in (plain, pooled, replace(pooled, normalize=True))}) == 3
    arguments = [str(model), "--pooling", "max", "--normalize", "--no-bench", "-q"]
    out, again, lock = (str(tmp_path / n) for n in ("a.onnx", "b.onnx", "lock.yaml"))
    command = ["compile", *arguments, "--data", str(data), "--force", "-o", out, "--lock", lock]
    assert run(*command).exit_code == 0
    command = ["compile", str(model), "--recipe", lock, "-q", "-o", again]
    assert run(*command).exit_code == 0
    assert Path(out).read_bytes() == Path(again).read_bytes()


def test_verify_pools_what_is_not_pooled(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    qcompile.compile(model, mode="dynamic", pooling="mean", options=FAST).save(out)
    verdict = qcompile.verify(model, out, data, pooling="mean")
    assert verdict.passed and [o.name for o in verdict.outputs] == ["sentence_embedding"]
    command = ["verify", str(model), str(out), "--data", str(data)]
    words = ("is missing in the candidate, which returns 'sentence_embedding'", "--pooling")
    assert_one_line(run(*command), 2, *words)
    assert run(*command, "--pooling", "mean").exit_code == 0
    # Another pooling is another embedding: the comparison would see it.
    assert run(*command, "--pooling", "cls").exit_code == 1


def test_normalize_needs_a_pooling() -> None:
    with pytest.raises(RecipeError, match="normalize is for embeddings"):
        Recipe(normalize=True)


def test_auto_is_for_folders(model: Path) -> None:
    with pytest.raises(RecipeError, match="pooling auto is for folders"):
        qcompile.compile(model, recipe=Recipe(pooling="auto"))


@pytest.mark.parametrize("kind", ["auto", ""])
def test_verify_takes_no_pooling_without_a_meaning(model: Path, data: Path, kind: str) -> None:
    with pytest.raises(RecipeError, match="expected one of mean, cls"):
        qcompile.verify(model, model, data, pooling=cast(PoolingKind, kind))


def test_unknown_pooling() -> None:
    with pytest.raises(RecipeError, match="unknown pooling 'means', did you mean 'mean'"):
        merge_settings(Recipe(), {"pooling": "means"}, "here")


def test_a_float16_output_is_pooled_too(model: Path) -> None:
    proto = onnx.load(model)
    node = proto.graph.node.add(op_type="Cast", input=["out"], output=["last_hidden_state"])
    node.attribute.append(onnx.helper.make_attribute("to", onnx.TensorProto.FLOAT16))
    proto.graph.output[0].name = "last_hidden_state"
    proto.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    result = qcompile.compile(proto, mode="dynamic", pooling="mean", options=FAST)
    assert result.report.verdict is not None
    assert result.report.verdict.outputs[0].name == "sentence_embedding"
