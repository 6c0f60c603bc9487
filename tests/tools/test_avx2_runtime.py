"""The copy of onnxruntime with AVX2 kernels: which bytes change, and every reason for no copy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qcompile.runtime import session
from qcompile.system import processor
from tools import avx2_runtime
from tools.avx2_runtime import NoCopyError, without_avx512, write_copy

XCR0 = ("31c90f01d0", "31c98d4107"), ("33c90f01d0", "33c98d4107")
OTHERS = (
    ("b9000000000f01d0", "b9000000008d4107"),
    (
        "b807000000b9010000000fa2",
        "b807000000b9ff0000000fa2",
    ),
)


@pytest.mark.parametrize(("found", "instead"), [*XCR0, *OTHERS])
def test_a_question_to_the_processor_becomes_another_of_the_same_length(
    found: str, instead: str
) -> None:
    library = bytes.fromhex(f"90{found}c3{found}")
    assert without_avx512(library) == (bytes.fromhex(f"90{instead}c3{instead}"), 2)


def test_the_same_bytes_inside_another_instruction_stay() -> None:
    library = bytes.fromhex("83e0010f01d0 b80700000031c90fa2")  # and with another leaf or subleaf
    assert without_avx512(library) == (library, 0)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package whose library reads XCR0 once and XCR0's bytes occur in a Python file too."""
    folder = tmp_path / "site" / "onnxruntime"
    (folder / "capi" / "__pycache__").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "capi" / "lib.so.1.0").write_bytes(bytes.fromhex("31c90f01d0c3"))
    (folder / "capi" / "other.so").write_bytes(b"none")
    return folder


def answer(monkeypatch: pytest.MonkeyPatch, status: int, error: str = "") -> None:
    """Let the probe of the copy end with a status."""

    def run(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], status, stderr=error)

    monkeypatch.setattr(subprocess, "run", run)


def test_the_copy_is_changed_and_the_package_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: Path
) -> None:
    answer(monkeypatch, 0)
    before = (package / "capi" / "lib.so.1.0").read_bytes()
    folder = tmp_path / "a" / "copy"
    assert write_copy(folder, package) == {"lib.so.1.0": 1}
    assert (package / "capi" / "lib.so.1.0").read_bytes() == before
    made = folder / "onnxruntime"
    assert (made / "capi" / "lib.so.1.0").read_bytes() == bytes.fromhex("31c98d4107c3")
    assert (made / "capi" / "other.so").read_bytes() == b"none" and (made / "__init__.py").exists()
    assert [p.name for p in folder.iterdir()] == ["onnxruntime"]
    with pytest.raises(NoCopyError, match="onnxruntime exists: remove it, or name another folder"):
        write_copy(folder, package)
    with pytest.raises(NoCopyError, match="exists: remove it"):
        write_copy(package.parent, package)  # the installed package itself


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (avx2_runtime._EXACT, "a warning", "sums are exact in the copy too"),
        (
            1,
            "Traceback\n  a line\nImportError: no symbol\n",
            "does not run: ImportError: no symbol",
        ),
        (-4, "", "does not run: exit status -4"),
    ],
)
def test_nothing_is_left_of_a_copy_without_avx2_kernels(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    package: Path,
    status: int,
    error: str,
    message: str,
) -> None:
    answer(monkeypatch, status, error)
    with pytest.raises(NoCopyError, match=message):
        write_copy(tmp_path / "new", package)
    assert not (tmp_path / "new").exists()


def test_libraries_that_read_no_register(tmp_path: Path, package: Path) -> None:
    (package / "capi" / "lib.so.1.0").write_bytes(b"none")
    with pytest.raises(NoCopyError, match=r"no library in .* asks for AVX512"):
        write_copy(tmp_path, package)
    assert [p.name for p in tmp_path.iterdir()] == ["site"]


def test_a_failure_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["avx2_runtime.py", str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert avx2_runtime.main() == 1
    assert capsys.readouterr() == ("", "error: onnxruntime is not installed\n")


@pytest.mark.skipif("AVX2" not in processor.instruction_sets(), reason="not x86 with AVX2")
@pytest.mark.skipif(session.saturates(), reason="the installed package has AVX2 kernels here")
def test_the_installed_package_runs_with_avx2_kernels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what is loaded from the copy says so."""
    monkeypatch.setattr(sys, "argv", ["avx2_runtime.py", str(tmp_path)])
    assert avx2_runtime.main() == 0
    *changed, last = capsys.readouterr().out.splitlines()
    assert changed and all(": changed in " in line for line in changed)
    assert f"PYTHONPATH={tmp_path}" in last
    command = "from qcompile.runtime import kernels; print(*kernels.instruction_sets())"
    paths = os.pathsep.join((str(tmp_path), *sys.path))
    found = subprocess.run(
        [sys.executable, "-c", command],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.split() == ["AVX2"]
