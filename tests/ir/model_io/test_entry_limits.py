from __future__ import annotations

import onnx
import onnx.parser
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.errors import ModelError
from qcompile.ir.model_io.size_limits import check_entries
from qcompile.rewriting.testing import model_proto

TEXT = "g (float[N,2] x) => (float[N,2] y) <float[2] b = {1, 2}> { y = Add(x, b) }"


def entries(message: onnx.ModelProto) -> int:
    """By the parsed message: 2 for each message in it, 1 for each string, bytes or packed list."""
    count = 0
    for field, value in message.ListFields():
        values = value if field.is_repeated else [value]
        if field.message_type is not None:
            count += sum(2 + entries(v) for v in values)
        elif isinstance(values[0], str | bytes):
            count += len(values)
        elif field.is_packed:
            count += 1
    return count


def model(nodes: int = 1) -> onnx.ModelProto:
    made = model_proto(TEXT)
    for _ in range(nodes - 1):
        made.graph.node.add(op_type="Relu", input=["x"], output=["z"])
    return made


@pytest.mark.parametrize("nodes", [1, 50])
def test_the_count_is_that_of_the_parsed_model(nodes: int) -> None:
    made = model(nodes)
    count = entries(made)
    check_entries(made.SerializeToString(), "m", count)
    with pytest.raises(ModelError, match="m holds over"):
        check_entries(made.SerializeToString(), "m", count - 1)


def test_large_weights_cost_nothing() -> None:
    made = model()
    made.graph.initializer.add(name="w", dims=[1 << 20], data_type=2, raw_data=bytes(1 << 20))
    check_entries(made.SerializeToString(), "m", 100)


@given(st.binary(max_size=400), st.integers(0, 50))
def test_bytes_of_any_kind_end(data: bytes, most: int) -> None:
    try:
        check_entries(data, "m", most)
    except ModelError:
        assert len(data) > most
