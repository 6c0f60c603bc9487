"""Resident memory, and its peak, which can be set back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qcompile.system import memory

SIZE = 64 << 20


def test_the_peak_stays_when_memory_is_freed() -> None:
    before = memory.resident_memory()
    large = np.ones(SIZE, np.uint8)
    with_it = memory.resident_memory()
    del large
    memory.release_memory()
    after = memory.resident_memory()
    assert with_it.now >= before.now + SIZE // 2
    assert after.peak >= after.now + SIZE // 2


@pytest.mark.parametrize("text", [None, "VmRSS:\t  5 kB\n"])
def test_psutil_is_asked_where_the_system_has_no_such_file(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_SELF", tmp_path)
    if text is not None:
        (tmp_path / "status").write_text(text)
    found = memory.resident_memory()
    assert found.peak >= found.now > SIZE // 4


def test_both_figures_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_SELF", tmp_path)
    (tmp_path / "status").write_text("VmPeak:\t 9 kB\nVmHWM:\t   7 kB\nVmRSS:\t   5 kB\n")
    assert memory.resident_memory() == (5 << 10, 7 << 10)
    memory.reset_peak()
    assert (tmp_path / "clear_refs").read_text() == "5"
