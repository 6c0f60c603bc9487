"""``qcompile compile FOLDER``: file by file, whole or not at all, nothing else touched."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
from click.testing import Result

from qcompile.compiler.model_folder.layout import MANIFEST
from tests.command_line import assert_one_line, run
from tests.compiler.model_folder.written_folder import decoder, encoder, write_folder, write_text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "in")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


def compile_folder(folder: Path, *more: object) -> Result:
    out = folder.with_name("out")
    return run("compile", folder, "-o", out, "--no-bench", *more)


def test_a_folder_becomes_one_like_it(folder: Path, text: Path) -> None:
    """Text finds the folder's own tokenizer."""
    result = compile_folder(folder, "--data", text)
    assert result.exit_code == 0, result.output
    out = folder.with_name("out")
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "config.json", "model.lock.yaml", "model.onnx", "model.report.json",
        MANIFEST, "tokenizer.json",
    ]  # fmt: skip
    for name in ("config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    report = json.loads((out / "model.report.json").read_text())
    assert (report["int8_linears"], report["mode"]) == (2, "static")
    assert f"qcompile inspect {out / 'model.onnx'}" in result.stdout
    again = compile_folder(
        out.rename(folder.with_name("second")), "--data", text, "--mode", "float"
    )
    assert again.exit_code == 0, again.output  # what came out is a folder that goes in
    assert (
        compile_folder(folder, "--data", text).exit_code == 0
    )  # and the first output is written anew


def test_names_in_sub_folders_stay(folder: Path, text: Path) -> None:
    (folder / "onnx").mkdir()
    (folder / "model.onnx").rename(folder / "onnx" / "model.onnx")
    found = json.loads(compile_folder(folder, "--data", text, "--json").stdout)
    assert list(found["files"]) == ["onnx/model.onnx"]
    assert (folder.with_name("out") / "onnx" / "model.report.json").is_file()


def test_several_files_each_with_its_report(folder: Path, text: Path) -> None:
    """The data cannot feed the decoder, which is compiled without, and its report says so."""
    (folder / "model.onnx").rename(folder / "encoder_model.onnx")
    onnx.save(decoder(), folder / "decoder_model.onnx")
    result = compile_folder(folder, "--data", text)
    assert result.exit_code == 0, result.output
    assert (
        "note: the data does not fit, so it was compiled without: input 'encoder_hidden_states'"
        in (" ".join(result.stdout.split()))
    )
    out = folder.with_name("out")
    modes = {
        name: json.loads((out / f"{name}.report.json").read_text())["mode"]
        for name in ("encoder_model", "decoder_model")
    }
    assert modes == {"encoder_model": "static", "decoder_model": "dynamic"}


def test_a_mode_asked_for_is_for_every_file(folder: Path, text: Path) -> None:
    onnx.save(decoder(), folder / "decoder_model.onnx")
    result = compile_folder(folder, "--data", text, "--mode", "static")
    assert_one_line(result, 2, "decoder_model.onnx: input 'encoder_hidden_states'")
    qdq = compile_folder(folder, "--data", text, "--target", "qdq")
    assert_one_line(qdq, 2, "decoder_model.onnx: target 'qdq' needs calibration data")
    assert not folder.with_name("out").exists()


def test_data_that_fits_nothing_is_an_error(folder: Path, tmp_path: Path) -> None:
    onnx.save(decoder(), folder / "decoder_model.onnx")
    (tmp_path / "x.npz").write_bytes(b"no zip")
    assert_one_line(
        compile_folder(folder, "--data", tmp_path / "x.npz"), 2, "decoder_model.onnx: ", "x.npz"
    )


def test_a_failed_gate_leaves_what_was_there(folder: Path, text: Path) -> None:
    onnx.save(encoder(), folder / "another.onnx")
    out = folder.with_name("out")
    given = ("--data", text, "--mode", "dynamic")
    assert compile_folder(folder, *given).exit_code == 0
    before = (out / MANIFEST).read_bytes()
    impossible = ("--min-cosine", "1.0", "--search-time", 0)
    assert_one_line(
        compile_folder(folder, *given, *impossible), 1, "another.onnx: ", "--min-cosine"
    )
    assert (out / MANIFEST).read_bytes() == before
    assert compile_folder(folder, *given, *impossible, "--force").exit_code == 0
    assert (out / MANIFEST).read_bytes() != before
    assert sorted(p.name for p in out.parent.iterdir()) == ["in", "out", "text.txt"]


def test_a_damaged_file_is_named(folder: Path, text: Path) -> None:
    (folder / "broken.onnx").write_bytes((folder / "model.onnx").read_bytes()[:1000])
    assert_one_line(
        compile_folder(folder, "--data", text), 2, "broken.onnx", "not a readable ONNX model"
    )
    assert not folder.with_name("out").exists()


def test_a_folder_without_models_says_what_was_expected(folder: Path) -> None:
    (folder / "model.onnx").unlink()
    assert_one_line(compile_folder(folder), 2, "holds no .onnx file")


def test_a_lock_and_a_further_report_lie_beside_the_folder(folder: Path, text: Path) -> None:
    names = ("model.lock.yaml", "further.report.json", "page.html")
    lock, report, page = (folder.with_name(n) for n in names)
    files = ("--lock", lock, "--report", report, "--report", page)
    result = compile_folder(folder, "--data", text, *files)
    assert result.exit_code == 0, result.output
    assert "</html>" in page.read_text()
    out = folder.with_name("out")
    first = (out / "model.onnx").read_bytes()
    assert report.read_bytes() == (out / "model.report.json").read_bytes()
    assert compile_folder(folder, "--recipe", lock).exit_code == 0
    assert (out / "model.onnx").read_bytes() == first
    assert_one_line(
        compile_folder(folder, "--report", "r.txt"), 2, "expected a .json or .html file"
    )
    for option, where in (("--report", out / "r.json"), ("--lock", folder / "l.yaml")):
        assert_one_line(compile_folder(folder, option, where), 2, option, "is inside folder")
    onnx.save(decoder(), folder / "decoder_model.onnx")
    assert_one_line(compile_folder(folder, "--report", report), 2, "--report is for one model")


@pytest.mark.parametrize("data", ["inside", "outside"])
def test_external_data_stays_in_the_folder(folder: Path, text: Path, data: str) -> None:
    """Weights beside the model are read; those elsewhere are refused, links to them too."""
    proto = onnx.load(folder / "model.onnx")
    place = folder / "model.onnx_data"
    onnx.save(proto, folder / "model.onnx", save_as_external_data=True, location=place.name)
    if data == "inside":
        result = compile_folder(folder, "--data", text)
        assert result.exit_code == 0, result.output
        return
    secret = Path(shutil.move(place, folder.with_name("secret")))
    place.symlink_to(secret)
    assert_one_line(compile_folder(folder, "--data", text), 2, "points outside the model's folder")
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../secret" if entry.key == "location" else entry.value
    place.unlink()
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    assert_one_line(
        compile_folder(folder, "--data", text), 2, "points outside the model's folder", "../secret"
    )
    assert not folder.with_name("out").exists()


OPENED: list[str] | None = None


def note_opened(event: str, args: tuple[object, ...]) -> None:
    if event == "open" and OPENED is not None and isinstance(args[0], str):
        OPENED.append(args[0])


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Paths that Python opens while a test runs. An audit hook stays, but idle."""
    global OPENED
    sys.addaudithook(note_opened)
    OPENED = []
    yield OPENED
    OPENED = None


class Bomb:
    """Writes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path(self.path),)  # type: ignore[return-value]


def test_pickles_and_code_are_neither_opened_nor_copied(
    folder: Path, text: Path, opened: list[str]
) -> None:
    names = ("pytorch_model.bin", "weights.pt", "scaler.pkl", "modeling_mine.py", "helper.so")
    for name in names:
        (folder / name).write_bytes(pickle.dumps(Bomb(folder.with_name("boom"))))
    opened.clear()
    result = compile_folder(folder, "--data", text)
    assert result.exit_code == 0, result.output
    assert not folder.with_name("boom").exists()
    seen = {Path(p).name for p in opened if str(folder) in p}
    assert "config.json" in seen and not seen & set(names)
    out = folder.with_name("out")
    assert not {p.name for p in out.iterdir()} & set(names)
    passed_over = json.loads((out / MANIFEST).read_text())["passed_over"]
    assert set(passed_over) == set(names)
    assert "skipped:  helper.so: code" in result.stdout
