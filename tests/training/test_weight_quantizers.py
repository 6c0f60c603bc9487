"""Weights in training: the calibrated integers at first, then integers that the plan allows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qcompile.quant import (
    PAIR_SUM,
    Array,
    QParams,
    QSpec,
    Rounded,
    dequantize,
    real,
    stored_codes,
    worst_sums,
)
from qcompile.quant.rounding import RoundingProblem, compensated, few_bits_rounded, nearest
from qcompile.quant.weight_rounding import pairs, summed_first
from qcompile.rewriting.testing import normal
from qcompile.training.fake_quantizers import Grid, integers
from qcompile.training.weight_quantizers import WeightQuantizer

CHANNEL = QSpec("int8", symmetric=True, granularity="channel", axis=1, narrow=True)
PAIRED = replace(CHANNEL, paired=True)
ROWS = replace(CHANNEL, axis=0)
SPECS = {
    "channel": CHANNEL,
    "paired": PAIRED,
    "transposed": replace(PAIRED, axis=0),
    "rows": ROWS,
    "tensor": QSpec("int8", symmetric=True),
    "unsigned": QSpec("uint8", symmetric=False),
    "reduced": replace(CHANNEL, reduced=True),
    "wide": replace(CHANNEL, dtype="int16"),
    **{
        f"{width} bits, block {block}": replace(CHANNEL, width=width, block=block, narrow=False)
        for width in (2, 3, 4, 7)
        for block in (None, 8)
        if width < 7 or block is None
    },
    "rows of 2 bits": replace(ROWS, width=2, block=8, narrow=False),
}


def made(spec: QSpec, values: Array) -> WeightQuantizer:
    return WeightQuantizer(nearest(values, spec), values, spec)


def forward(quantizer: WeightQuantizer) -> Array:
    found: Array = quantizer(torch.zeros(())).detach().numpy()
    return found


def moved(quantizer: WeightQuantizer, seed: int = 0, by: float = 3.0) -> WeightQuantizer:
    """As after training: every value and every scale is another one."""
    latent, change = quantizer.latent, quantizer.scale.change
    with torch.no_grad():
        steps = torch.from_numpy(normal(*latent.shape, seed=seed) * by)
        latent.add_(steps * latent.abs().mean())
        change.add_(torch.from_numpy(normal(*change.shape, seed=seed + 1) / 5))
    return quantizer


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_first_step_is_the_calibrated_weight(spec: QSpec) -> None:
    values = normal(24, 10)
    calibrated = nearest(values, spec)
    quantizer = made(spec, values)
    np.testing.assert_array_equal(forward(quantizer), real(calibrated))
    same(quantizer.rounded(), calibrated)
    assert quantizer.on
    quantizer.on = False
    off = torch.from_numpy(values)
    assert quantizer(off) is off


def same(found: Rounded, expected: Rounded) -> None:
    for name in ("values", "steps"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert found.values.dtype == expected.values.dtype
    assert found.params.spec == expected.params.spec
    for mine, other in (
        (found.params.scale, expected.params.scale),
        (found.params.zero_point, expected.params.zero_point),
    ):
        np.testing.assert_array_equal(mine, other)
        assert mine.dtype == other.dtype and mine.shape == other.shape


def test_integers_of_gptq_are_kept_and_values_stay_near_them() -> None:
    """They may be steps away from the float weight: what is trained starts next to them."""
    values, data = normal(16, 6), normal(64, 16, seed=3)
    calibrated = compensated(values, data.T @ data, CHANNEL, 0.01)
    quantizer = WeightQuantizer(calibrated, values, CHANNEL)
    same(quantizer.rounded(), calibrated)
    distance = quantizer.values() / calibrated.params.scale - calibrated.values
    assert np.abs(distance).max() <= 0.4501
    assert np.abs(distance).max() > 0.2  # a small gradient moves some


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_written_is_what_the_forward_pass_has(spec: QSpec, seed: int) -> None:
    quantizer = moved(made(spec, normal(24, 10)), seed)
    quantizer.settle()
    rounded = quantizer.rounded()
    np.testing.assert_array_equal(forward(quantizer), real(rounded))
    low, high = spec.limits
    assert (rounded.values >= low).all() and (rounded.values <= high).all()
    quantizer.settle()
    same(quantizer.rounded(), rounded)


KERNELS = [("matrix", (25, 6)), ("transposed", (6, 25)), ("kernel", (6, 5, 3, 3))]


@pytest.mark.parametrize(("name", "shape"), KERNELS)
def test_pairs_keep_their_bound(name: str, shape: tuple[int, ...]) -> None:
    """However far training moves values: in the order in which the kernel sums."""
    spec = PAIRED if name == "matrix" else replace(PAIRED, axis=0)
    quantizer = moved(made(spec, normal(*shape)), by=9)
    found = quantizer.rounded().values.astype(np.int32)
    inputs = {"matrix": found, "transposed": found.T}.get(name)
    if inputs is None:
        inputs = summed_first(found)
    sums = worst_sums(*pairs(inputs))
    assert sums.max() == PAIR_SUM
    np.testing.assert_array_equal(forward(quantizer), real(quantizer.rounded()))
    unbound = WeightQuantizer(nearest(quantizer.values(), replace(spec, paired=False)),
                              quantizer.values(), replace(spec, paired=False))  # fmt: skip
    assert np.abs(unbound.rounded().values.astype(int)).max() == 127


@settings(max_examples=50, deadline=None)
@given(arrays(np.int8, (4, 3), elements=st.integers(-127, 127)))
def test_a_pair_is_changed_as_little_as_possible(q: Array) -> None:
    whole, one = torch.from_numpy(q.astype(np.float32)), torch.ones(1, 1)
    found = integers(whole, one, one * 0, Grid(-127, 127, pairs=0)).numpy()
    sums, old = worst_sums(*pairs(found)), worst_sums(*pairs(q.astype(np.float32)))
    np.testing.assert_array_equal(sums, np.minimum(old, PAIR_SUM))
    taken = np.abs(found - q)
    np.testing.assert_array_equal(taken[0::2] + taken[1::2], old - sums)
    assert (np.abs(taken[0::2] - taken[1::2]) <= 1).all()


@pytest.mark.parametrize("block", [None, 16, 32])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_multipliers_and_factors_of_rows_stay(width: int, block: int | None) -> None:
    spec = replace(CHANNEL, width=width, block=block, narrow=False)
    values = normal(40, 96)
    factors = np.where(np.arange(40) % 7 == 0, 2, 1).astype(np.uint8)
    calibrated = few_bits_rounded(RoundingProblem(values, spec, row_factors=factors))
    assert calibrated.steps is not None
    scaled = values * factors[:, None]
    quantizer = WeightQuantizer(calibrated, scaled, spec)
    same(quantizer.rounded(), calibrated)
    trained = moved(quantizer, by=2).rounded()
    np.testing.assert_array_equal(trained.steps, calibrated.steps)
    codes = trained.values / calibrated.steps
    np.testing.assert_array_equal(codes, np.rint(codes))
    assert codes.min() == -(2 ** (width - 1)) and codes.max() == 2 ** (width - 1) - 1
    stored = stored_codes(trained.values)
    assert stored is not None and stored.bits <= width


def test_settled_scales_are_exact_with_multipliers() -> None:
    """``narrow-qdq`` multiplies them by the scale of a block: float32 must not round that."""
    spec = replace(CHANNEL, width=4, block=8, narrow=False)
    quantizer = moved(made(spec, normal(32, 9)))
    before = quantizer.scale().detach()
    quantizer.settle()
    rounded = quantizer.rounded()
    np.testing.assert_allclose(quantizer.scale().detach(), before, rtol=2.0**-17)
    assert rounded.steps is not None
    codes, scale = rounded.values / rounded.steps, rounded.params.scale
    in_blocks = codes.astype(np.float32) * (rounded.steps.astype(np.float32) * scale)
    np.testing.assert_array_equal(in_blocks, forward(quantizer))


def test_rows_of_few_bits_that_repeat_others_follow_them() -> None:
    """``split-outliers`` appends them; the file has them once."""
    spec = replace(CHANNEL, width=4, block=8, narrow=False)
    first = nearest(normal(16, 6), spec)
    assert first.steps is not None
    again = [3, 9, 3]
    values, steps = (np.concatenate([part, part[again]]) for part in (first.values, first.steps))
    calibrated = Rounded(values, first.params, steps)
    quantizer = WeightQuantizer(calibrated, real(calibrated), spec)
    assert quantizer.latent.shape == (16, 6)
    same(quantizer.rounded(), calibrated)
    trained = moved(quantizer).rounded().values
    np.testing.assert_array_equal(trained[16:], trained[again])
    weights = torch.from_numpy(normal(19, 6))
    (quantizer(weights) * weights).sum().backward()
    assert quantizer.latent.grad is not None
    inside = quantizer.latent.grad[3] != 0
    expected = (weights[3] + weights[16] + weights[18])[inside]
    torch.testing.assert_close(quantizer.latent.grad[3][inside], expected)
    eight = Rounded(values, QParams(first.params.scale, first.params.zero_point, CHANNEL))
    assert WeightQuantizer(eight, real(eight), CHANNEL).latent.shape == (19, 6)


def test_a_weight_is_read_in_the_shape_of_the_graph() -> None:
    """An LSTM's has scales for the rows of all its directions together."""
    values = normal(2, 6, 5)
    quantizer = WeightQuantizer(nearest(values.reshape(12, 5), ROWS), values.reshape(12, 5), ROWS,
                                values.shape)  # fmt: skip
    assert forward(quantizer).shape == quantizer.values().shape == values.shape
    assert quantizer.rounded().values.shape == (12, 5)
    np.testing.assert_allclose(forward(quantizer), values, atol=0.02)


