"""Operators without a name are named by their result in the report on saturation."""

from __future__ import annotations

import numpy as np

from qcompile.rewriting.testing import model_proto
from qcompile.runtime.evaluation.int16_saturation import bound, linears


def test_an_unnamed_operator_has_the_name_of_its_result() -> None:
    weight = np.full((4, 2), 127, np.int8)
    text = "g (uint8[n,4] a) => (int32[n,2] y) { y = MatMulInteger(a, w) }"
    model = model_proto(text, w=weight)
    [found] = linears(model)
    assert found.node == bound(found).node == "y"
    model.graph.node[0].name = "product"
    assert [linear.node for linear in linears(model)] == ["product"]
