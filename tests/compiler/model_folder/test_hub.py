"""Models by name come from the hub's cache without network; what the cache lacks is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcompile.compiler.model_folder import hub
from qcompile.errors import ModelError

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache as huggingface_hub lays it out: snapshots of links to blobs. No network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "models--some--model"
    for folder in ("blobs", "refs", f"snapshots/{REVISION}"):
        (repo / folder).mkdir(parents=True)
    (repo / "refs" / "main").write_text(REVISION)
    for i, name in enumerate(("config.json", "model.safetensors", "pytorch_model.bin")):
        (repo / "blobs" / str(i)).write_text("{}")
        (repo / "snapshots" / REVISION / name).symlink_to(f"../../blobs/{i}")
    return repo


def test_the_cache_is_a_folder_of_links(cache: Path) -> None:
    found = hub.fetch_folder("some/model", None)
    assert (found.companions, found.weights) == (("config.json",), ("model.safetensors",))
    assert [s.name for s in found.skipped] == ["pytorch_model.bin"]


def test_its_links_may_not_leave_the_repository(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    config = cache / "snapshots" / REVISION / "config.json"
    config.unlink()
    config.symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="leads out of it"):
        hub.fetch_folder("some/model", None)


@pytest.mark.usefixtures("cache")
def test_what_is_not_there() -> None:
    with pytest.raises(ModelError, match="'some/other' is neither a file nor a folder here"):
        hub.fetch_folder("some/other", None)


@pytest.mark.parametrize("name", ["/etc", "a/b/c", "../model", "some model", "", "file:///x"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(ModelError, match="neither a folder nor a model's name"):
        hub.fetch_folder(name, None)
