"""Prints how large a base install is, and how long ``qcompile --help`` takes.

    python -m tools.install_size

Sizes are those of the installed packages that setup.cfg's ``install_requires`` needs, directly or
not, as pip listed their files. The time is the least of several runs. Both figures are in
docs/platforms.md.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
RUNS = 7


def required(lines: list[str]) -> set[str]:
    """Names of the distributions that requirements need here. Raises PackageNotFoundError."""
    found: set[str] = set()
    waiting = list(lines)
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and name not in found:
            found.add(name)
            waiting += metadata.requires(name) or []
    return found


def size(name: str) -> int:
    """Bytes of a distribution's files."""
    paths = (Path(str(file.locate())) for file in metadata.files(name) or ())
    return sum(path.stat().st_size for path in paths if path.is_file())


def help_time() -> float:
    """Seconds of wall time that ``qcompile --help`` takes."""
    command, times = [sys.executable, "-m", "qcompile", "--help"], []
    for _ in range(RUNS):
        start = time.perf_counter()
        subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = [x for x in setup["options"]["install_requires"].splitlines() if x]
    sizes = {f"{name} {metadata.version(name)}": size(name) for name in required(lines)}
    for name, count in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{count / 1e6:7.1f} MB  {name}")
    print(f"{sum(sizes.values()) / 1e6:7.1f} MB  in all, Python {platform.python_version()}")
    print(f"{help_time():7.2f} s   qcompile --help")


if __name__ == "__main__":
    main()
