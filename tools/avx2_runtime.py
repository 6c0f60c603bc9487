"""Writes a copy of the installed onnxruntime that runs its AVX2 kernels on a newer x86 processor.

    python -m tools.avx2_runtime FOLDER
    PYTHONPATH=FOLDER python -m pytest tests/runtime

ONNX Runtime has no option that chooses among its kernels. Its libraries use AVX512 and AMX only if
the operating system saves their registers, which they read from XCR0 with ``xgetbv``; the copy has
a constant there instead, whose bits are those of x87, SSE and AVX. AVX-VNNI has no registers of its
own: the libraries ask ``cpuid`` for leaf 7, subleaf 1, and the copy asks for a subleaf that no
processor has, which is answered with zeros (Intel 64 and IA-32 Architectures Software Developer's
Manual, volume 1, section 13.3, and volume 2, CPUID). So tests and benchmarks meet the kernels that
saturate (docs/processors.md), at full speed. The installed package stays as it is, and numpy and
other libraries use all that the processor has.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PACKAGE = "onnxruntime"
# Instructions, and others of the same length. What looks like xgetbv (0f01d0) without ecx = 0, the
# number of XCR0, in front of it is part of another instruction. lea eax, [rcx + 7] is 7 there.
_XCR0 = {
    f"{zero} 0f01d0": f"{zero} 8d4107"
    for zero in ("31c9", "33c9", "b900000000")  # xor ecx, ecx of either encoding; mov ecx, 0
}
# mov eax, 7; mov ecx, 1; cpuid
_SUBLEAF = {"b807000000 b901000000 0fa2": "b807000000 b9ff000000 0fa2"}
CHANGES = {bytes.fromhex(k): bytes.fromhex(v) for k, v in (_XCR0 | _SUBLEAF).items()}
# The probe's exit status where sums are exact; Python ends with 1 after any exception.
_EXACT = 3
_PROBE = f"""
from qcompile.runtime import session
raise SystemExit(0 if session.saturates() else {_EXACT})
"""


class NoCopyError(Exception):
    """Why there is no copy with AVX2 kernels here, in one line."""


def write_copy(folder: Path, package: Path) -> dict[str, int]:
    """Write the copy into a folder; the number of changed places in each changed library.

    ``package``: the folder of the installed package. Nothing is left in ``folder`` after a failure.
    Raises NoCopyError if the folder has an onnxruntime already, no library asks for AVX512, or the
    copy still has exact sums.
    """
    target = folder / _PACKAGE
    if target.exists():
        raise NoCopyError(f"{target} exists: remove it, or name another folder")
    with _unfinished(folder) as unfinished:
        copy = unfinished / _PACKAGE
        shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
        changed = {path.name: count for path, count in _change_libraries(copy)}
        if not changed:
            raise NoCopyError(f"no library in {package} asks for AVX512 as those for x86 do")
        if not _saturates(unfinished):
            raise NoCopyError(
                "sums are exact in the copy too: this version of onnxruntime chooses its kernels "
                "in another way"
            )
        copy.rename(target)
    return changed


def without_avx512(library: bytes) -> tuple[bytes, int]:
    """A library that finds no AVX512, AMX and AVX-VNNI; and in how many places it was changed."""
    count = 0
    for found, instead in CHANGES.items():
        count += library.count(found)
        library = library.replace(found, instead)
    return library, count


@contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """A folder in ``folder`` that does not outlive the block; ``folder`` itself only if it was."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            yield Path(name)
    except BaseException:
        if new:
            folder.rmdir()
        raise


def _change_libraries(package: Path) -> Iterator[tuple[Path, int]]:
    """Change the libraries of a package in place; each that has changed, and how often."""
    for path in sorted(package.rglob("*.so*")):
        library, count = without_avx512(path.read_bytes())
        if count:
            path.write_bytes(library)
            yield path, count


def _saturates(folder: Path) -> bool:
    """True if onnxruntime, imported from this folder, adds in int16. Raises NoCopyError: no run."""
    paths = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-c", _PROBE]
    ended = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, stderr=subprocess.PIPE, text=True
    )
    if ended.returncode not in (0, _EXACT):
        last = (ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"])[-1]
        raise NoCopyError(f"the copy does not run: {last}")
    return ended.returncode == 0


def installed() -> Path:
    """The folder of the installed onnxruntime. Raises NoCopyError if there is none."""
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or found.origin is None:
        raise NoCopyError(f"{_PACKAGE} is not installed")
    return Path(found.origin).parent


def main() -> int:
    """Write the copy; print what was changed and how to use it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.absolute()
    try:
        changed = write_copy(folder, installed())
    except (NoCopyError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    for name, count in changed.items():
        print(f"{name}: changed in {count} places")
    print(f"AVX2 kernels: PYTHONPATH={folder} {Path(sys.executable).name} ...")
    return 0


if __name__ == "__main__":
    sys.exit(main())
