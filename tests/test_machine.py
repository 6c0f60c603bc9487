"""What a report says of the machine."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from qcompile import machine
from qcompile.machine import describe, instruction_sets


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

    monkeypatch.setattr(machine, "version", version)
    found = describe()
    assert (found["onnxruntime"], found["numpy"], found["onnx"]) == ("1.0", "1.0", "unknown")
