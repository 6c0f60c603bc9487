"""Axes as products of factors: what is merged stays merged, however it is split later."""

from __future__ import annotations

import pytest

from qcompile.ir.analysis.axis_factors import (
    Axis,
    Size,
    axis_of,
    leaves,
    pin,
    regroup,
    size_of,
    unify,
)

BATCH: Size = (7, 13, 1)
TOKENS: Size = (11, 5, 1)


def fixed(size: int) -> Axis:
    return axis_of((size, size, size))


def sizes(axis: Axis) -> list[int | None]:
    return [f.fixed for f in leaves(axis)]


def test_an_axis_of_size_one_has_no_factors() -> None:
    assert fixed(1) == []
    assert len(axis_of(BATCH)) == 1


def test_a_split_reaches_what_was_merged_before() -> None:
    bias, stream, scale = fixed(12), fixed(12), fixed(12)
    assert unify(bias, stream) and unify(stream, scale)
    made = regroup([stream], [(3, 3, 3), (4, 4, 4)])
    assert made is not None and [sizes(a) for a in made] == [[3], [4]]
    assert leaves(bias) == leaves(scale) == [*made[0], *made[1]]


def test_axes_split_in_different_ways_meet_in_the_finest() -> None:
    left, right = fixed(24), fixed(24)
    assert regroup([left], [(2, 2, 2), (12, 12, 12)]) is not None
    assert regroup([right], [(6, 6, 6), (4, 4, 4)]) is not None
    assert unify(left, right)
    assert sizes(left) == sizes(right) == [2, 3, 4]
    assert leaves(left) == leaves(right)


def test_factors_that_do_not_line_up() -> None:
    left, right = fixed(12), fixed(12)
    assert regroup([left], [(4, 4, 4), (3, 3, 3)]) is not None
    assert regroup([right], [(6, 6, 6), (2, 2, 2)]) is not None
    assert not unify(left, right)
    assert not unify(fixed(3), fixed(6))


def test_an_axis_merged_with_itself() -> None:
    axis = fixed(12)
    assert unify(axis, axis) and sizes(axis) == [12]
    assert unify([*axis, *axis], fixed(144)) and sizes([*axis, *axis]) == [12, 12]


def test_batch_and_tokens_are_flattened_and_come_back() -> None:
    batch, tokens, channels = axis_of(BATCH), axis_of(TOKENS), fixed(8)
    rows = tuple(b * t for b, t in zip(BATCH, TOKENS, strict=True))
    flat = regroup([batch, tokens, channels], [rows, (8, 8, 8)])
    assert flat == [[*batch, *tokens], channels]
    assert regroup(flat, [BATCH, TOKENS, (2, 2, 2), (4, 4, 4)]) is not None
    assert sizes(channels) == [2, 4]


@pytest.mark.parametrize("target", [[5], [4], [24], [12, 2], [8, 3, 1]])
def test_a_reshape_that_does_not_fit(target: list[int]) -> None:
    axes = [fixed(4), fixed(3)]
    assert regroup(axes, [(n, n, n) for n in target]) is None


def test_pins_and_weights_outlive_merges_and_splits() -> None:
    pinned, weighted = fixed(12), fixed(12)
    pin(pinned, "Slice 's' splits it")
    pin(pinned, "a later reason")
    weighted[0].weighted = True
    assert unify(weighted, pinned) and regroup([weighted], [(3, 3, 3), (4, 4, 4)]) is not None
    for factor in leaves(pinned):
        assert (factor.pinned, factor.weighted) == ("Slice 's' splits it", True)


def test_sizes_multiply() -> None:
    assert size_of([*axis_of(BATCH), *fixed(3)], 3) == (21, 39, 3)
    assert size_of([], 3) == (1, 1, 1)


def test_a_long_chain_of_merges_is_not_walked_one_by_one() -> None:
    """Deeper than Python's recursion limit, were each merge to hang on the last."""
    axis = fixed(8)
    for _ in range(5000):
        joined = fixed(8)
        assert unify(joined, axis)
    assert len(leaves(axis)) == 1
