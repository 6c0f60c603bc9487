"""Mapped files: views, not copies, whose memory is given back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qcompile.system import memory_map
from qcompile.system.memory_map import MappedFile

SIZE = 1 << 24


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_views_are_read_only_and_stay_valid_without_memory(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    file = MappedFile(path)
    view = file.view(256, SIZE - 256)
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    start = resident()
    before = view.sum()  # looks at all of it, keeps nothing
    grown = resident() - start
    file.drop()
    assert grown > 0.9 * SIZE and resident() - start < 0.2 * SIZE
    assert view.sum() == before


def test_pages_are_dropped_as_views_are_handed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(SIZE))
    monkeypatch.setattr(memory_map, "_KEPT", SIZE // 4)
    file, start = MappedFile(path), resident()
    step = SIZE // 16
    for offset in range(0, SIZE, step):
        file.view(offset, step).sum()
    assert resident() - start < SIZE // 2


def test_empty_files(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    file = MappedFile(tmp_path / "f")
    assert (file.size, file.data, file.view(0, 0).size) == (0, b"", 0)
    file.drop()


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        MappedFile(tmp_path / "none")
