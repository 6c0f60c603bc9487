"""What a report says of the machine, and how memory goes back to it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest

from qcompile.system import memory, processor
from qcompile.system.memory import release_memory
from qcompile.system.processor import describe_environment, instruction_sets


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flags\t: fpu avx2 avx512f avx512_vnni\n", ["AVX512-VNNI", "AVX512F", "AVX2"]),
        ("flags\t: avx2 amx_int8 avx_vnni\nflags\t: none\n", ["AMX-INT8", "AVX-VNNI", "AVX2"]),
        ("Features\t: fp asimddp i8mm\n", ["I8MM", "DOTPROD"]),
        ("model name\t: avx2\n", []),
        (None, []),
    ],
)
def test_instruction_sets(
    monkeypatch: pytest.MonkeyPatch, text: str | None, expected: list[str]
) -> None:
    def read(_: Path) -> str:
        if text is None:
            raise FileNotFoundError
        return text

    monkeypatch.setattr(Path, "read_text", read)
    assert instruction_sets() == expected


def test_versions_of_builds_for_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name in ("onnxruntime-gpu", "numpy"):
            return "1.0"
        raise PackageNotFoundError(name)

    monkeypatch.setattr(processor, "version", version)
    found = describe_environment(["AVX2"])
    assert found.isa == ["AVX2"]
    assert (found.onnxruntime, found.numpy, found.onnx) == ("1.0", "1.0", "unknown")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_freed_memory_goes_back() -> None:
    """Blocks under malloc's threshold for pages of their own, with some between them that stay."""
    size, count = 1 << 16, 1000
    blocks = [np.ones(size, np.uint8) for _ in range(count)]
    full = _resident()
    kept = blocks[::50]
    del blocks
    release_memory()
    assert full - _resident() > size * count / 2  # blocks that reused what was free count less
    assert all(block.all() for block in kept)


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.system.memory.ctypes.CDLL", lambda _: object())
    memory._malloc_trim.cache_clear()
    release_memory()
    assert memory._malloc_trim() is None
    memory._malloc_trim.cache_clear()


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
