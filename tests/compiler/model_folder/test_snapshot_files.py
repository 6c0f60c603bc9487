"""Models in the hub's cache, with data next to them, become plain files; links stay inside it."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from qcompile.compiler.model_folder import layout, snapshot_files
from qcompile.errors import ModelError
from tests.compiler.model_folder.hub_cache import written_snapshot


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """onnx/model.onnx with its weights in onnx/model.onnx_data, all of them links."""
    return written_snapshot(tmp_path, threshold=0)


def test_models_and_their_data_become_files(snapshot: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    snapshot_files.place_models(layout.read_folder(snapshot), scratch)
    for name in ("onnx/model.onnx", "onnx/model.onnx_data"):
        assert not (scratch / name).is_symlink()
        assert (scratch / name).read_bytes() == (snapshot / name).read_bytes()
    onnx.checker.check_model(str(scratch / "onnx" / "model.onnx"))  # refuses links of both kinds


def test_a_snapshot_is_known_by_its_place(snapshot: Path, tmp_path: Path) -> None:
    assert layout.cached_name(snapshot) == "some/model"
    assert layout.cached_name(snapshot / "onnx") is None and layout.cached_name(tmp_path) is None
    found = layout.read_folder(snapshot)
    assert found.models == ("onnx/model.onnx",) and "config.json" in found.companions


def test_data_outside_of_the_cache_is_refused(snapshot: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    data = snapshot / "onnx" / "model.onnx_data"
    data.unlink()
    with pytest.raises(ModelError, match=r"onnx/model\.onnx_data' is missing"):
        snapshot_files.place_models(layout.read_folder(snapshot), tmp_path / "scratch")
    data.symlink_to(secret)
    with pytest.raises(ModelError, match="not in the hub's cache"):
        snapshot_files.place_models(layout.read_folder(snapshot), tmp_path / "scratch")


@pytest.mark.parametrize("location", ["../../../../secret", "/etc/passwd"])
def test_data_outside_of_the_folder_is_refused(
    snapshot: Path, tmp_path: Path, location: str
) -> None:
    model = snapshot / "onnx" / "model.onnx"
    proto = onnx.load(model, load_external_data=False)
    for entry in proto.graph.initializer[0].external_data:
        entry.value = location if entry.key == "location" else entry.value
    model.resolve().write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="outside the model's folder"):
        snapshot_files.place_models(layout.read_folder(snapshot), tmp_path / "scratch")
