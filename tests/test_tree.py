"""The tree stays readable: small files that are named by what they do."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("qcompile", "passes", "calibrators", "models")
LONGEST = 400
VAGUE = {"base", "common", "core", "helper", "helpers", "misc", "util", "utils"}


def faults(root: Path) -> list[str]:
    """Files that are too long or say nothing by their names."""
    found = []
    paths = [p for folder in FOLDERS for p in (root / folder).rglob("*.py")]
    for path in sorted(paths):
        lines = len(path.read_text().splitlines())
        if lines >= LONGEST:
            found.append(f"{path.name}: {lines} lines")
        if path.stem in VAGUE:
            found.append(f"{path.name}: says nothing of what it does")
    return found


def test_files_are_small_and_named_by_what_they_do() -> None:
    assert faults(ROOT) == []


def test_the_two_folders_are_one_package() -> None:
    """Type checkers see one import root, wheels get the folders beside (setup.cfg)."""
    for name in ("passes", "calibrators"):
        assert (ROOT / "qcompile" / name).resolve() == ROOT / name


@pytest.mark.parametrize(("name", "lines"), [("long.py", LONGEST), ("utils.py", 1)])
def test_the_check_sees_a_fault(tmp_path: Path, name: str, lines: int) -> None:
    (tmp_path / "passes").mkdir()
    (tmp_path / "passes" / name).write_text("pass\n" * lines)
    assert len(faults(tmp_path)) == 1
