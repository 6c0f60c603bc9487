"""A folder is written whole or not at all, and nothing of somebody else's is lost."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from qcompile.compiler.model_folder import atomic_folder, layout
from qcompile.compiler.model_folder.layout import MANIFEST, Folder
from qcompile.errors import OutputError
from qcompile.system.atomic_write import umask


def write(out: Path, source: Path, *names: str) -> None:
    with atomic_folder.folder_to_fill(out, source) as stage:
        for name in names:
            (stage / name).parent.mkdir(exist_ok=True)
            (stage / name).write_text(name)
        atomic_folder.write_manifest(stage, {"source": source.name})


def content(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): p.read_text()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != MANIFEST
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


@pytest.fixture(params=["exchange", "two steps"])
def swapping(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of replacing a folder."""
    if request.param == "two steps":
        monkeypatch.setattr(atomic_folder, "_exchange", lambda _one, _other: False)


@pytest.mark.usefixtures("swapping")
def test_a_folder_appears_and_is_replaced_whole(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    write(out, source, "a.txt", "sub/b.txt")
    assert content(out) == {"a.txt": "a.txt", "sub/b.txt": "sub/b.txt"}
    assert out.stat().st_mode & 0o777 == 0o777 & ~umask()
    write(out, source, "c.txt")
    assert content(out) == {"c.txt": "c.txt"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.usefixtures("swapping")
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_existing_folder_survives(
    tmp_path: Path, source: Path, error: type[BaseException]
) -> None:
    out = tmp_path / "out"
    write(out, source, "a.txt")
    with pytest.raises(error), atomic_folder.folder_to_fill(out, source) as stage:
        (stage / "b.txt").write_text("half")
        raise error
    assert content(out) == {"a.txt": "a.txt"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_the_first_of_two_steps_is_undone(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write(out, source, "a.txt")
    monkeypatch.setattr(atomic_folder, "_exchange", lambda _one, _other: False)
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if target == out and ".old" not in self.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OutputError, match="No space left"):
        write(out, source, "b.txt")
    assert content(out) == {"a.txt": "a.txt"}


def test_an_empty_folder_and_a_link_to_one_of_ours_are_replaced(
    tmp_path: Path, source: Path
) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", source, "a.txt")
    (tmp_path / "link").symlink_to("out")
    write(tmp_path / "link", source, "b.txt")
    assert (tmp_path / "link").is_symlink() and content(tmp_path / "out") == {"b.txt": "b.txt"}


@pytest.mark.parametrize("name", ["thesis.txt", "sub/thesis.txt"])
def test_what_is_not_ours_is_not_replaced(tmp_path: Path, source: Path, name: str) -> None:
    out = tmp_path / "out"
    write(out, source, "a.txt")
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("years of work")
    with pytest.raises(OutputError, match=f"{name!r}, which qcompile did not write"):
        write(out, source, "b.txt")
    assert content(out) == {"a.txt": "a.txt", name: "years of work"}


@pytest.mark.parametrize("manifest", ["", "[]", '{"files": 3}', '{"files": {"b.txt": ""}}'])
def test_a_manifest_that_says_nothing_of_a_file(
    tmp_path: Path, source: Path, manifest: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.txt").write_text("a")
    (out / MANIFEST).write_text(manifest)
    with pytest.raises(OutputError, match=r"'a\.txt', which qcompile did not write"):
        write(out, source, "b.txt")


@pytest.mark.parametrize("where", ["in", "in/sub", ".", "in/../in"])
def test_the_input_is_never_the_output(tmp_path: Path, source: Path, where: str) -> None:
    with pytest.raises(OutputError, match="overlaps the input folder"):
        write(tmp_path / where, source, "a.txt")
    assert source.is_dir()


def test_places_that_cannot_be(tmp_path: Path, source: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    for name, said in (
        ("file", "is a file"),
        ("nowhere/out", "does not exist"),
        ("file/out", "does not exist"),
        ("n" * 300, "cannot be used as a folder name"),
        ("loop", "cannot be used as a folder name"),
    ):
        with pytest.raises(OutputError, match=said):
            write(tmp_path / name, source, "a.txt")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only folders")
def test_a_folder_that_is_read_only(tmp_path: Path, source: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(OutputError, match="Permission denied"):
            write(tmp_path / "out", source, "a.txt")
    finally:
        tmp_path.chmod(0o755)


def test_companions_are_copied_links_followed(tmp_path: Path, source: Path) -> None:
    (source / "sub").mkdir()
    (source / "sub" / "real.json").write_text("{}")
    (source / "config.json").symlink_to("sub/real.json")
    stage = tmp_path / "stage"
    stage.mkdir()
    atomic_folder.copy_companions(layout.read_folder(source), stage)
    assert content(stage) == {"config.json": "{}", "sub/real.json": "{}"}
    assert not (stage / "config.json").is_symlink()
    gone = Folder(source, (), ("gone.json",), (), ())
    with pytest.raises(OutputError, match=r"gone\.json' cannot be copied"):
        atomic_folder.copy_companions(gone, stage)


def test_the_manifest_tells_digests(tmp_path: Path, source: Path) -> None:
    write(tmp_path / "out", source, "a.txt")
    found = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert found["files"] == {"a.txt": hashlib.sha256(b"a.txt").hexdigest()}
    assert found["source"] == "in" and found["qcompile"]
