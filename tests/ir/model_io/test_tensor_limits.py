from __future__ import annotations

import numpy as np
import pytest

from qcompile.errors import ModelError
from qcompile.ir.analysis import shape_inference
from qcompile.ir.model_io.from_proto import from_proto
from qcompile.rewriting.testing import model_proto


def infer(text: str) -> None:
    shape_inference.infer(from_proto(model_proto(text)))


@pytest.mark.parametrize(
    "text",
    [
        "g (float[1048576,4096] x) => (float[a,b] y) { y = Relu(x) }",  # 16 GiB, as declared
        """g (float[N,4] x) => (float[a] y) <int64[1] s = {268435456}>
        { big = ConstantOfShape(s)
          y = Add(big, big) }""",  # 1 GiB
    ],
)
def test_large_ones_pass(text: str) -> None:
    infer(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "g (float[8388608,4096] x) => (float[a,b] y) { y = Relu(x) }",
            "takes 137438953472 bytes, over 68719476736",
        ),
        (
            """g (float[N,4] x) => (float[a] y) <int64[1] s = {268435457}>
            { y = ConstantOfShape(s) }""",
            "'y' of shape [268435457] takes 1073741828 bytes, over 1073741824",
        ),
        (
            f"g (float[{','.join(['1'] * 65)}] x) => (float y) {{ y = Relu(x) }}",
            "has 65 axes, at most 64 expected",
        ),
    ],
)
def test_absurd_ones_are_refused(text: str, words: str) -> None:
    with pytest.raises(ModelError) as caught:
        infer(text)
    assert words in str(caught.value)


def test_what_is_made_of_a_large_constant_may_be_as_large() -> None:
    text = "g (float[N] x) => (float[a] y) { t = Neg(w) y = Add(x, t) }"
    graph = from_proto(model_proto(text, w=np.zeros(1, np.float32)))
    graph.constants()["w"].values = np.broadcast_to(np.float32(0), (1 << 29,))  # 2 GiB of nothing
    shape_inference.infer(graph)
