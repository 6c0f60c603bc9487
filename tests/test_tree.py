"""The tree stays readable: files are named by what they do."""

from __future__ import annotations

import re
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("qcompile", "passes", "calibrators", "benchmarks", "models", "tools")
SEARCHED = (*FOLDERS, "docs", "tests", ".ci")
# `qcompile` in the Python package index is an unrelated project; ours is `qcompile-onnx`.
FOREIGN = re.compile(
    r"""(?<![\w/-]) qcompile \[ \w  # with an extra, wherever it stands
    | \b pip[3x]? ['",\s]+ install ['",\s]+ (?: [^\n`&|;\#)] | \\\n )*?  # one command's arguments
      (?<![\w/-]) qcompile (?![\w/-])  # neither a path nor part of a longer name""",
    re.VERBOSE,
)
VAGUE = {"base", "common", "core", "helper", "helpers", "misc", "util", "utils"}


def faults(root: Path) -> list[str]:
    """Files that say nothing by their names."""
    paths = [p for folder in FOLDERS for p in (root / folder).rglob("*.py")]
    vague = sorted(p.name for p in paths if p.stem in VAGUE)
    return [f"{name}: says nothing of what it does" for name in vague]


def test_files_are_named_by_what_they_do() -> None:
    assert faults(ROOT) == []


def test_the_two_folders_are_one_package() -> None:
    """Type checkers see one import root, wheels get the folders beside (setup.cfg)."""
    for name in ("passes", "calibrators"):
        assert (ROOT / "qcompile" / name).resolve() == ROOT / name


def test_the_check_sees_a_fault(tmp_path: Path) -> None:
    (tmp_path / "passes").mkdir()
    (tmp_path / "passes" / "utils.py").touch()
    assert len(faults(tmp_path)) == 1


def foreign_installs(root: Path) -> list[str]:
    """Places that tell people to install the unrelated project. This file holds examples."""
    paths = [p for p in root.iterdir() if p.suffix in {".md", ".cfg", ".toml"}]
    paths = [p for p in paths if p.name != "CHANGELOG.md"]
    paths += [p for folder in SEARCHED for p in (root / folder).rglob("*")]
    found = []
    for path in sorted(paths):
        name = path.relative_to(root)
        if path.is_file() and "__pycache__" not in name.parts and path != Path(__file__):
            text = path.read_text(encoding="utf-8", errors="replace")
            found += [f"{name}: {match[0]}" for match in FOREIGN.finditer(text)]
    return found


def test_nothing_says_to_install_the_unrelated_project() -> None:
    assert foreign_installs(ROOT) == []


@pytest.mark.parametrize(
    "text",
    [
        "pip install qcompile",
        "`pip3 install -U qcompile`",
        "python -m pip install --quiet 'qcompile[export]'",
        'pip install "qcompile[export,demo]==0.1.0"',
        "pip install qcompile torch transformers",
        "pip install numpy qcompile>=0.1",
        "pip install numpy \\\n    qcompile",
        "Run pip install\nqcompile.",
        'run(["pip", "install", "qcompile"])',
        "all =\n    qcompile[demo]",
        "raise ModelError(\"needs 'qcompile[demo]'\")",
    ],
)
@pytest.mark.parametrize("name", ["README.md", "setup.cfg", "docs/a.md", "tests/a.py"])
def test_the_search_finds_the_unrelated_project(tmp_path: Path, text: str, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(f"Before.\n{text}\nAfter.\n")
    assert len(foreign_installs(tmp_path)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "pip install -e '.[demo]' && qcompile demo",
        "pip install -e '.[export]'\nqcompile export my-model/",
        "pip install -e .  # then qcompile demo",
        "pip install 'qcompile-onnx[export]'",
        "pip install --no-cache-dir /qcompile",
        "pip install ./qcompile/",
        "`pip install numpy` and `qcompile demo`",
        "qcompile [OPTIONS]",
    ],
)
def test_the_search_passes_what_is_ours(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    assert foreign_installs(tmp_path) == []


def missing_packages(root: Path) -> set[str]:
    """Packages of the tree that setup.cfg does not name, so that an installed wheel lacks them."""
    config = ConfigParser()
    config.read(root / "setup.cfg")
    named = set(config["options"]["packages"].split())
    folders = {"qcompile": "qcompile", "passes": "qcompile.passes"}
    folders["calibrators"] = "qcompile.calibrators"
    found = set[str]()
    for folder, package in folders.items():
        for file in (root / folder).rglob("__init__.py"):
            found.add(".".join([package, *file.parent.relative_to(root / folder).parts]))
    return found - named


def test_setup_cfg_names_every_package() -> None:
    assert missing_packages(ROOT) == set()


def test_a_package_that_setup_cfg_lacks_is_found(tmp_path: Path) -> None:
    (tmp_path / "setup.cfg").write_text("[options]\npackages =\n    qcompile\n")
    (tmp_path / "qcompile" / "new").mkdir(parents=True)
    for folder in ("qcompile", "qcompile/new"):
        (tmp_path / folder / "__init__.py").touch()
    assert missing_packages(tmp_path) == {"qcompile.new"}
