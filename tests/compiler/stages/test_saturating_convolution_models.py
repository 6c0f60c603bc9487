"""Convolutions whose neighbouring weights have one sign, on bright images, from end to end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import qcompile
from qcompile import Gates, Options
from qcompile.commands.cli import main
from qcompile.compiler.config.recipe import Recipe
from qcompile.compiler.stages.result import Result
from qcompile.compiler.stages.saturation_check import IntegerSums
from qcompile.quant import Array
from qcompile.rewriting.testing import model_proto
from qcompile.runtime import session as runtime
from qcompile.runtime.session import SessionOptions

LOOSE = Gates(min_cosine=None, min_worst_cosine=None, max_latency_ratio=None)


def cnn() -> onnx.ModelProto:
    """A smoothing 3x3 convolution, then a 1x1 one of which half the weights are negative."""
    rng = np.random.default_rng(0)
    mixing = np.abs(rng.normal(1, 0.1, (8, 16, 1, 1)))
    mixing[:, 8:] *= -1
    return model_proto(
        """g (float[n,3,h,w] x) => (float[n,8,h,w] y) {
          c = Conv<pads = [1, 1, 1, 1]>(x, first, b)
          r = Relu(c)
          m = Conv(r, second, e)
          y = Tanh(m) }""",
        first=rng.uniform(0.02, 0.05, (16, 3, 3, 3)).astype(np.float32),
        second=mixing.astype(np.float32),
        b=np.zeros(16, np.float32),
        e=np.zeros(8, np.float32),
    )


def images() -> Array:
    rng = np.random.default_rng(1)
    return rng.uniform(0.7, 1, (12, 3, 6, 6)).astype(np.float32)


def compiled(model: onnx.ModelProto | bytes, recipe: Recipe, gates: Gates = LOOSE) -> Result:
    feeds = [{"x": one[None]} for one in images()]
    return qcompile.compile(model, feeds, recipe=recipe, gates=gates, options=Options(bench=False))


def both_outputs(model: bytes) -> list[Array]:
    """With exact sums, and as x86 without VNNI computes them, there or emulated."""
    options = SessionOptions(threads=1)
    sums = IntegerSums(model)
    return [sums.runner(k, options).run({"x": images()})["y"] for k in ("exact", "saturating")]


@pytest.mark.parametrize("target", ["cpu", "qdq"])
def test_the_promise_is_kept_by_default_and_not_given_for_vnni(target: str) -> None:
    for isa, same in (("", True), ("avx2", True), ("avx512-vnni", False)):
        result = compiled(cnn(), Recipe(target=target, isa=isa))
        said = result.report.to_dict()["saturation"]
        exact, saturating = both_outputs(result.model)
        assert said["linears"] == 2 and said["same_without_vnni"] == same
        assert bool((exact == saturating).all()) == same


@pytest.mark.parametrize("target", ["cpu", "qdq"])
def test_what_came_saturating_is_as_it_was_and_the_remedy_is_named(
    target: str, tmp_path: Path
) -> None:
    """Compiled for VNNI, it comes in again: on x86 without it, both saturate alike."""
    made = compiled(cnn(), Recipe(target=target, isa="avx512-vnni")).model
    report = compiled(made, Recipe(target=target), Gates(min_cosine=0.9999)).report
    [note] = [n.text for n in report.notes if n.code == "saturation"]
    assert "2 of 2 int8 operators" in note and "isa: avx2" in note and runtime.EXACT_SUMS[0] in note
    (tmp_path / "m.onnx").write_bytes(made)
    np.savez(tmp_path / "x.npz", x=images())
    files = [str(tmp_path / "m.onnx"), "-o", str(tmp_path / "o.onnx")]
    given = ["--data", str(tmp_path / "x.npz"), "--target", target, "--min-cosine", "0.9999"]
    shown = CliRunner().invoke(main, ["compile", *files, *given, "--no-bench"])
    assert shown.exit_code == 0 and "isa: avx2" in " ".join(shown.output.split())


def test_convolutions_for_a_gpu_are_not_judged_as_x86_runs_them() -> None:
    report = compiled(cnn(), Recipe(target="tensorrt")).report
    assert report.saturation is not None and report.saturation.advice == ""
    assert report.verdict is not None and report.verdict.sums == "exact"
