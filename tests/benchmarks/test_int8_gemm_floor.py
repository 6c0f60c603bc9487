"""int8_gemm_floor.py: the graph that it times holds the products it says, and counts them."""

from __future__ import annotations

import sys

import numpy as np
import onnx
import pytest

from benchmarks import int8_gemm_floor as floor
from qcompile.runtime.session import Session


def test_the_graph_is_all_products_and_they_are_right() -> None:
    size = floor.Size(layers=2, width=16, inner=32, tokens=5)
    model = floor.matmul_model(size)
    assert {n.op_type for n in model.graph.node} == {"MatMulIntegerToFloat"}
    assert len(model.graph.node) == 12
    found, given = Session(model.SerializeToString()).run(floor.feed(size)), floor.feed(size)
    values = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in model.graph.node:
        x = given[node.input[0]].astype(np.int64) - 128
        expected = (x @ values[node.input[1]].astype(np.int64)) * (0.02 * 0.01)
        # Two float32 scales are multiplied, and the sum by them: three roundings of 2^-24.
        atol = np.abs(expected).max() * 4 * 2.0**-24
        np.testing.assert_allclose(found[node.output[0]], expected, atol=atol)


def test_operations_are_products_and_sums() -> None:
    """BERT-base with 128 tokens: 7.1 million weights a layer."""
    size = floor.Size(layers=12, width=768, inner=3072, tokens=128)
    assert size.operations == 2 * 128 * 12 * (4 * 768 * 768 + 2 * 768 * 3072)


def test_it_prints_a_row_for_the_model_and_one_for_a_layer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = "--layers 2 --width 16 --tokens 4 --rounds 1 --seconds 0.01 --threads 1"
    monkeypatch.setattr(sys, "argv", ["product_floor.py", *small.split()])
    floor.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [row.split("│")[2].strip() for row in rows] == ["12", "6"]