def test_any_axis_may_have_the_scales() -> None:
    spec = QSpec("int8", symmetric=True, granularity="channel", axis=2)
    values = normal(3, 4, 5, 2) * np.array([1, 5, 20, 1, 3], np.float32)[:, None]
    calibrated = nearest(values, spec)
    quantizer = WeightQuantizer(calibrated, values, spec)
    same(quantizer.rounded(), calibrated)
    np.testing.assert_array_equal(
        forward(quantizer), dequantize(calibrated.values, calibrated.params)
    )


def test_gradients_of_scales_are_those_of_lsq() -> None:
    """Esser et al. 2020, equation 3 and section 2.2, per channel and with steps of blocks."""
    spec = replace(CHANNEL, width=3, block=8, narrow=False)
    quantizer = moved(made(spec, normal(16, 5)), by=1)
    slope = torch.from_numpy(normal(16, 5, seed=4))
    (quantizer(slope) * slope).sum().backward()
    assert quantizer.steps is not None
    scale, steps = quantizer.scale().detach().numpy()[0], quantizer.steps.numpy()
    v = quantizer.latent.detach().numpy() / (scale * steps)
    inside = (v >= -4) & (v <= 3)
    assert inside.any() and not inside.all()
    each = np.where(inside, np.rint(v) - v, np.clip(v, -4, 3)) * steps * slope.numpy()
    expected = each.sum(0) * scale / (16 * 3) ** 0.5
    found, of_values = quantizer.scale.change.grad, quantizer.latent.grad
    assert found is not None and of_values is not None
    np.testing.assert_allclose(found.numpy()[0], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(of_values.numpy(), np.where(inside, slope.numpy(), 0))


def test_values_that_the_bound_on_pairs_changes_get_no_gradient() -> None:
    values = np.array([[100.0], [90.0], [100.0], [-90.0]], np.float32)
    params = QParams(np.ones(1, np.float32), np.zeros(1, np.int8), PAIRED)
    quantizer = WeightQuantizer(Rounded(values.astype(np.int8) // 2, params), values / 2, PAIRED)
    with torch.no_grad():
        quantizer.latent.copy_(torch.from_numpy(values))
    quantizer(torch.zeros(())).sum().backward()
    np.testing.assert_array_equal(quantizer.rounded().values[:, 0], [69, 59, 100, -90])
    assert quantizer.latent.grad is not None and quantizer.scale.change.grad is not None
    np.testing.assert_array_equal(quantizer.latent.grad[:, 0], [0, 0, 1, 1])
    np.testing.assert_allclose(
        quantizer.scale.change.grad.item(), 128 / (4 * 127) ** 0.5, rtol=1e-6
    )


def test_shapes_must_agree() -> None:
    values = normal(4, 4)
    with pytest.raises(ValueError, match=r"\(4, 4\) for a weight \(4, 3\)"):
        WeightQuantizer(nearest(values, CHANNEL), values[:, :3], CHANNEL)


def test_few_bits_need_their_steps() -> None:
    spec = replace(CHANNEL, width=4, narrow=False)
    made = nearest(normal(4, 4), spec)
    with pytest.raises(ValueError, match="without the steps"):
        WeightQuantizer(Rounded(made.values, made.params), normal(4, 4), spec)


@pytest.mark.parametrize("name", ["rows", "tensor", "unsigned", "rows of 2 bits"])
def test_rows_of_a_table_are_those_of_the_whole(name: str) -> None:
    """Values, and gradients of values and scales, with rows read twice and counted from the end."""
    table, index = normal(9, 16), torch.tensor([[3, 0, 3], [-1, 8, -9]])
    weight = torch.from_numpy(normal(2, 3, 16, seed=1))
    found = []
    for by_row in (False, True):
        quantizer = moved(made(SPECS[name], table))
        assert quantizer.is_table
        x = torch.from_numpy(table)
        rows = quantizer.rows(x, index) if by_row else quantizer(x)[index]
        (rows * weight).sum().backward()
        gradients = [quantizer.latent.grad, quantizer.scale.change.grad]
        found.append([rows.detach(), *(g for g in gradients if g is not None)])
    assert len(found[1]) == 3 and torch.equal(found[0][0], found[1][0])
    for whole, single in zip(*found, strict=True):
        torch.testing.assert_close(single, whole)


def test_a_table_that_is_switched_off_gives_the_float_rows() -> None:
    values = normal(4, 16)
    quantizer = made(ROWS, values)
    quantizer.on = False
    found = quantizer.rows(torch.from_numpy(values), torch.tensor([-1, 2]))
    assert np.array_equal(found.detach().numpy(), values[[3, 2]])


def test_scales_of_columns_make_no_table() -> None:
    assert not made(CHANNEL, normal(4, 16)).is_table
