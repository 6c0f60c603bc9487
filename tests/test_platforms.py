"""Windows and macOS, as far as Linux can imitate them, and what a checkout on Windows needs.

docs/platforms.md says what was run on which system.
"""

from __future__ import annotations

import ast
import io
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from pathlib import Path, PureWindowsPath

import pytest
from archspec.cpu import detect

from qcompile.commands import cli
from qcompile.compiler.config.lockfile import is_lock
from qcompile.compiler.config.recipe import read_recipe
from qcompile.compiler.model_folder import snapshot_files, torch_export
from qcompile.data.text import read_sentences
from qcompile.runtime import session
from qcompile.system import memory
from qcompile.system.json_values import json_value
from qcompile.training.labelled.labelled_rows import LabelledRows
from tests.command_line import ROOT, assert_one_line, compile_args, run
from tests.compiler.model_folder.written_folder import write_folder, write_text
from tests.other_systems import MISSING, imitate_macos, imitate_windows, is_in_use

FOLDERS = (
    "qcompile",
    "passes",
    "calibrators",
    "benchmarks",
    "models",
    "tools",
    "tests",
    "docs",
    ".ci",
)
linux = pytest.mark.skipif(sys.platform != "linux", reason="imitated on Linux only")


@pytest.fixture(params=[imitate_windows, imitate_macos], ids=["windows", "macos"])
def imitate(request: pytest.FixtureRequest) -> Iterator[Callable[[pytest.MonkeyPatch], None]]:
    yield request.param
    for known in (detect._machine, detect._darwin_sysctl_data):
        known.cache_clear()


# A module that cannot be imported is printed with its error.
_IMPORT_ALL = """
import importlib, importlib.util, mmap, os, pkgutil, sys
import psutil  # on Linux it needs resource
for extra in ("torch", "distributed"):  # so do these, or fcntl
    if importlib.util.find_spec(extra):
        importlib.import_module(extra)
package = importlib.import_module(sys.argv[1])
for name in sys.argv[2:]:
    sys.modules[name] = None
for name in ("sched_getaffinity", "fork"):
    delattr(os, name)
del mmap.MADV_DONTNEED
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if module.name.endswith(".__main__"):
        continue  # it would run the command line
    try:
        importlib.import_module(module.name)
    except Exception as e:
        if getattr(e, "name", None) not in ("torch", "dask", "distributed"):
            print(f"{module.name}: {e}")
"""


def not_importable(package: str, path: Path) -> list[str]:
    """Modules of a package that need what Windows lacks."""
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT_ALL, package, *MISSING],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(path), *sys.path])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@linux
def test_every_module_is_imported_without_what_windows_lacks() -> None:
    assert not_importable("qcompile", ROOT) == []


@linux
@pytest.mark.parametrize(
    "text",
    ["import resource", "import os\nos.sched_getaffinity(0)", "import mmap\nmmap.MADV_DONTNEED"],
)
def test_a_module_that_needs_it_is_found(tmp_path: Path, text: str) -> None:
    (tmp_path / "needy").mkdir()
    (tmp_path / "needy" / "__init__.py").touch()
    (tmp_path / "needy" / "inner.py").write_text(text)
    (found,) = not_importable("needy", tmp_path)
    assert found.startswith("needy.inner: ")


@linux
def test_a_model_is_compiled_to_the_same_bytes(
    model: Path, data: Path, imitate: Callable[[pytest.MonkeyPatch], None]
) -> None:
    """Over an older output, with arrays in files, with a lock, and from that lock."""
    lock, out = model.with_name("lock.yaml"), model.with_name("out.onnx")
    args = compile_args(model, data, "--max-memory", "50MB")
    assert run(*args).exit_code == 0
    expected = out.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        imitate(patch)
        built = run(*args, "--lock", lock)
        assert built.exit_code == 0, built.output
        assert out.read_bytes() == expected
        lock.write_bytes(lock.read_bytes().replace(b"\n", b"\r\n"))
        again = run("compile", model, "-o", out, "--recipe", lock, "--no-bench")
        assert again.exit_code == 0, again.output
        assert out.read_bytes() == expected
        assert [p.name for p in model.parent.glob(".*")] == []


