"""Axes of batch and sequence are followed from the mask, and unknown where they are not sure."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir.analysis.shape_probing import probed_shapes
from qcompile.ir.analysis.token_axes import FLAT, TOKENS, by_position, find_token_axes, token_axis
from qcompile.quant import Array
from qcompile.rewriting.testing import encoder, normal, parse
from qcompile.runtime.session import evaluate

B, S = "batch", "sequence"
INPUTS = "float[B,S,8] x, float[B,S,S] z, int64[B,S] attention_mask, float s, uint8 o"
VALUES: dict[str, Array] = {
    "w": normal(8, 8),
    "heads": np.array([0, 0, 2, 4]),
    "flat": np.array([-1, 0, 8]),
    "one": np.array([1]),
    "table": normal(64, 4),
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("y = MatMul(x, w)", (B, S, None)),
        ("y = MatMul(z, x)", (B, S, None)),
        ("y = com.microsoft.FusedMatMul<transB = 1>(x, x)", (B, S, S)),
        ("y = com.microsoft.FusedMatMul<transA = 1>(x, x)", None),
        ("y = Reshape(x, heads)", (B, S, None, None)),
        ("y = Reshape(x, flat)", (None, S, None)),
        ("y = Reshape<allowzero = 1>(x, heads)", None),
        ("r = Reshape(x, heads) y = Transpose<perm = [0, 2, 1, 3]>(r)", (B, None, S, None)),
        ("y = Gather(table, attention_mask)", (B, S, None)),
        ("y = com.microsoft.GatherBlockQuantized(table, attention_mask, s)", (B, S, None)),
        ("y = com.microsoft.GatherBlockQuantized(table, one, s)", None),
        (
            "y = com.microsoft.GatherBlockQuantized<gather_axis = 1>(table, attention_mask, s)",
            None,
        ),
        ("y = Gather<axis = 2>(x, one)", (B, S, None)),
        ("y = Gather<axis = 1>(x, one)", None),
        ("y = MatMulInteger(x, w)", (B, S, None)),
        ("y = QLinearMatMul(x, s, o, w, s, o, s, o)", (B, S, None)),
        ("y = QLinearMatMul(z, s, o, x, s, o, s, o)", (B, S, None)),
        ("y = com.microsoft.QGemm(x, s, o, w, s, o)", None),
        ("y = Add(x, w)", (B, S, None)),
        ("y = Celu(x)", (B, S, None)),
        ("y = Exp(x)", (B, S, None)),
        ("y = QuantizeLinear(x, s, o)", (B, S, None)),
        ("y = Softmax(z)", (B, S, S)),
        ("y = Concat<axis = -1>(x, x)", (B, S, None)),
        ("y = Concat<axis = 1>(x, x)", None),
        ("y = ReduceMax(x)", None),
    ],
)
def test_axes_of_results(text: str, expected: tuple[str | None, ...] | None) -> None:
    found = find_token_axes(parse(f"g ({INPUTS}) => (float y) {{ {text} }}", **VALUES))
    assert found.get("y") == expected
    assert by_position(found["x"])


def test_without_a_mask_nothing_is_known() -> None:
    graph = parse("g (float[B,S,8] x) => (float y) { y = Relu(x) }")
    assert find_token_axes(graph) == {}


def test_only_three_axes_with_both_known_are_positions() -> None:
    assert not by_position(None)
    assert not by_position((B, S))
    assert not by_position((B, None, S))


def test_everything_in_an_encoder_that_has_a_row_a_token() -> None:
    found = {name for name, known in find_token_axes(encoder(1)).items() if by_position(known)}
    assert {"t", "e", "a", "qb0", "kb0", "vb0", "cr0", "g0", "u0", "x0", "r0", "y0", "z0"} <= found
    assert not {"q0", "k0", "s0", "p0", "c0", "bias"} & found


# By sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected", "axis"),
    [
        ("y = Neg(x)", (B, S, None), 1),
        ("y = Transpose<perm = [0, 2, 1]>(x)", (B, None, S), None),
        ("r = Reshape(x, heads) y = Transpose<perm = [0, 2, 1, 3]>(r)", (B, None, S, None), 2),
        ("y = Transpose<perm = [1, 0, 2]>(x)", None, None),
        ("y = Reshape(x, rows)", (TOKENS, None), FLAT),
        ("y = ReduceMax(x)", None, None),
    ],
)
def test_axes_whose_sizes_agree_with_the_masks(
    text: str, expected: tuple[str | None, ...] | None, axis: int | None
) -> None:
    graph = parse(f"g ({INPUTS}) => (float y) {{ {text} }}", **VALUES, rows=np.array([-1, 8]))
    known = find_token_axes(graph, lambda: probed_shapes(graph, evaluate)).get("y")
    assert known == expected and token_axis(known) == axis
