"""Weights become integers: to nearest, or so that rows make up for each other's error."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qcompile.quant import PAIR_SUM, Array, QSpec, dequantize, qparams, quantize, real, worst_sums
from qcompile.quant.affine import weight_range
from qcompile.quant.rounding import compensated, nearest
from qcompile.quant.weight_rounding import pairs, weight_params
from qcompile.rewriting.testing import normal
from qcompile.targets.cpu import ALONE as WEIGHT
from qcompile.targets.cpu import WEIGHT as PAIRED

properties = settings(deadline=None, derandomize=True, max_examples=60)
floats = st.floats(-(2.0**20), 2.0**20, width=32)
weights = st.integers(1, 6).flatmap(lambda n: arrays(np.float32, (n, 3), elements=floats))
PER_TENSOR = QSpec("int8", symmetric=True)
BY_ROW = QSpec("int8", True, "channel", 0, narrow=True, paired=True)
SPECS = [WEIGHT, PER_TENSOR, QSpec("int8", True, "channel", 0, narrow=True), QSpec("int16", True)]


def data(rows: int, channels: int, seed: int = 0) -> Array:
    """Rows whose channels are sums of a quarter as many sources: far from independent."""
    sources = max(1, channels // 4)
    mixed = normal(rows, sources, seed=seed) @ normal(sources, channels, seed=seed + 1)
    return mixed + np.float32(0.1) * normal(rows, channels, seed=seed + 2)


def gram(x: Array) -> Array:
    found: Array = x.T @ x
    return found


def output_error(x: Array, w: Array, rounded: Array) -> float:
    return float(np.linalg.norm(x.astype(np.float64) @ (w - rounded.astype(np.float64))))


@given(weights, st.sampled_from(SPECS))
@properties
def test_nearest_is_quantization_by_the_weights_own_extrema(w: Array, spec: QSpec) -> None:
    found, params = nearest(w, spec), qparams(weight_range(w, spec), spec)
    assert np.array_equal(found.values, quantize(w, params))
    assert found.values.dtype == spec.dtype
    assert np.array_equal(real(found), dequantize(found.values, params))


def test_nearest_rejects_what_has_no_range() -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        nearest(np.array([[np.nan]], np.float32), WEIGHT)
    with pytest.raises(ValueError, match="empty constant"):
        nearest(np.zeros((0, 3), np.float32), WEIGHT)


@given(weights, st.integers(0, 9), st.floats(1e-3, 10))
@properties
def test_compensated_integers_are_those_of_the_spec(w: Array, seed: int, damping: float) -> None:
    """Carried errors would push values beyond the range of the weight."""
    moments = gram(data(20, len(w), seed))
    found, plain = compensated(w, moments, WEIGHT, damping), nearest(w, WEIGHT)
    low, high = WEIGHT.limits
    assert found.values.dtype == np.int8 and found.values.shape == w.shape
    assert found.values.min() >= low and found.values.max() <= high
    assert np.array_equal(found.params.scale, plain.params.scale)


@given(weights, st.integers(0, 9))
@properties
def test_uncorrelated_channels_have_nothing_to_make_up_for(w: Array, seed: int) -> None:
    """The inverse of a diagonal is one: no error is carried."""
    energy = np.random.default_rng(seed).uniform(0.1, 10, len(w))
    found = compensated(w, np.diag(energy), WEIGHT, damping=0.5)
    assert np.array_equal(found.values, nearest(w, WEIGHT).values)


def test_damping_without_bound_is_nearest() -> None:
    """What is carried is the error over the damping: nothing is left of half a step at 1e9."""
    w, x = normal(64, 16), data(200, 64)
    found = compensated(w, gram(x), WEIGHT, damping=1e9)
    assert np.array_equal(found.values, nearest(w, WEIGHT).values)


@pytest.mark.parametrize("damping", [1e-3, 0.01, 0.1, 1.0])
def test_the_product_errs_less_than_with_nearest(damping: float) -> None:
    """On the data itself; the weight errs more. Damped by all of it, a fifth is left to gain."""
    w, x = normal(96, 32), data(400, 96)
    found, plain = compensated(w, gram(x), WEIGHT, damping), nearest(w, WEIGHT)
    share = output_error(x, w, real(found)) / output_error(x, w, real(plain))
    assert share < (0.5 if damping < 0.5 else 0.8)
    assert np.square(w - real(found)).sum() > np.square(w - real(plain)).sum()


@pytest.mark.parametrize("damping", [1e-9, 1e-6, 1e-3])
def test_hardly_damped_moments_of_few_rows_can_be_factored(damping: float) -> None:
    """400 rows leave half of 768 channels without any energy but the damping's."""
    w, x = normal(768, 4), data(400, 768)
    found = compensated(w, gram(x), WEIGHT, damping)
    assert output_error(x, w, real(found)) < 0.5 * output_error(x, w, real(nearest(w, WEIGHT)))


def test_new_data_of_the_same_kind_gains_too() -> None:
    w, seen = normal(96, 32), data(400, 96)
    unseen = seen[:100] + 0.1 * normal(100, 96, seed=9)
    found, plain = compensated(w, gram(seen), WEIGHT, 1.0), nearest(w, WEIGHT)
    assert output_error(unseen, w, real(found)) < 0.9 * output_error(unseen, w, real(plain))


@pytest.mark.parametrize("inputs", [1, 63, 64, 65, 200])
def test_blocks_do_not_show(inputs: int) -> None:
    """Row by row as the paper has it; blocks of 64 add up in another order, so ties may fall."""
    w, moments = normal(inputs, 8), gram(data(300, inputs)).astype(np.float64)
    found = compensated(w, moments, WEIGHT, 0.1).values.astype(int)
    assert (found != plainly(w, moments, 0.1)).mean() < 0.01


