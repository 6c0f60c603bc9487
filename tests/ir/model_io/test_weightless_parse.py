"""The walk over a model's protobuf: what it leaves out, where that lies, what it leaves alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx.parser
import pytest
from onnx import TensorProto, numpy_helper

from qcompile.ir import array
from qcompile.ir.lazy_values import is_stored
from qcompile.ir.model_io.external_data import stored_bytes
from qcompile.ir.model_io.read_model import load, read_model
from qcompile.ir.model_io.weightless_parse import UnusualError, thin, varint
from qcompile.quant import Array
from qcompile.rewriting.testing import model_proto, outputs

LARGE = np.arange(64 * 32, dtype=np.float32).reshape(64, 32)
TEXT = """g (float[N,64] x) => (float[N,32] y, float[64,32] c) {
    p = MatMul(x, w) k = Constant() c = Constant()
    s = Add(p, small) q = MatMul(x, k) y = Add(s, q)
}"""


def model() -> onnx.ModelProto:
    """Large weights as initializer, in a Constant node, and in one that is a graph output."""
    made = model_proto(TEXT, w=LARGE, small=LARGE[0])
    for node in (n for n in made.graph.node if n.op_type == "Constant"):
        value = numpy_helper.from_array(LARGE * 2, "value")
        node.attribute.append(onnx.helper.make_attribute("value", value))
    return made


def test_only_large_data_is_left_out() -> None:
    whole = model()
    data = whole.SerializeToString()
    made = thin(data)
    assert [*made.initializers] == [0] and [*made.attributes] == [(1, 0), (2, 0)]
    assert len(made.model) < len(data) - 3 * LARGE.nbytes
    again = onnx.ModelProto.FromString(made.model)
    for tensor, span in (
        (again.graph.initializer[0], made.initializers[0]),
        (again.graph.node[1].attribute[0].t, made.attributes[1, 0]),
        (again.graph.node[2].attribute[0].t, made.attributes[2, 0]),
    ):
        assert not tensor.raw_data
        tensor.raw_data = data[span.offset : span.offset + span.size]
    assert again == whole


def test_rows_of_thin_tensors_have_their_bytes() -> None:
    whole = model()
    bare = onnx.ModelProto.FromString(thin(whole.SerializeToString()).model)
    pairs = zip(bare.graph.initializer, whole.graph.initializer, strict=True)
    assert all(stored_bytes(a) == stored_bytes(b) == b.ByteSize() for a, b in pairs)


def test_loaded_weights_are_views_into_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(model().SerializeToString())
    graph = load(path)
    constants = graph.constants()
    assert {n for n, c in constants.items() if is_stored(c)} == {"w", "k"}
    assert np.array_equal(array(constants["w"]), LARGE)
    assert np.array_equal(array(constants["k"]), LARGE * 2)
    x: dict[str, Array] = {"x": np.ones((1, 64), np.float32)}
    found = outputs(graph, x)
    assert np.allclose(found["y"], LARGE.sum(0) * 3 + LARGE[0])
    assert np.array_equal(found["c"], LARGE * 2)


def test_data_that_does_not_fill_its_shape_is_refused(tmp_path: Path) -> None:
    made = model()
    made.graph.initializer[0].dims[0] = 65
    (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
    with pytest.raises(Exception, match=r"'w' of shape \[65, 32\] has 8192 bytes .* expected 8320"):
        load(tmp_path / "m.onnx")


def test_external_tensors_are_left_alone() -> None:
    made = model()
    made.graph.initializer[0].data_location = TensorProto.EXTERNAL
    assert not thin(made.SerializeToString()).initializers
    made.graph.initializer[0].data_location = TensorProto.DEFAULT
    assert thin(made.SerializeToString()).initializers


@pytest.mark.parametrize("cut", [1, 100, 9000])
def test_truncated_files_are_for_the_parser(cut: int, tmp_path: Path) -> None:
    data = model().SerializeToString()[:-cut]
    with pytest.raises(UnusualError):
        thin(data)
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(Exception, match="not a readable ONNX model"):
        load(tmp_path / "m.onnx")


def test_messages_that_are_to_be_merged_are_for_the_parser(tmp_path: Path) -> None:
    """Protobuf joins what should be there once: two files in one are one model."""
    whole, more = model(), onnx.ModelProto()
    more.graph.initializer.append(numpy_helper.from_array(LARGE, "more"))
    data = whole.SerializeToString() + more.SerializeToString()
    with pytest.raises(UnusualError, match="once"):
        thin(data)
    (tmp_path / "m.onnx").write_bytes(data)
    found, storage = read_model(tmp_path / "m.onnx")
    assert [t.name for t in found.graph.initializer] == ["w", "small", "more"]
    assert not storage.spans


@pytest.mark.parametrize("data", [b"\xff" * 40, b"\x0b", b"\x3a\xff\xff\xff\xff\x0f", b"\x08"])
def test_no_protobuf(data: bytes) -> None:
    with pytest.raises(UnusualError):
        thin(data)


def test_numbers_on_the_wire() -> None:
    for value, wire in ((0, b"\0"), (127, b"\x7f"), (300, b"\xac\x02")):  # protobuf's own example
        assert varint(value) == wire


def test_a_walk_over_too_many_fields_ends() -> None:
    nodes = varint(1 << 3 | 2) + varint(0)  # an empty node
    graph = nodes * (1 << 20)
    with pytest.raises(UnusualError, match="more fields than a model has"):
        thin(varint(7 << 3 | 2) + varint(len(graph)) + graph)
