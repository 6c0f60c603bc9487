"""The size of a base install: what counts, and that extras and other systems do not."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools import install_size


def test_what_requirements_need(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = {
        "a": ["B-c>=1", 'd; extra == "more"', 'e; sys_platform == "none"'],
        "b-c": ["a"],
    }
    monkeypatch.setattr(metadata, "requires", needs.get)
    assert install_size.required(["A>=2", 'f; sys_platform == "none"']) == {"a", "b-c"}


def test_what_is_not_installed_is_an_error() -> None:
    with pytest.raises(metadata.PackageNotFoundError):
        install_size.required(["no-such-package-of-tests"])


def test_size_is_that_of_files_that_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    listed = [SimpleNamespace(locate=lambda name=name: tmp_path / name) for name in ("x", "gone")]
    monkeypatch.setattr(metadata, "files", lambda name: listed)
    assert install_size.size("a") == 5
