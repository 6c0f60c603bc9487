"""Files are added to a folder, each completely or not at all; nobody else's are touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qcompile.compiler.model_folder import atomic_folder, in_place
from qcompile.compiler.model_folder.layout import MANIFEST
from qcompile.errors import OutputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.onnx").write_text("float")
    (tmp_path / "README.md").write_text("mine")
    return tmp_path


def add(folder: Path, name: str, text: str) -> None:
    with in_place.folder_to_extend(folder, [name]) as stage:
        (stage / name).parent.mkdir(exist_ok=True)
        (stage / name).write_text(text)
        account = {"source": "in", "variants": {name: {"variant": text}}}
        atomic_folder.write_manifest(stage, account)


def content(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {p.relative_to(folder).as_posix(): p.read_text() for p in files}


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return found


def test_files_are_added_and_the_manifest_knows_all(folder: Path) -> None:
    before = content(folder)
    add(folder, "onnx/a.onnx", "A")
    add(folder, "b.onnx", "B")
    assert content(folder) == {**before, "onnx/a.onnx": "A", "b.onnx": "B"}
    assert list(manifest(folder)["variants"]) == list(manifest(folder)["files"])
    assert list(manifest(folder)["files"]) == ["b.onnx", "onnx/a.onnx"]
    fill = atomic_folder.folder_to_fill(folder, folder.parent / "other")
    with pytest.raises(OutputError, match="which qcompile did not write"), fill:
        """The float model is not ours, so that the folder cannot be replaced."""


def test_ours_are_replaced_and_those_that_are_gone_forgotten(folder: Path) -> None:
    add(folder, "a.onnx", "A")
    add(folder, "b.onnx", "B")
    (folder / "b.onnx").unlink()
    add(folder, "a.onnx", "new")
    assert content(folder)["a.onnx"] == "new"
    assert list(manifest(folder)["files"]) == list(manifest(folder)["variants"]) == ["a.onnx"]


def test_what_an_export_wrote_stays_known(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"qcompile": "0", "source": "x", "export": 1, "files": {}}')
    add(folder, "a.onnx", "A")
    found = manifest(folder)
    assert (found["source"], found["export"], list(found["files"])) == ("x", 1, ["a.onnx"])


@pytest.mark.parametrize("text", ["", "[]", '{"files": 3}', '{"files": {"a.onnx": "0"}}'])
def test_others_are_not_replaced(folder: Path, text: str) -> None:
    (folder / "a.onnx").write_text("theirs")
    (folder / MANIFEST).write_text(text)
    with pytest.raises(OutputError, match=r"'a\.onnx', which qcompile did not write"):
        add(folder, "a.onnx", "A")
    assert content(folder)["a.onnx"] == "theirs"


def test_a_file_of_ours_that_was_changed_stays(folder: Path) -> None:
    add(folder, "a.onnx", "A")
    (folder / "a.onnx").write_text("edited")
    with pytest.raises(OutputError, match="changed since"):
        add(folder, "a.onnx", "again")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_a_failure(folder: Path, error: type[BaseException]) -> None:
    add(folder, "a.onnx", "A")
    before, names = content(folder), sorted(folder.rglob("*"))
    with pytest.raises(error), in_place.folder_to_extend(folder, ["a.onnx"]) as stage:
        (stage / "a.onnx").write_text("half")
        raise error
    assert (content(folder), sorted(folder.rglob("*"))) == (before, names)


def test_links_are_not_written_through(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (folder / "onnx").symlink_to(outside)
    with pytest.raises(OutputError, match="behind a link that leads out"):
        add(folder, "onnx/a.onnx", "A")
    (folder / "b.onnx").symlink_to("model.onnx")
    with pytest.raises(OutputError, match=r"'b\.onnx', which qcompile did not write"):
        add(folder, "b.onnx", "B")
    assert not any(outside.iterdir()) and content(folder)["model.onnx"] == "float"


def test_the_cache_of_the_hub_is_not_changed(tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0"
    for place in (snapshot, repository / "blobs"):
        place.mkdir(parents=True)
    with pytest.raises(OutputError, match="in the cache of the Hugging Face hub"):
        add(snapshot, "a.onnx", "A")
    assert not any(snapshot.iterdir())