@linux
def test_a_folder_is_replaced(
    tmp_path: Path, imitate: Callable[[pytest.MonkeyPatch], None]
) -> None:
    folder, text, out = (
        write_folder(tmp_path / "in"),
        write_text(tmp_path / "t.txt"),
        tmp_path / "out",
    )
    with pytest.MonkeyPatch.context() as patch:
        imitate(patch)
        for _ in range(2):
            result = run("compile", folder, "-o", out, "--no-bench", "--data", text)
            assert result.exit_code == 0, result.output
    assert (out / "model.onnx").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out", "t.txt"]


@linux
def test_files_in_use_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = tmp_path / "mapped", tmp_path / "other"
    path.write_bytes(b"x")
    other.touch()
    imitate_windows(monkeypatch)
    with path.open("rb") as file:
        held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    assert is_in_use(path) and is_in_use(tmp_path) and not is_in_use(other)
    for fails in (path.unlink, lambda: other.replace(path), lambda: tmp_path.rename("moved")):
        with pytest.raises(PermissionError):
            fails()
    held.close()
    with pytest.raises(FileExistsError):
        other.rename(path)
    other.replace(path)
    assert memory.peak_memory() == 2 << 20


@linux
def test_cores_and_memory_are_known(
    monkeypatch: pytest.MonkeyPatch, imitate: Callable[[pytest.MonkeyPatch], None]
) -> None:
    imitate(monkeypatch)
    assert session.threads() >= 1
    found = memory.resident_memory()
    assert found.now > 0 and found.peak > 0
    memory.reset_peak()
    memory.release_memory()


def test_paths_in_reports_have_slashes() -> None:
    assert json_value({"model": PureWindowsPath(r"C:\models\a.onnx")}) == {
        "model": "C:/models/a.onnx"
    }


@pytest.mark.parametrize("location", ["../x", "..\\x", "a\\..\\..\\x", "C:x", "C:\\x", "\\x", "/x"])
def test_data_outside_a_snapshot_on_windows(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot_files, "PurePath", PureWindowsPath)
    assert snapshot_files._leaves_the_folder(location)
    assert not snapshot_files._leaves_the_folder("sub/x.data")


def test_without_links_weights_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "w").write_bytes(b"weights")
    for name in ("symlink", "link"):
        monkeypatch.setattr(os, name, _refuse)
    torch_export._link(tmp_path / "w", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"weights"


def _refuse(*_: object, **__: object) -> None:
    raise OSError(1314, "A required privilege is not held by the client")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "first one\n\nsecond\n"),
        ("a.csv", 'text,label\n"first, one",1\nsecond,0\n'),
        ("a.jsonl", '{"text": "first one", "label": 1}\n{"text": "second", "label": 0}\n'),
    ],
)
def test_line_ends_of_windows_in_text(name: str, text: str, tmp_path: Path) -> None:
    paths = []
    for folder, end in (("posix", "\n"), ("windows", "\r\n")):
        (tmp_path / folder).mkdir()
        paths.append(tmp_path / folder / name)
        paths[-1].write_bytes(text.replace("\n", end).encode())
    ours, theirs = (read_sentences(path, 10) for path in paths)
    assert ours == theirs and len(ours) == 2
    posix, windows = (LabelledRows(path, lambda *_: 1) for path in paths)
    assert posix.read(range(2)) == windows.read(range(2))


def test_line_ends_of_windows_in_recipes(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"mode: dynamic\r\nkeep_float:\r\n- 'a*'\r\n")
    recipe = read_recipe(path)
    assert recipe.mode == "dynamic" and tuple(recipe.keep_float) == ("a*",)
    assert not is_lock(path)


def test_one_file_by_two_spellings(model: Path, data: Path) -> None:
    """A hard link stands for a file system that ignores case."""
    other = model.with_name(model.name.upper())
    if not other.exists():
        other.hardlink_to(model)
    result = run("compile", model, "-o", other, "--data", data)
    assert_one_line(result, 2, "is the input model itself")


