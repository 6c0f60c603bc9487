"""Samples in .npz files are streamed in batches; a file that cannot be used is one clear error."""

from __future__ import annotations

import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompile.data.feeds import InputSpec
from qcompile.data.open_data import open_data
from qcompile.errors import DataError

F32 = np.dtype(np.float32)
X = InputSpec("x", F32, ("batch", 3))


def rows(count: int, start: int = 0) -> np.ndarray[Any, Any]:
    """float32 [count, 3], every value another."""
    return np.arange(start * 3, (start + count) * 3, dtype=np.float32).reshape(count, 3)


def test_npz_is_sliced_into_batches(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, x=rows(19), label=np.arange(19))
    for _ in range(2):
        found = list(open_data(path, [X]))
        assert [len(f["x"]) for f in found] == [8, 8, 3]
        assert np.array_equal(np.concatenate([f["x"] for f in found]), rows(19))
    assert [len(f["x"]) for f in open_data(str(path), [X], batch_size=4, samples=10)] == [4, 4, 2]


def test_npz_in_fortran_order_and_with_a_scalar(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, x=np.asfortranarray(rows(10)), t=np.float32(0.5), w=rows(2).T)
    inputs = [X, InputSpec("t", F32, ()), InputSpec("w", F32, (3, 2))]
    found = list(open_data(path, inputs))
    assert np.array_equal(np.concatenate([f["x"] for f in found]), rows(10))
    assert all(f["t"] == 0.5 and np.array_equal(f["w"], rows(2).T) for f in found)


def test_npz_fixed_batch_is_filled_up_by_repeating(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, x=rows(5))
    fixed = InputSpec("x", F32, (4, 3))
    assert [f["x"][:, 0].tolist() for f in open_data(path, [fixed])] == [[0, 3, 6, 9], [12] * 4]
    with pytest.raises(DataError, match=r"batch size 2 was asked for, expected 4: .* input 'x'"):
        open_data(path, [fixed], batch_size=2)


def test_npz_of_exactly_the_fixed_batch_still_checks_the_size(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=rows(4))
    with pytest.raises(DataError, match="batch size 2 was asked for, expected 4"):
        open_data(tmp_path / "x.npz", [InputSpec("x", F32, (4, 3))], batch_size=2)


def test_npz_of_format_2(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive, archive.open("x.npy", "w") as file:
        np.lib.format.write_array(file, rows(2), version=(2, 0))
    (feed,) = open_data(tmp_path / "x.npz", [X])
    assert np.array_equal(feed["x"], rows(2))


def test_npz_is_streamed(tmp_path: Path) -> None:
    """A stored array of 64 MB is never in memory at once."""
    path = tmp_path / "x.npz"
    np.savez(path, x=np.zeros((64, 1 << 18), np.float32))
    spec = InputSpec("x", F32, ("n", "m"))
    tracemalloc.start()
    count = sum(len(f["x"]) for f in open_data(path, [spec], batch_size=1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 64 and peak < 16e6


def test_folder_of_npz_is_one_feed_a_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "b.npz", x=rows(2, start=7))
    np.savez(tmp_path / "a.npz", x=np.asfortranarray(rows(5)))
    (tmp_path / "notes.md").write_text("not data")
    first, second = open_data(tmp_path, [X])
    assert np.array_equal(first["x"], rows(5))
    assert np.array_equal(second["x"], rows(2, start=7))


def write_npz(path: Path, **arrays: Any) -> None:
    np.savez(path, **arrays)


def truncated_npz(path: Path) -> None:
    np.savez(path, x=rows(9))
    path.write_bytes(path.read_bytes()[:60])


def damaged_npz(path: Path) -> None:
    """The member is shorter than its header says."""
    np.savez(path, x=rows(9))
    with zipfile.ZipFile(path) as archive:
        member = archive.read("x.npy")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", member[:-40])


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda p: None, "does not exist, expected x.npz"),
        (lambda p: p.write_bytes(b"not a zip"), "x.npz: the file cannot be read: File is not a z"),
        (truncated_npz, "x.npz: the file cannot be read"),
        (damaged_npz, "x.npz: an array cannot be read: it is truncated"),
        (lambda p: write_npz(p, x=np.asarray([{}, 1])), "array 'x' cannot be read: .* pickled"),
        (lambda p: write_npz(p, y=rows(1)), "no array for input 'x'; found y, expected x"),
        (lambda p: write_npz(p, x=rows(0)), "x.npz: holds no samples"),
        (lambda p: write_npz(p, x=rows(2).astype(np.float64)), "feed 0, input 'x': found dtype fl"),
    ],
)
def test_npz_that_cannot_be_used(tmp_path: Path, write: Callable[[Path], Any], said: str) -> None:
    path = tmp_path / "x.npz"
    write(path)
    with pytest.raises(DataError, match=said):
        list(open_data(path, [X]))


def test_npz_member_that_is_no_array(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x03\x00 rest")
    with pytest.raises(DataError, match=r"array 'x' cannot be read: its \.npy version"):
        open_data(tmp_path / "x.npz", [X])


def test_npz_arrays_must_agree_on_the_samples(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=rows(4), y=rows(5))
    with pytest.raises(DataError, match="found x 4, y 5 samples, expected as many"):
        open_data(tmp_path / "x.npz", [X, InputSpec("y", F32, ("batch", 3))])


def test_folder_without_npz_and_unknown_form(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.npz files"):
        open_data(tmp_path, [X])
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"of no known format, expected x\.npz"):
        open_data(tmp_path / "x.bin", [X])
