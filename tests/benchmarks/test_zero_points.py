"""benchmarks/zero_points.py: its errors on weights of which they are known, and its table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from benchmarks import zero_points
from qcompile.rewriting.testing import model_proto
from tests.command_line import run_module


def test_weights_on_one_side_need_a_zero_point() -> None:
    """From 0 to 15 steps: all 16 codes at zero point 0, half of them with signed codes."""
    weight = np.random.default_rng(0).integers(0, 16, (64, 8)).astype(np.float32)
    weight[::32] = 15
    assert zero_points.asymmetric_error(weight, 4, 32) < 1e-6
    assert zero_points.symmetric_error(weight, 4, 32) > 1


def test_signed_codes_need_none() -> None:
    codes = np.random.default_rng(0).integers(-8, 8, (70, 8)).astype(np.float32)
    codes[::32] = -8
    # The scale is the best of some shares of the range, half a per cent from the exact one.
    assert zero_points.symmetric_error(codes, 4, 32) < 0.005**2 * np.square(codes).sum() * 4


def test_the_table(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((128, 128)).astype(np.float32)
    proto = model_proto("g (float[n,128] x) => (float[n,128] y) { y = MatMul(x, w) }", w=weight)
    onnx.save(proto, tmp_path / "model.onnx")
    done = run_module("benchmarks.zero_points", tmp_path / "model.onnx", "--bits", 4)
    lines = done.stdout.splitlines()
    errors = [float(cell) for cell in lines[2].split("|")[3:6]]
    assert len(lines) == 3 and errors[2] < errors[1] < errors[0]
