"""Tensor data: external files are mapped and checked, damaged values refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx.parser
import pytest
from onnx import TensorProto, numpy_helper

from qcompile.errors import ModelError
from qcompile.ir import array
from qcompile.ir.lazy_values import is_stored
from qcompile.ir.model_io.external_data import check_values
from qcompile.ir.model_io.from_proto import from_proto
from qcompile.ir.model_io.read_model import load
from qcompile.ir.model_io.to_proto import serialize
from qcompile.quant import Array
from qcompile.rewriting.testing import outputs

WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)
MODEL = '<ir_version: 10, opset_import: ["": 21]> g (float[N,2] x) => (float[N,3] y)'
X = {"x": np.array([[1.0, 2.0]], np.float32)}
XW = [[6.0, 9.0, 12.0]]


def external(values: Array, name: str = "w", location: str = "w.bin", **info: Any) -> TensorProto:
    """A tensor whose data is said to lie in a file."""
    tensor = numpy_helper.from_array(values, name)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **info}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def save(folder: Path, tensor: TensorProto, raw: bytes | None = WEIGHT.tobytes()) -> Path:
    """x @ w, with w as given; ``raw`` goes to w.bin."""
    model = onnx.parser.parse_model(MODEL + "{ y = MatMul(x, w) }")
    model.graph.initializer.append(tensor)
    if raw is not None:
        (folder / "w.bin").write_bytes(raw)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    return folder / "m.onnx"


def test_external_data_is_mapped_and_ends_up_inside(tmp_path: Path) -> None:
    graph = load(save(tmp_path, external(WEIGHT)))
    values = array(graph.constants()["w"])
    assert is_stored(graph.constants()["w"])
    with pytest.raises(ValueError, match="read-only"):
        values[0, 0] = 1
    data = serialize(graph)
    assert outputs(load(data), X)["y"].tolist() == XW


def test_offset_and_length(tmp_path: Path) -> None:
    path = save(tmp_path, external(WEIGHT, offset=16, length=24), b"-" * 16 + WEIGHT.tobytes())
    assert array(load(path).constants()["w"]).tolist() == WEIGHT.tolist()


@pytest.mark.parametrize("dtype", [ml_dtypes.int4, ml_dtypes.bfloat16, np.bool_, np.float16])
def test_element_types_that_are_unlike_their_bytes(tmp_path: Path, dtype: Any) -> None:
    values = (WEIGHT % 3).astype(dtype)
    raw = numpy_helper.from_array(values).raw_data
    graph = load(save(tmp_path, external(values), raw))
    assert array(graph.constants()["w"]).astype(np.float32).tolist() == values.astype("f").tolist()
    (again,) = onnx.ModelProto.FromString(serialize(graph)).graph.initializer
    assert again.raw_data == raw


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    for values in (np.float32(7), np.empty((0, 3), np.float32)):
        graph = load(save(tmp_path, external(np.asarray(values)), np.asarray(values).tobytes()))
        assert np.array_equal(array(graph.constants()["w"]), values)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (external(WEIGHT, location="gone.bin"), r"'gone\.bin' of tensor 'w' is missing"),
        (external(WEIGHT, location="."), "is missing"),
        (external(WEIGHT, offset=1), "too short for tensor 'w': 24 bytes, 25 needed"),
        (external(np.ones((3, 3), np.float32)), "too short for tensor 'w': 24 bytes, 36 needed"),
        (external(WEIGHT, offset=-4), "offset '-4', expected a number"),
        (external(WEIGHT, offset="x"), "offset 'x', expected a number"),
        (external(WEIGHT, location="../w.bin"), "points outside the model's folder"),
        (external(WEIGHT, location="/etc/hostname"), "points outside the model's folder"),
        (external(np.array(["a"], object)), "holds strings"),
    ],
)
def test_external_data_that_cannot_be(tmp_path: Path, tensor: TensorProto, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        load(save(tmp_path, tensor))


def test_links_may_not_lead_outside(tmp_path: Path) -> None:
    folder, outside = tmp_path / "model", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (outside / "w.bin").write_bytes(WEIGHT.tobytes())
    (folder / "file.bin").symlink_to(outside / "w.bin")
    (folder / "sub").symlink_to(outside)
    for location in ("file.bin", "sub/w.bin"):
        with pytest.raises(ModelError, match="points outside the model's folder"):
            load(save(folder, external(WEIGHT, location=location)))
    (folder / "inner.bin").symlink_to(folder / "w.bin")
    assert load(save(folder, external(WEIGHT, location="inner.bin"))).constants()


def test_bytes_and_protos_have_no_folder(tmp_path: Path) -> None:
    path = save(tmp_path, external(WEIGHT))
    for source in (path.read_bytes(), onnx.load(path, load_external_data=False)):
        with pytest.raises(ModelError, match=r"'w\.bin': give the model as a path"):
            load(source)


def test_external_data_in_attributes_and_subgraphs(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        MODEL
        + """{
            w = Constant<value = float {0}>() c = Constant<value = bool {1}>()
            y = If (c) <
                then_branch = t () => (float[N,3] p) <float[2,3] v = {}> { p = MatMul(x, v) },
                else_branch = e () => (float[N,3] q) { q = MatMul(x, w) }
            >
        }"""
    )
    model.graph.node[0].attribute[0].t.CopyFrom(external(WEIGHT))
    branch = model.graph.node[2].attribute[0].g
    del branch.initializer[:]
    branch.initializer.append(external(WEIGHT, "v"))
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert outputs(load(tmp_path / "m.onnx"), X)["y"].tolist() == XW
    with pytest.raises(ModelError, match="give the model as a path"):
        from_proto(model)


def broken(values: Array, **fields: Any) -> TensorProto:
    tensor = numpy_helper.from_array(values, "w")
    for name, value in fields.items():
        setattr(tensor, name, value)
    return tensor


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (broken(WEIGHT, raw_data=b"1234"), r"shape \[2, 3\] has 4 bytes or values, expected 24"),
        (broken(WEIGHT, data_type=99), "unknown type 99"),
        (broken(WEIGHT, data_type=0), "unknown type 0"),
        (onnx.TensorProto(name="w", data_type=1, dims=[2]), "has 0 bytes or values, expected 2"),
        (onnx.TensorProto(name="w", data_type=1, dims=[-2]), r"has shape \[-2\]"),
    ],
)
def test_values_that_do_not_fill_the_shape(tensor: TensorProto, said: str) -> None:
    with pytest.raises(ModelError, match=f"'w' .*{said}"):
        check_values(tensor)


@pytest.mark.parametrize(
    "values",
    [
        WEIGHT,
        WEIGHT.astype(np.float16),
        WEIGHT.astype(np.complex64),
        WEIGHT.astype(ml_dtypes.int4),
        np.array(["a", "b"], object),
        np.empty((0, 2), np.int64),
        np.float64(3),
    ],
)
def test_sound_values_pass_raw_and_typed(values: Array) -> None:
    values = np.asarray(values)
    check_values(numpy_helper.from_array(values))
    kind = int(onnx.helper.np_dtype_to_tensor_dtype(values.dtype))
    check_values(onnx.helper.make_tensor("w", kind, values.shape, values.ravel()))
