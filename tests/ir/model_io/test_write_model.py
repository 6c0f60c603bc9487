"""Graphs written constant by constant: protobuf's own bytes in one file, the same model in two."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from qcompile.errors import OutputError
from qcompile.ir import Graph
from qcompile.ir.model_io.from_proto import from_proto
from qcompile.ir.model_io.read_model import load
from qcompile.ir.model_io.to_proto import serialize
from qcompile.ir.model_io.write_model import (
    externalize_weights,
    save_proto,
    with_external_weights,
    write_model,
)
from qcompile.quant import Array
from qcompile.rewriting.testing import model_proto
from qcompile.runtime.session import Session
from qcompile.system.temporary_folder import TemporaryFolder

TEXT = "g (float[N,40] x) => (float[N,40] y) {%s}"
BODY = "h = MatMul(x, w) c = Cast<to=1>(q) s = MatMul(h, c) y = Add(s, b)"
X = {"x": np.ones((2, 40), np.float32)}


def graph(**more: Array) -> Graph:
    """Weights of several types, large and small."""
    rng = np.random.default_rng(0)
    values: dict[str, Any] = {
        "w": rng.standard_normal((40, 40)).astype(np.float32),
        "q": rng.integers(-8, 8, (40, 40)).astype(ml_dtypes.int4),
        "b": np.ones(40, np.float32),
        **more,
    }
    return from_proto(model_proto(TEXT % BODY, 21, **values))


def test_one_file_has_the_bytes_of_protobuf() -> None:
    made = write_model(graph())
    assert made.path.name == "model.onnx" and made.data is None
    assert made.path.read_bytes() == serialize(graph())
    assert made.size == len(serialize(graph()))


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16, np.bool_, np.uint8])
def test_element_types(dtype: Any) -> None:
    other = graph(w=(np.arange(1600) % 2).reshape(40, 40).astype(dtype))
    assert write_model(other).path.read_bytes() == serialize(other)


def test_values_that_are_no_raw_data_become_it() -> None:
    model = onnx.ModelProto.FromString(serialize(graph()))
    values = numpy_helper.to_array(model.graph.initializer[0])
    listed = onnx.helper.make_tensor("w", 1, (40, 40), values.ravel().tolist())
    listed.doc_string = "kept"
    model.graph.initializer[0].CopyFrom(listed)
    made = write_model(from_proto(model))
    (found, *_) = onnx.load(made.path).graph.initializer
    assert np.array_equal(numpy_helper.to_array(found), values) and found.doc_string == "kept"


def test_two_files_where_one_would_be_too_large() -> None:
    made, again = (
        write_model(graph(), "encoder", limit=5000),
        write_model(graph(), "encoder", limit=5000),
    )
    assert made.data is not None and again.data is not None
    assert made.data.name == again.data.name and made.data.name.startswith("encoder-")
    assert made.path.read_bytes() == again.path.read_bytes()
    assert made.size == made.path.stat().st_size + made.data.stat().st_size
    (entry,) = (
        e for t in onnx.load(made.path, load_external_data=False).graph.initializer
        for e in t.external_data if e.key == "location"
    )  # fmt: skip
    assert entry.value == made.data.name
    assert np.array_equal(Session(made.path).run(X)["y"], Session(serialize(graph())).run(X)["y"])
    assert serialize(load(made.path)) == serialize(graph())


@pytest.mark.parametrize("kind", ["int4", "uint4", "int2", "uint2"])
@pytest.mark.parametrize("columns", [64, 65])
def test_packed_weights_lie_in_the_data_file(kind: str, columns: int, tmp_path: Path) -> None:
    """As packed bytes; also of a model that was loaded, from one file or two."""
    dtype, bits = getattr(ml_dtypes, kind), int(kind[-1])
    low = 0 if kind.startswith("u") else -(1 << bits - 1)
    codes = np.random.default_rng(0).integers(low, low + (1 << bits), (127, columns)).astype(dtype)
    size = -(-codes.size * bits // 8)
    text = f"g () => (float[127,{columns}] y) {{ y = DequantizeLinear<axis = 0>(w, s) }}"
    model = model_proto(text, 25, w=codes, s=np.ones(127, np.float32))
    model.ir_version = 13
    onnx.save(model, tmp_path / "m.onnx")
    expected = Session(model.SerializeToString()).run({})["y"]
    for source in (from_proto(model), load(tmp_path / "m.onnx")):
        made = write_model(source, limit=100)
        assert made.data is not None and made.data.stat().st_size == size
        assert np.array_equal(Session(made.path).run({})["y"], expected)
        again = write_model(load(made.path), limit=100)
        assert again.data is not None and again.data.name == made.data.name
        assert write_model(load(made.path)).path.read_bytes() == serialize(from_proto(model))
    for path in (tmp_path / "m.onnx", made.path):
        copy = externalize_weights(path)
        if copy is not None:  # None where all weights are apart already
            assert copy.data is not None and copy.data.stat().st_size == size
            assert np.array_equal(Session(copy.path).run({})["y"], expected)


def test_other_contents_have_another_name() -> None:
    names = {
        write_model(graph(w=np.full((40, 40), i, np.float32)), limit=5000).data.name  # type: ignore[union-attr]
        for i in range(2)
    }
    assert len(names) == 2


def test_a_session_maps_what_lies_apart() -> None:
    model, folder = with_external_weights(graph())
    path = save_proto(model, folder)
    assert path.stat().st_size < 3000
    assert np.array_equal(Session(path).run(X)["y"], Session(serialize(graph())).run(X)["y"])


def test_a_folder_lives_as_long_as_its_model() -> None:
    made = write_model(graph())
    folder = made.folder.path
    assert folder.is_dir()
    del made
    assert not folder.exists()


def test_no_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("qcompile.ir.model_io.write_model._raw", full)
    for build in (write_model, with_external_weights):
        with pytest.raises(OutputError, match=r"temporary folder .*TMPDIR.*No space left"):
            build(graph())
    monkeypatch.setattr("tempfile.mkdtemp", full)
    with pytest.raises(OutputError, match=r"TMPDIR.*No space left"):
        TemporaryFolder()
