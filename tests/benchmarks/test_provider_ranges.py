"""Ranges of two providers: equal within the bound, and a fault is seen."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from benchmarks import cuda
from benchmarks._provider_ranges import Found, Move, calibrated, in_another_order, moves
from qcompile.data.feeds import Feed
from qcompile.data.synthetic import synthetic_feeds
from qcompile.ir.model_io.read_model import load
from qcompile.quant import Range, Ranges
from qcompile.runtime.session import CPU, CUDA, provider_or_cpu
from tests.encoder_files import save_encoder

NO_GPU = provider_or_cpu(CUDA) != CUDA


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder") / "m.onnx")


@pytest.fixture(scope="module")
def feeds(model: Path) -> list[Feed]:
    return [*synthetic_feeds(load(model), {}, 1, 0, length=8)]


@pytest.fixture(scope="module")
def on_the_cpu(model: Path, feeds: list[Feed]) -> Found:
    return calibrated(model, feeds, "cpu")


def rounded_to_tf32(model: Path, out: Path) -> Path:
    """Matrices with 11 bits of mantissa."""
    proto = onnx.load(model)
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2:
            bits = numpy_helper.to_array(tensor).copy().view(np.uint32) + np.uint32(1 << 12)
            kept = (bits & np.uint32(0xFFFFE000)).view(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(kept, tensor.name))
    onnx.save(proto, out)
    return out


def test_another_order_of_sums_is_within_the_bound(
    model: Path, feeds: list[Feed], on_the_cpu: Found, tmp_path: Path
) -> None:
    other = calibrated(in_another_order(model, tmp_path / "o.onnx"), feeds, "cpu")
    found = moves(on_the_cpu, other)
    assert len(found) > 10 and 0 < found[0].share < on_the_cpu.bound < 1e-4


def test_tf32_is_beyond_the_bound(
    model: Path, feeds: list[Feed], on_the_cpu: Found, tmp_path: Path
) -> None:
    other = calibrated(rounded_to_tf32(model, tmp_path / "t.onnx"), feeds, "cpu")
    assert moves(on_the_cpu, other)[0].share > on_the_cpu.bound


def test_a_wider_end_and_a_missing_range_are_seen(on_the_cpu: Found) -> None:
    names = sorted(on_the_cpu.ranges.found)
    changed, span = dict(on_the_cpu.ranges.found), on_the_cpu.ranges.found[names[0]]
    changed[names[0]] = Range(span.lo, span.hi * np.float32(1.01), span.axis)
    del changed[names[1]]
    first, second, *others = moves(on_the_cpu, replace(on_the_cpu, ranges=Ranges(changed)))
    assert first == Move(names[1], math.inf)
    assert second.tensor == names[0] and second.share > on_the_cpu.bound
    assert others and not any(move.share for move in others)


def test_the_command_prints_the_largest_difference_and_fails_beyond_the_bound(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    figures = tmp_path / "figures.json"
    small = ["--batches", "1", "--length", "8", "--provider", CPU]
    command = ["cuda", str(model), "--ranges", *small]
    monkeypatch.setattr(sys, "argv", [*command, "--json", str(figures)])
    cuda.main()
    assert "ranges; the largest difference is" in capsys.readouterr().out
    found = json.loads(figures.read_text(encoding="utf-8"))
    assert found["moves"][0]["share"] < found["bound"]
    monkeypatch.setattr(cuda, "in_another_order", rounded_to_tf32)
    with pytest.raises(SystemExit, match="ranges differ by more than the bound"):
        cuda.main()


@pytest.mark.skipif(NO_GPU, reason="no GPU that ONNX Runtime's CUDA provider runs on")
def test_ranges_of_a_gpu_are_within_the_bound(
    model: Path, feeds: list[Feed], on_the_cpu: Found
) -> None:
    assert moves(on_the_cpu, calibrated(model, feeds, "cuda"))[0].share < on_the_cpu.bound
