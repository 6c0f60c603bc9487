"""What Windows and macOS lack, or refuse, as far as Linux can imitate it."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from archspec.cpu import detect

from qcompile.system import memory

MISSING = ("fcntl", "grp", "pwd", "resource", "termios")  # modules that Windows does not have
_IN_USE = 13, "The process cannot access the file because it is being used by another process"
_M2 = "machdep.cpu.brand_string: Apple M2\n"


class WindowsMemory(NamedTuple):
    """Some fields of ``psutil.Process.memory_info`` there."""

    rss: int
    peak_wset: int


def imitate_windows(patch: pytest.MonkeyPatch) -> None:
    """No POSIX modules, no /proc, no advice for mapped files, no links, and ``restrict_files``."""
    for name in MISSING:
        patch.setitem(sys.modules, name, None)
    patch.delattr(os, "sched_getaffinity", raising=False)
    patch.delattr(mmap, "MADV_DONTNEED", raising=False)
    patch.setattr(psutil.Process, "memory_info", lambda _: WindowsMemory(1 << 20, 2 << 20))
    patch.setattr(os, "symlink", _refuse_links)
    _imitate(patch, "Windows", TypeError("expected str, not None"))
    restrict_files(patch)


def imitate_macos(patch: pytest.MonkeyPatch) -> None:
    """No /proc, no binding to cores, a C library without renameat2, a processor by Apple."""
    patch.delattr(os, "sched_getaffinity", raising=False)
    patch.delattr(psutil.Process, "cpu_affinity", raising=False)
    patch.setattr(psutil, "MACOS", True)
    patch.setattr(detect, "_check_output", lambda *_, **__: _M2)
    _imitate(patch, "Darwin", None)


def _imitate(patch: pytest.MonkeyPatch, system: str, fault: Exception | None) -> None:
    """``fault``: what asking for the C library raises; without one, its functions are missing."""
    load = ctypes.CDLL

    def library(name: str | None, *args: Any, **options: Any) -> object:
        if name is not None:
            return load(name, *args, **options)
        if fault is not None:
            raise fault
        return object()

    patch.setattr(ctypes, "CDLL", library)
    patch.setattr(memory, "_SELF", Path("/not/there"))
    patch.setattr(platform, "system", lambda: system)
    for known in (detect._machine, detect._darwin_sysctl_data):
        known.cache_clear()


def restrict_files(patch: pytest.MonkeyPatch) -> None:
    """As on Windows: what is open or mapped cannot be removed, replaced or moved, nor a folder with
    it; ``rename`` replaces nothing."""
    for name in ("unlink", "remove", "rmdir"):
        patch.setattr(os, name, _checked(getattr(os, name), 1))
    patch.setattr(os, "replace", _checked(os.replace, 2))
    rename = _checked(os.rename, 2)

    def onto_nothing(source: Any, target: Any, **options: Any) -> None:
        if os.path.lexists(target):
            raise FileExistsError(17, "Cannot create a file when that file already exists")
        rename(source, target, **options)

    patch.setattr(os, "rename", onto_nothing)


def _checked(function: Callable[..., None], paths: int) -> Callable[..., None]:
    def checked(*args: Any, **options: Any) -> None:
        if not any(value is not None for value in options.values()):  # else relative to a folder
            for path in args[:paths]:
                if is_in_use(Path(path)):
                    raise PermissionError(*_IN_USE, str(path))
        function(*args, **options)

    return checked


def is_in_use(path: Path) -> bool:
    """True where this process has the file, or one in the folder, open or mapped (proc(5))."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    used = {Path(parts[5]) for line in maps if len(parts := line.split(maxsplit=5)) == 6}
    for handle in Path("/proc/self/fd").iterdir():
        used.add(Path(os.path.realpath(handle)))
    real = path.parent.resolve() / path.name
    return any(other.is_relative_to(real) for other in used)


def _refuse_links(*_: object, **__: object) -> None:
    raise OSError(22, "A required privilege is not held by the client")