def test_a_pipe_that_is_not_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "cp1252"))
    cli._print_what_the_stream_can()
    print("1 → 2 …", flush=True)
    assert written.getvalue() == "1 ? 2 …\n".encode("cp1252")


def without_encoding(source: str) -> list[int]:
    """Lines that read or write text in whatever encoding the system prefers."""
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
    return [
        call.lineno
        for call in calls
        if _opens_text(call) and not any(k.arg in ("encoding", None) for k in call.keywords)
    ]


def _opens_text(call: ast.Call) -> bool:
    """``open(path, mode)`` and what paths have; members of archives are opened by two arguments."""
    is_method = isinstance(call.func, ast.Attribute)
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    modes = [a.value for a in call.args[not is_method :] if isinstance(a, ast.Constant)]
    if name == "open":
        if is_method and call.args and (not modes or len(call.args) > 1):
            return False
        return not modes or "b" not in str(modes[0])
    return name in ("read_text", "write_text")


def test_text_files_are_utf8() -> None:
    files = (ROOT / "qcompile").rglob("*.py")
    found = {p.name: lines for p in files if (lines := without_encoding(p.read_text("utf-8")))}
    assert found == {}


@pytest.mark.parametrize(
    "text",
    ["p.read_text()", "p.write_text(x)", "p.open()", "p.open('w')", "open(p)", "open(p, 'r')"],
)
def test_a_text_file_without_encoding_is_found(text: str) -> None:
    assert without_encoding(text) == [1]


@pytest.mark.parametrize(
    "text", ["p.read_text(encoding='utf-8')", "p.open('rb')", "open(p, 'wb')", "zip.open(n, 'w')"]
)
def test_other_files_are_not(text: str) -> None:
    assert without_encoding(text) == []


def refused_by_windows(names: list[str]) -> list[str]:
    """Names that a checkout on Windows lacks: its file systems refuse them or ignore their case."""
    device = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.I)
    bad = re.compile(r'[<>:"|?*\\\x00-\x1f]|[. ]$')
    found = [
        name
        for name in names
        if len(name) > 180 or any(device.fullmatch(p) or bad.search(p) for p in name.split("/"))
    ]
    spelled: dict[str, str] = {}
    return found + [n for n in names if spelled.setdefault(n.casefold(), n) != n]


def unmapped_links(root: Path) -> list[str]:
    """Links, which Windows checks out as text, to packages that setup.cfg does not map too."""
    config = ConfigParser()
    config.read(root / "setup.cfg")
    mapped = config.get("options", "package_dir", fallback="").split("\n")
    folders = dict(re.split(r"\s*=\s*", line) for line in mapped if line)
    places = [root / folder for folder in FOLDERS]
    paths = [*places, *(p for place in places for p in place.rglob("*"))]
    links = [p.relative_to(root) for p in paths if p.is_symlink()]
    return [
        link.as_posix()
        for link in links
        if folders.get(".".join(link.parts)) != (root / link).resolve().relative_to(root).as_posix()
    ]


def test_windows_can_check_out_the_repository() -> None:
    paths = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*")]
    assert refused_by_windows([p.relative_to(ROOT).as_posix() for p in paths]) == []
    assert unmapped_links(ROOT) == []
    assert "eol=lf" in (ROOT / ".gitattributes").read_text("utf-8")


def test_what_windows_refuses_is_found(tmp_path: Path) -> None:
    names = ["a/nul", "Aux.py", "a:b", "b./c", "x" * 200, "A", "a"]
    assert refused_by_windows(["fine.py", *names]) == [*names[:5], "a"]


def test_a_link_that_setup_cfg_does_not_map_is_found(tmp_path: Path) -> None:
    for folder in ("qcompile", "passes"):
        (tmp_path / folder).mkdir()
    (tmp_path / "qcompile" / "passes").symlink_to(tmp_path / "passes")
    assert unmapped_links(tmp_path) == ["qcompile/passes"]
    for folder, expected in (("other", ["qcompile/passes"]), ("passes", [])):
        text = f"[options]\npackage_dir =\n    qcompile.passes = {folder}\n"
        (tmp_path / "setup.cfg").write_text(text)
        assert unmapped_links(tmp_path) == expected