def plainly(w: Array, moments: Array, damping: float) -> Array:
    """Algorithm 1 of Frantar et al. without blocks, in float64: integers (inputs, outputs)."""
    scale = nearest(w, WEIGHT).params.scale
    order = np.argsort(-np.diagonal(moments), kind="stable")
    damped = moments[np.ix_(order, order)] + damping * np.diagonal(moments).mean() * np.eye(len(w))
    inverse, rows = np.linalg.inv(damped), w[order].astype(np.float64)
    found = np.zeros(w.shape, int)
    for i in range(len(rows)):
        steps = np.clip(np.rint(rows[i] / scale), -127, 127)
        found[order[i]] = steps
        carried = inverse[i + 1 :, i] / inverse[i, i]
        rows[i + 1 :] -= np.outer(carried, rows[i] - steps * scale)
        rest = inverse[i + 1 :, i + 1 :]
        inverse[i + 1 :, i + 1 :] = rest - np.outer(inverse[i + 1 :, i], carried)
    return found


@pytest.mark.parametrize("spec", [PER_TENSOR, QSpec("int8", True, "channel", 0)], ids=str)
def test_other_scales_than_per_output_fall_back_to_nearest(spec: QSpec) -> None:
    w, x = normal(16, 4), data(50, 16)
    assert np.array_equal(compensated(w, gram(x), spec, 0.01).values, nearest(w, spec).values)


def test_an_axis_from_the_back_is_the_same_axis() -> None:
    w, moments = normal(16, 4), gram(data(50, 16))
    back = QSpec("int8", True, "channel", -1, narrow=True)
    found = compensated(w, moments, back, 0.01).values
    assert np.array_equal(found, compensated(w, moments, WEIGHT, 0.01).values)


def test_data_of_zeros_falls_back_to_nearest() -> None:
    w = normal(4, 3)
    found = compensated(w, np.zeros((4, 4), np.float32), WEIGHT, 1.0)
    assert np.array_equal(found.values, nearest(w, WEIGHT).values)


def test_a_channel_that_was_always_zero_is_rounded_all_the_same() -> None:
    w, x = normal(8, 3), data(50, 8)
    x[:, 3] = 0
    found = compensated(w, gram(x), WEIGHT, 1e-3)
    assert np.array_equal(found.values[3], nearest(w, WEIGHT).values[3])


# Pairs whose sums fit into int16 ----------------------------------------------------------------


def sums(rounded: Array) -> Array:
    """The largest magnitude that each pair of rows (2i, 2i + 1) can sum to, by brute force."""
    wide = rounded.astype(int)
    wide = np.concatenate([wide, np.zeros((len(wide) % 2, wide.shape[1]), int)])
    a, b = wide[0::2], wide[1::2]
    corners = np.stack([np.zeros_like(a), a, b, a + b])  # each activation is 0 or the largest
    found: Array = np.abs(corners).max(0)
    return found


@given(weights)
@properties
def test_rounded_to_nearest_no_pair_exceeds_the_bound(w: Array) -> None:
    found = nearest(w, PAIRED)
    assert sums(found.values).max() <= PAIR_SUM
    assert np.array_equal(found.values, quantize(w, found.params))  # without any clamping
    assert np.array_equal(found.values, nearest(w.T.copy(), BY_ROW).values.T)


@given(weights)
@properties
def test_the_scale_grows_by_what_the_worst_pair_needs_and_no_more(w: Array) -> None:
    plain, found = qparams(weight_range(w, WEIGHT), WEIGHT).scale, weight_params(w, PAIRED).scale
    needed = worst_sums(*pairs(w)).max(0, initial=0) / 127.5
    np.testing.assert_allclose(found, np.maximum(plain, needed), rtol=2.0**-22)
    assert (found <= plain * np.float32(2)).all()


def test_pairs_of_opposite_signs_keep_all_eight_bits() -> None:
    w = np.array([[1.0, 1.0], [-1.0, 1.0]], np.float32)
    found = nearest(w, PAIRED)
    np.testing.assert_array_equal(found.values, [[127, 64], [-127, 64]])


def test_a_bound_on_pairs_is_seen_to_be_broken_without_it() -> None:
    w = normal(64, 16)
    assert sums(nearest(w, WEIGHT).values).max() > PAIR_SUM
    assert sums(compensated(w, gram(data(200, 64)), WEIGHT, 0.1).values).max() > PAIR_SUM


@given(weights, st.integers(0, 9), st.floats(1e-3, 10))
@properties
def test_carried_errors_keep_the_bound_too(w: Array, seed: int, damping: float) -> None:
    found = compensated(w, gram(data(20, len(w), seed)), PAIRED, damping)
    assert sums(found.values).max() <= PAIR_SUM
    assert np.array_equal(found.params.scale, nearest(w, PAIRED).params.scale)


@pytest.mark.parametrize("inputs", [63, 64, 65, 200])
def test_clamped_rows_are_made_up_for(inputs: int) -> None:
    """All of one sign, so that every pair is near the bound and errors are carried over it."""
    w, x = np.abs(normal(inputs, 16)) + 1, data(300, inputs)
    found, plain = compensated(w, gram(x), PAIRED, 0.1), nearest(w, PAIRED)
    assert sums(found.values).max() == PAIR_SUM
    assert output_error(x, w, real(found)) < 0.6 * output_error(x, w, real(plain))


def test_pairs_are_those_of_a_matrix() -> None:
    with pytest.raises(ValueError, match="pairs need a matrix"):
        nearest(normal(4, 3, 2), PAIRED)
    with pytest.raises(ValueError, match="symmetric int8 by channel"):
        QSpec("int8", symmetric=True, paired=True)
    assert str(PAIRED) == "int8:sym:channel[1]:pairs"
