"""Export: names, header and types as they came in, equal bytes, files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest
from google.protobuf.message import EncodeError

from qcompile.errors import OutputError
from qcompile.ir import Graph
from qcompile.ir.analysis import shape_inference
from qcompile.ir.model_io import to_proto as export
from qcompile.ir.model_io.from_proto import from_proto
from qcompile.ir.model_io.read_model import load
from qcompile.ir.model_io.to_proto import serialize, skeleton, to_proto
from qcompile.system import atomic_write
from qcompile.system.atomic_write import check_writable, write_atomic

TEXT = """<
    ir_version: 8, opset_import: ["": 17], producer_name: "maker", producer_version: "1.2",
    domain: "org", model_version: 7, doc_string: "about", metadata_props: ["author": "me", "a": ""]
>
g (float[batch,sequence,4] x) => (float[batch,sequence,4] y)
<float[4,4] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}>
{ a = MatMul(x, w) y = Relu(a) }"""


def model() -> onnx.ModelProto:
    return onnx.parser.parse_model(TEXT)


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def graph() -> Graph:
    made = from_proto(model())
    shape_inference.infer(made)
    return made


def test_header_names_and_metadata_are_kept() -> None:
    old, new = model(), to_proto(graph())
    for field in ("ir_version", "producer_name", "producer_version", "domain", "model_version"):
        assert getattr(new, field) == getattr(old, field), field
    assert (new.doc_string, new.graph.name) == ("about", "g")
    assert {p.key: p.value for p in new.metadata_props} == {"author": "me", "a": ""}
    assert list(new.opset_import) == list(old.opset_import)
    assert list(new.graph.input) == list(old.graph.input)
    assert list(new.graph.output) == list(old.graph.output)
    assert [t.name for t in new.graph.initializer] == ["w"]


def test_old_formats_are_raised_to_one_where_weights_need_not_be_inputs() -> None:
    old = model()
    old.ir_version = 3
    assert to_proto(load(old)).ir_version == 4


def test_same_graph_same_bytes() -> None:
    one = serialize(graph())
    assert serialize(graph()) == one
    assert serialize(load(one)) == serialize(load(one))
    onnx.checker.check_model(onnx.ModelProto.FromString(one), full_check=True)


def test_written_types_name_only_the_inputs_dimensions() -> None:
    made = graph()
    made.tensors()["a"].shape = ["batch", "unk__0", 4]
    (info,) = to_proto(made).graph.value_info
    assert (info.name, info.type.tensor_type.elem_type) == ("a", onnx.TensorProto.FLOAT)
    dims = [d.dim_param or d.dim_value or None for d in info.type.tensor_type.shape.dim]
    assert dims == ["batch", None, 4]


def test_an_undeclared_output_gets_its_inferred_type() -> None:
    old = model()
    old.graph.output[0].ClearField("type")
    made = load(old)
    assert not to_proto(made).graph.output[0].HasField("type")
    shape_inference.infer(made)
    assert to_proto(made).graph.output[0] == model().graph.output[0]


def test_skeleton_holds_no_large_weight() -> None:
    old = model()
    big = onnx.numpy_helper.from_array(np.ones((4, 4096), np.float32), "w")
    old.graph.initializer[0].CopyFrom(big)
    bones = skeleton(load(old))
    assert bones.ByteSize() < 1000
    assert [t.name for t in bones.graph.input] == ["x", "w"]
    assert [d.dim_value for d in bones.graph.input[1].type.tensor_type.shape.dim] == [4, 4096]


def test_over_protobufs_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "PROTOBUF_LIMIT", 10)
    with pytest.raises(OutputError, match="over protobuf's 2 GiB limit"):
        serialize(graph())


def test_what_protobuf_cannot_write(monkeypatch: pytest.MonkeyPatch) -> None:
    class TooLarge:
        def SerializeToString(self, **_: Any) -> bytes:  # noqa: N802  # protobuf's name
            raise EncodeError("Failed to serialize proto")

    monkeypatch.setattr(export, "to_proto", lambda _: TooLarge())
    with pytest.raises(OutputError, match="cannot be serialized"):
        serialize(graph())


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    for data in (b"one", b"second"):
        write_atomic(path, data)
        assert path.read_bytes() == data
    assert names_in(tmp_path) == ["m.onnx"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~atomic_write.umask()


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_existing_file_survives_every_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(*(os, "fsync", full) if step == "fsync" else (Path, "replace", full))
        with pytest.raises(OutputError, match=r"m\.onnx': No space left on device"):
            write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["m.onnx"]


def test_an_interrupt_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "m.onnx", b"new")
    assert names_in(tmp_path) == []


def test_folders_that_cannot_take_the_output(tmp_path: Path) -> None:
    missing = tmp_path / "gone" / "m.onnx"
    for check in (check_writable, lambda p: write_atomic(p, b"")):
        with pytest.raises(OutputError, match=r"gone"):
            check(missing)
    with pytest.raises(OutputError, match="is a folder, expected a file name"):
        check_writable(tmp_path)
    check_writable(tmp_path / "m.onnx")
    assert names_in(tmp_path) == []


def test_a_folder_in_the_outputs_place_survives(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        write_atomic(tmp_path / "m.onnx", b"new")
    assert names_in(tmp_path) == ["m.onnx"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        for check in (check_writable, lambda p: write_atomic(p, b"")):
            with pytest.raises(OutputError, match="Permission denied"):
                check(tmp_path / "m.onnx")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("check", [check_writable, lambda p: write_atomic(p, b"")])
def test_read_only_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: Any) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    with pytest.raises(OutputError, match="Read-only file system"):
        check(tmp_path / "m.onnx")
