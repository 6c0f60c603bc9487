"""A full disk: one line, exit code 2, nothing half written, and the next run gives the same bytes.

On a small tmpfs where this may be mounted, else by a limit on the size of files.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_line import ROOT
from tests.encoder_files import save_encoder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_encoder(tmp_path / "m.onnx", layers=1, outlier=1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for 40 kB, less than the model, its report and a lock take."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        done = False
    if not done:
        pytest.skip("no tmpfs may be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def compiled(
    model: Path,
    data: Path,
    out: Path,
    *more: object,
    limit: int | None = None,
    scratch: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """The command, with files of at most ``limit`` bytes."""

    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    if scratch is not None:
        env["TMPDIR"] = str(scratch)
    options = ("-o", out, "--data", data, "--threads", 1, "--no-bench", "--no-verify", *more)
    args = [sys.executable, "-m", "qcompile.commands.cli", "compile", model, *options]
    given = list(map(str, args))
    return subprocess.run(
        given, env=env, capture_output=True, text=True, check=False, preexec_fn=limited
    )


def assert_one_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    *stages, line = done.stderr.strip().splitlines()
    assert not any("error" in stage for stage in stages)
    assert line.startswith("error: ") and all(word in line for word in words), line


def whole(model: Path, data: Path) -> bytes:
    out = model.with_name("whole.onnx")
    done = compiled(model, data, out, "--no-cache")
    assert done.returncode == 0, done.stderr
    return out.read_bytes()


def test_no_room_for_the_output(model: Path, data: Path, small_disk: Path) -> None:
    out, cache = small_disk / "out.onnx", model.with_name("cache")
    out.write_bytes(b"precious")
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 24_000)
    done = compiled(model, data, out, "--cache", cache)
    assert_one_line(done, "cannot write", "No space left")
    assert out.read_bytes() == b"precious"
    assert not list(small_disk.glob(".*")) and len(list(cache.iterdir())) == 1
    filler.unlink()
    done = compiled(model, data, out, "--cache", cache, "--report", model.with_name("r.json"))
    assert done.returncode == 0 and "taken from an earlier run" in done.stdout
    assert out.read_bytes() == whole(model, data) and not list(cache.iterdir())


def test_no_room_for_temporary_files(model: Path, data: Path, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(b"x" * 32_000)
    out = model.with_name("out.onnx")
    done = compiled(model, data, out, scratch=small_disk)
    assert_one_line(done, "TMPDIR", "No space left")
    assert not out.exists() and {p.name for p in small_disk.iterdir()} <= {"filler", ".ses"}


def test_no_room_for_the_cache_is_a_note(model: Path, data: Path, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(b"x" * 36_000)
    out = model.with_name("out.onnx")
    done = compiled(model, data, out, "--cache", small_disk / "cache")
    assert done.returncode == 0, done.stderr
    assert "nothing is kept for a run after an interrupt" in done.stdout
    assert out.read_bytes() == whole(model, data)


@pytest.mark.parametrize("limit", [100, 4_000, 12_000])
def test_files_that_may_not_grow(model: Path, data: Path, limit: int) -> None:
    """Weights for calibration, the runtime's own file, or the output: whichever comes first."""
    out, scratch = model.with_name("out.onnx"), model.with_name("scratch")
    scratch.mkdir()
    done = compiled(model, data, out, limit=limit, scratch=scratch)
    assert_one_line(done)
    assert not out.exists() and not list(out.parent.glob(".*"))
    assert {p.name for p in scratch.iterdir()} <= {".ses"}
    assert compiled(model, data, out).returncode == 0
    assert out.read_bytes() == whole(model, data)
