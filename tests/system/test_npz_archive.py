"""Archives: equal contents are equal bytes; what is damaged or hostile is one clear error."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qcompile.errors import DataError
from qcompile.quant import Array
from qcompile.system import npz_archive

KIND = "test archive"
MANIFEST = {"format": KIND, "version": 1, "names": ["ü", "a/b"]}
ARRAYS: dict[str, Array] = {
    "a/0": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array(7.5),
    "c": np.zeros((0, 4), np.uint64),
}


def packed() -> bytes:
    stream = io.BytesIO()
    npz_archive.write_archive(stream, MANIFEST, ARRAYS.items())
    return stream.getvalue()


def test_what_is_written_is_read_and_equal_contents_are_equal_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(packed())
    assert packed() == path.read_bytes()
    manifest, arrays = npz_archive.read_archive(path, KIND, 1)
    assert manifest == MANIFEST and list(arrays) == list(ARRAYS)
    for name, values in ARRAYS.items():
        assert arrays[name].dtype == values.dtype
        np.testing.assert_array_equal(arrays[name], values)
    with np.load(path) as plain:  # it is an .npz for everybody else too
        np.testing.assert_array_equal(plain["a/0"], ARRAYS["a/0"])


def zipped(members: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", how) as made:
        for name, data in members.items():
            made.writestr(name, data)
    return stream.getvalue()


def manifest(**changes: object) -> bytes:
    return json.dumps({**MANIFEST, **changes}).encode()


def npy(header: str) -> bytes:
    text = header.encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def pickled() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return stream.getvalue()


ENDLESS = "{'descr': '<f4', 'fortran_order': False, 'shape': (1152921504606846976,), }"
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "no zip": (lambda: b"not a zip", "not a zip file"),
    "empty": (lambda: b"", "not a zip file"),
    "no manifest": (lambda: zipped({"a.npy": b""}), "manifest.json"),
    "other format": (lambda: zipped({"manifest.json": manifest(format="x")}), "its format is 'x'"),
    "other version": (lambda: zipped({"manifest.json": manifest(version=9)}), "its version is 9"),
    "a list": (lambda: zipped({"manifest.json": b"[]"}), "indices must be integers"),
    "no json": (lambda: zipped({"manifest.json": b"\xff"}), "can't decode"),
    "compressed": (
        lambda: zipped({"manifest.json": manifest()}, zipfile.ZIP_DEFLATED), "it is compressed"
    ),
    "pickle": (
        lambda: zipped({"manifest.json": manifest(), "a.npy": pickled()}), "Object arrays"
    ),
    "endless": (
        lambda: zipped({"manifest.json": manifest(), "a.npy": npy(ENDLESS)}), "cannot be read"
    ),
    "no header": (
        lambda: zipped({"manifest.json": manifest(), "a.npy": npy("__import__('os')")}),
        "cannot be read",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_one_error(tmp_path: Path, name: str) -> None:
    make, said = HOSTILE[name]
    path = tmp_path / "x.npz"
    path.write_bytes(make())
    with pytest.raises(DataError, match="cannot be read as a test archive") as caught:
        npz_archive.read_archive(path, KIND, 1)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_the_same_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        npz_archive.read_archive(tmp_path / "none.npz", KIND, 1)


def test_every_truncation_and_most_flipped_bits_are_seen(tmp_path: Path) -> None:
    """What is flipped in a time stamp or a name's flags changes nothing that is read."""
    whole, path = packed(), tmp_path / "x.npz"
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError):
            npz_archive.read_archive(path, KIND, 1)
    for at in range(0, len(whole), 5):
        flipped = bytearray(whole)
        flipped[at] ^= 0x10
        path.write_bytes(bytes(flipped))
        try:
            found, arrays = npz_archive.read_archive(path, KIND, 1)
        except DataError:
            continue
        assert found == MANIFEST
        for name in arrays.keys() & ARRAYS.keys():
            np.testing.assert_array_equal(arrays[name], ARRAYS[name])


def test_members_that_claim_more_than_the_file_holds_are_refused(tmp_path: Path) -> None:
    """Overlapping members would make a small file a large one."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as made:
        made.writestr("manifest.json", manifest())
        made.writestr("a.npy", b"x" * 100_000)
        first = made.getinfo("a.npy")
        for i in range(50):
            copy = zipfile.ZipInfo(f"b{i}.npy")
            copy.header_offset, copy.CRC = first.header_offset, first.CRC
            copy.file_size = copy.compress_size = first.file_size
            made.filelist.append(copy)
    path = tmp_path / "x.npz"
    path.write_bytes(stream.getvalue())
    with pytest.raises(DataError, match="claim more bytes"):
        npz_archive.read_archive(path, KIND, 1)
