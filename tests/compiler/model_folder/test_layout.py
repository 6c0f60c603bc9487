"""What of a model folder is used, what is passed over with a reason, what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qcompile.compiler.model_folder import layout
from qcompile.compiler.model_folder.layout import Folder
from qcompile.errors import ModelError


def fill(root: Path, *names: str) -> Path:
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")
    return root


def reasons(folder: Folder) -> dict[str, str]:
    return {s.name: s.reason for s in folder.skipped}


def test_the_layout_of_sentence_transformers(tmp_path: Path) -> None:
    root = fill(
        tmp_path, "config.json", "modules.json", "1_Pooling/config.json", "2_Dense/config.json",
        "2_Dense/model.safetensors", "model.safetensors", "onnx/model.onnx", "onnx/model_O2.onnx",
        "onnx/model_qint8_avx512.onnx", "tokenizer.json", "README.md", "spiece.model",
        "LICENSE.txt",
    )  # fmt: skip
    found = layout.read_folder(root)
    assert found.models == ("onnx/model.onnx",)
    assert found.weights == ("model.safetensors",)
    assert found.companions == (
        "LICENSE.txt", "README.md", "config.json", "modules.json", "spiece.model",
        "tokenizer.json", "1_Pooling/config.json", "2_Dense/config.json",
        "2_Dense/model.safetensors",
    )  # fmt: skip
    assert reasons(found) == {
        "onnx/model_O2.onnx": "a converted version of onnx/model.onnx",
        "onnx/model_qint8_avx512.onnx": "a converted version of onnx/model.onnx",
    }
    assert found.tokenizer == root


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (("decoder_model.onnx", "decoder_model_merged.onnx"), 2),
        (("model_quantized.onnx",), 1),  # the only form there is
        (("model.onnx", "model_q4f16.onnx", "model_bnb4.onnx", "model_uint8.onnx"), 1),
        (("model.onnx", "model_O5.onnx"), 2),
    ],
)
def test_variants_are_the_same_model_once_more(
    tmp_path: Path, names: tuple[str, ...], kept: int
) -> None:
    assert len(layout.read_folder(fill(tmp_path, *names)).models) == kept


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((f"pytorch_model{suffix}", "pickle") for suffix in (".bin", ".pt", ".PTH", ".pkl")),
        ("optimizer.ckpt", "pickle"),
        ("modeling_mine.py", "code"),
        ("libop.so", "code"),
        (".gitattributes", "hidden"),
        ("pytorch_model.bin.index.json", "written again"),
        ("model.report.json", "written again"),
        ("model.onnx_data", "not a file of an ONNX model"),
        ("new\nline.json", "cannot be printed"),
    ],
)
def test_what_is_passed_over(tmp_path: Path, name: str, reason: str) -> None:
    (skipped,) = layout.read_folder(fill(tmp_path, name)).skipped
    assert skipped.name.isprintable() and reason in skipped.reason


def test_hidden_and_linked_folders_are_not_entered(tmp_path: Path) -> None:
    root = fill(tmp_path / "model", "model.onnx", ".git/config.json")
    fill(tmp_path, "elsewhere/config.json")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    found = layout.read_folder(root)
    assert (found.models, found.companions) == (("model.onnx",), ())
    assert list(reasons(found)) == ["linked"]


def test_deep_folders_are_not_entered(tmp_path: Path) -> None:
    assert layout.read_folder(fill(tmp_path, "a/b/c/model.onnx")).models == ("a/b/c/model.onnx",)
    assert layout.read_folder(fill(tmp_path, "a/b/c/d/config.json")).companions == ()


def test_a_link_inside_is_followed(tmp_path: Path) -> None:
    root = fill(tmp_path, "onnx/model.onnx")
    (root / "model.onnx").symlink_to("onnx/model.onnx")
    assert layout.read_folder(root).models == ("model.onnx", "onnx/model.onnx")


@pytest.mark.parametrize("name", ["model.onnx", "config.json", "tokenizer.json", "w.safetensors"])
def test_a_link_that_leads_out_is_refused(tmp_path: Path, name: str) -> None:
    root = fill(tmp_path / "model", "other.onnx")
    secret = fill(tmp_path, "secret") / "secret"
    (root / name).symlink_to(secret)
    with pytest.raises(ModelError, match=f"'{name}'.*leads out of it.*cp -rL"):
        layout.read_folder(root)


def test_a_link_that_leads_out_from_an_unused_file_is_passed_over(tmp_path: Path) -> None:
    root = fill(tmp_path / "model", "model.onnx")
    (root / "pytorch_model.bin").symlink_to(fill(tmp_path, "secret") / "secret")
    assert list(reasons(layout.read_folder(root))) == ["pytorch_model.bin"]


@pytest.mark.parametrize("target", ["config.json", "nowhere"])
def test_a_link_to_nothing_is_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "config.json").symlink_to(target)
    with pytest.raises(ModelError, match="broken link"):
        layout.read_folder(tmp_path)


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    (tmp_path / "model.onnx").symlink_to("config.json")
    with pytest.raises(ModelError, match="link to something that is no file"):
        layout.read_folder(tmp_path)
    (tmp_path / "model.onnx").unlink()
    assert reasons(layout.read_folder(tmp_path)) == {"config.json": "a device, socket or pipe"}


def test_a_folder_of_everything_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_MOST", 3)
    with pytest.raises(ModelError, match="over 3 files"):
        layout.read_folder(fill(tmp_path, "a", "b", "c", "d"))
    with pytest.raises(ModelError, match="cannot be read"):
        layout.read_folder(tmp_path / "a")


def test_variants_of_a_model_that_is_exported(tmp_path: Path) -> None:
    """Where torch weights are the float model, files made of it are no input."""
    names = ("model.safetensors", "onnx/model_q4.onnx", "onnx/other.onnx")
    for name in names[:2]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    manifest = tmp_path / layout.MANIFEST
    for text in ("", "[]", '{"variants": []}', '{"variants": {}}', '{"variants": {"other": {}}}'):
        manifest.write_text(text)
        assert layout.read_folder(tmp_path).models == ("onnx/model_q4.onnx",)
    manifest.write_text('{"variants": {"onnx/model_q4.onnx": {}}}')
    found = layout.read_folder(tmp_path)
    assert found.models == () and found.passed_over["onnx/model_q4.onnx"].startswith("a variant")
    (tmp_path / names[2]).touch()  # a model of its own
    assert layout.read_folder(tmp_path).models == (names[2],)
    (tmp_path / names[2]).unlink()
    (tmp_path / "model.safetensors").unlink()
    assert layout.read_folder(tmp_path).models == ("onnx/model_q4.onnx",)
