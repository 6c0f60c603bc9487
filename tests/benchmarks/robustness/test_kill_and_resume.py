"""kill_and_resume.py on a small model: killed at three points, the same bytes each time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.command_line import ROOT, run_module
from tests.encoder_files import save_encoder

SCRIPT = "benchmarks.robustness.kill_and_resume"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_encoder(tmp_path / "m.onnx", layers=1, outlier=1)


def test_three_points(model: Path, data: Path) -> None:
    options = ("--data", data, "--no-bench", "--no-verify", "--threads", 1)
    done = run_module(SCRIPT, model, "--points", 3, "--", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 resume to the same bytes" in done.stdout
    assert all(name in done.stdout for name in ("SIGKILL", "SIGTERM", "SIGINT"))


def test_it_sees_other_bytes(model: Path, data: Path, tmp_path: Path) -> None:
    """Data that change from run to run: what is resumed cannot be what was not disturbed."""
    (tmp_path / "own_feeds.py").write_text(
        "import numpy as np, time\n"
        "def feeds():\n"
        "    rng = np.random.default_rng(time.time_ns())\n"
        "    for _ in range(8):\n"
        "        ids = rng.integers(0, 64, (2, 7))\n"
        "        yield {'ids': ids, 'attention_mask': np.ones_like(ids)}\n"
    )
    options = ("--data", "own_feeds:feeds", "--no-bench", "--no-verify", "--threads", 1)
    path = os.pathsep.join((str(ROOT), str(tmp_path)))
    done = run_module(SCRIPT, model, "--points", 1, "--", *options, path=path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "other bytes" in done.stdout and "0 of 1 resume" in done.stdout


def test_a_build_that_fails_by_itself_is_no_result(model: Path) -> None:
    done = run_module(SCRIPT, model, "--", "--data", "nowhere.npz")
    assert done.returncode == 2 and "nothing to compare with" in done.stderr
