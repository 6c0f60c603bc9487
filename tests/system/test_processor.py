"""What a report says of the machine, and how memory goes back to it."""

from __future__ import annotations

import io
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import psutil
import pytest
from archspec.cpu import detect

from qcompile.system import processor
from qcompile.system.memory import release_memory
from qcompile.system.processor import describe_environment, instruction_sets


@pytest.fixture
def _other_machine() -> Iterator[None]:
    detect._machine.cache_clear()
    detect._darwin_sysctl_data.cache_clear()
    yield
    detect._machine.cache_clear()
    detect._darwin_sysctl_data.cache_clear()


@pytest.mark.usefixtures("_other_machine")
@pytest.mark.parametrize(
    ("machine", "text", "expected"),
    [
        ("x86_64", "flags : fpu avx2 avx512f avx512_vnni\n", ["AVX512-VNNI", "AVX512F", "AVX2"]),
        ("x86_64", "flags\t: avx2 amx_int8 avx_vnni\n", ["AMX-INT8", "AVX-VNNI", "AVX2"]),
        ("aarch64", "Features\t: fp asimddp i8mm\n", ["I8MM", "DOTPROD"]),
        ("x86_64", "model name\t: avx2\n", []),
        ("x86_64", None, []),
    ],
)
def test_linux(
    monkeypatch: pytest.MonkeyPatch, machine: str, text: str | None, expected: list[str]
) -> None:
    def read(_: str) -> io.StringIO:
        if text is None:
            raise FileNotFoundError
        return io.StringIO(text)

    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(detect, "open", read, raising=False)
    assert instruction_sets() == expected


@pytest.mark.usefixtures("_other_machine")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("machdep.cpu.brand_string: Apple M1 Pro\n", ["DOTPROD"]),
        ("machdep.cpu.brand_string: Apple M2\n", ["I8MM", "DOTPROD"]),
        (
            "machdep.cpu.brand_string: Intel(R) Core(TM) i5\nmachdep.cpu.features: SSE4.2 AVX1.0\n"
            "machdep.cpu.leaf7_features: AVX2 AVX512F\n",
            ["AVX512F", "AVX2"],
        ),
    ],
)
def test_macos(monkeypatch: pytest.MonkeyPatch, text: str, expected: list[str]) -> None:
    """As sysctl prints it there."""
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(detect, "_check_output", lambda *_, **__: text)
    assert instruction_sets() == expected


@pytest.mark.usefixtures("_other_machine")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="not x86")
def test_windows_asks_the_processor_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The instruction cpuid works on any system; what it says agrees with Linux, if this is."""
    expected = instruction_sets()
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    monkeypatch.setattr(platform, "machine", lambda: "AMD64")
    detect._machine.cache_clear()
    assert instruction_sets() == expected


@pytest.mark.usefixtures("_other_machine")
def test_windows_on_arm_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    monkeypatch.setattr(platform, "machine", lambda: "ARM64")
    assert instruction_sets() == []


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
    monkeypatch.delattr(psutil, "heap_trim", raising=False)
    release_memory()


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
