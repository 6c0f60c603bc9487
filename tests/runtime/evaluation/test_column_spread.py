"""R² by its definition, over all columns at once, and errors that a cosine does not show."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.quant import Array
from qcompile.runtime.evaluation.closeness import Closeness, Gates, judge
from qcompile.runtime.evaluation.column_spread import ColumnGroup, ColumnSpread, worst_group

RNG = np.random.default_rng(5)


def spread(reference: Array, candidate: Array, rows: int = 0) -> ColumnGroup | None:
    collected = ColumnSpread()
    x, y = np.asarray(reference, float), np.asarray(candidate, float)
    for part in (slice(0, 3), slice(3, None)):  # however they are divided
        if x[part].size:
            collected.update(x[part], y[part], rows=rows)
    return worst_group(collected.groups())


def worst(reference: Array, candidate: Array, rows: int = 0) -> ColumnGroup:
    found = spread(reference, candidate, rows)
    assert found is not None
    return found


@settings(max_examples=40)
@given(st.integers(8, 40), st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_r2_by_its_definition_however_the_samples_come(n: int, columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(rng.normal(0, 100), 1, (n, columns))
    y = x + rng.normal(0, 0.2, x.shape)
    own = np.square(x - x.mean(0)).sum() * n / (n - 1)
    expected = 1 - np.square(x - y).sum() / own
    found = worst(x, y)
    assert (found.axis, found.columns, found.of) == (1, list(range(columns)), columns)
    assert found.r2 == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert worst(x, x).r2 == 1
    constant = np.broadcast_to(x.mean(0), x.shape)
    assert worst(x, constant).r2 == pytest.approx(1 / n, abs=1e-6)


def test_small_columns_are_not_hidden_by_large_ones() -> None:
    """Boxes in pixels next to scores, channels first and channels last."""
    boxes, scores = RNG.normal(320, 100, (6, 4, 20)), RNG.uniform(0, 0.1, (6, 10, 20))
    x = np.concatenate([boxes, scores], 1)
    y = np.concatenate([boxes, np.full_like(scores, 0.05)], 1)
    assert judge([({"y": x}, {"y": y}, {"x": x})], Gates(min_r2=None)).failures == []
    [failure] = judge([({"y": x}, {"y": y}, {"x": x})], Gates()).failures
    assert "R² of columns 4-13 of 14 on axis 1" in failure
    for axes in ((0, 1, 2), (0, 2, 1)):
        found = worst(x.transpose(axes), y.transpose(axes))
        assert (found.axis, found.columns, found.of) == (axes.index(1), list(range(4, 14)), 14)
        assert found.r2 == pytest.approx(0, abs=0.05)
    assert str(worst(x, y)) == "columns 4-13 of 14 on axis 1"


def test_a_constant_answer_far_from_zero_is_no_answer() -> None:
    price = RNG.normal(200_000, 30_000, 64)
    found = judge([({"y": price}, {"y": np.full(64, 200_000.0)}, {"x": price})], Gates())
    assert found.outputs[0].mean_cosine > 0.98
    assert found.failures[0].endswith("is below 0.9 (--min-single-r2)")


def test_a_scaled_answer_has_another_spread() -> None:
    """A cosine does not see a factor: here of .61, in the logits of a reranker."""
    logits = RNG.normal(-4, 2, (32, 1))
    found = judge([({"y": logits}, {"y": 0.61 * logits}, {"x": logits})], Gates())
    assert found.outputs[0].mean_cosine == pytest.approx(1)
    assert [f.split(" (")[1] for f in found.failures] == ["--min-single-r2)"]


def test_axes_of_changing_size_have_no_columns() -> None:
    collected = ColumnSpread()
    for tokens in (3, 5, 4):
        x = RNG.normal(size=(tokens, 8))
        collected.update(x[None], x[None] + 0.1)
    found = worst_group(collected.groups())
    assert found is not None and (found.axis, found.of) == (2, 8)
    collected = ColumnSpread()
    for tokens in (3, 5, 4):
        x = RNG.normal(size=tokens)
        collected.update(x[None], -x[None])
    found = worst_group(collected.groups())
    assert found is not None and (found.of, str(found)) == (1, "") and found.r2 < -2


def test_positions_are_no_columns() -> None:
    """A margin that is empty in all images, and whose small values are all wrong."""
    x = RNG.uniform(size=(8, 3, 40, 48))
    x[:, :, :10] *= 1e-5
    y = x.copy()
    y[:, :, :10] = 0
    for axes in ((0, 1, 2, 3), (0, 2, 3, 1)):  # channels first and last
        found = worst(x.transpose(axes), y.transpose(axes))
        assert found.of == 3 and found.r2 > 0.99
    one = worst(x[:, :1], y[:, :1])
    assert one.of == 1 and one.r2 > 0.99
    assert worst(x.reshape(8, 3, -1), y.reshape(8, 3, -1)).of == 3


def test_anchors_do_not_hide_the_columns_behind_them() -> None:
    """[batch, anchors, height, width, values]."""
    x = RNG.normal(size=(4, 3, 5, 5, 7)) * np.repeat([100, 0.01], [4, 3])
    y = x.copy()
    y[..., 4:] = 0
    found = worst(x, y)
    assert (found.axis, found.columns) == (4, [4, 5, 6])


def test_real_tokens_only() -> None:
    """Axis 1 has as many columns as the first sample has tokens, unless it is said to hold rows."""
    x = RNG.normal(size=(8, 4, 16)) * np.array([1, 1, 1, 1e-3])[:, None]
    y = x + RNG.normal(0, 1e-2, x.shape)
    assert worst(x, y).axis == 1
    assert worst(x, y, rows=1).axis == 2


def test_columns_that_do_not_count() -> None:
    x = RNG.normal(size=(16, 64))
    x[:, 0] = 7  # constant
    x[:, 1] = 7 + 1e-4 * x[:, 1]  # constant for float32
    x[:, 2] *= 1e-2  # one of 64
    y = x.copy()
    y[:, :3] = 0
    assert worst(x, y).r2 == 1
    assert worst(x[:, 1:6], y[:, 1:6]).r2 < 0.1  # one of five
    assert spread(x[:7], y[:7]) is None  # seven values tell no spread
    assert spread(x[:, :2], y[:, :2]) is None


def test_errors_finer_than_8_bits_fail_no_gate() -> None:
    """Boxes in a small part of the image: half of their spread is a thousandth of their size."""
    x = 1 + RNG.normal(0, 1e-3, (64, 4))
    for error, failed in ((0.9e-3, False), (1.2e-3, True)):
        y = x + RNG.normal(0, error, x.shape)
        found = judge([({"y": x}, {"y": y}, {"x": x})], Gates())
        assert found.outputs[0].r2 is not None and found.outputs[0].r2 < 0.3
        assert bool(found.failures) == failed


def test_offsets_of_many_positions_fail_no_gate_by_what_integers_leave_of_them() -> None:
    """Queries that all answer alike: their small spread is no answer, unless much is lost."""
    x = 1 + RNG.normal(0, 0.01, (16, 10, 6))
    for error, failed in ((0.013, False), (0.02, True)):
        y = x + RNG.normal(0, error, x.shape)
        assert bool(judge([({"y": x}, {"y": y}, {"x": x})], Gates()).failures) == failed
        flat = judge([({"y": x[:, 0]}, {"y": y[:, 0]}, {"x": x})], Gates())
        assert flat.failures  # one position in a sample


def test_infinite_values_are_left_out() -> None:
    x = RNG.normal(size=(16, 3))
    x[3, 1] = -np.inf
    y = x.copy()
    y[4, 2] = np.nan
    assert worst(x, y).r2 == 1


def test_the_error_is_half_of_what_is_lost() -> None:
    x = RNG.normal(size=(400, 64))
    y = x + RNG.normal(0, 0.05, x.shape)
    found = Closeness("y")
    found.update(x, y, None)
    found.close()
    assert found.r2 == pytest.approx(1 - 0.05**2, abs=2e-4)
    assert found.error == pytest.approx(1 - found.mean_cosine, rel=0.1)
    offset = Closeness("y")
    offset.update(x + 100, y + 100, None)
    offset.close()
    assert offset.error == pytest.approx(found.error, rel=0.1)
    assert 1 - offset.mean_cosine < 1e-6


def test_lost_scores_are_a_larger_error_than_boxes_a_pixel_off() -> None:
    boxes, scores = RNG.normal(320, 100, (6, 4, 20)), RNG.uniform(0, 0.1, (6, 10, 20))
    x = np.concatenate([boxes, scores], 1)
    errors = []
    for y in (np.concatenate([boxes + 1, scores], 1), np.concatenate([boxes, 0 * scores], 1)):
        found = Closeness("y")
        found.update(x, y, None)
        found.close()
        errors.append(found.error)
    assert errors[0] < 1e-4 and errors[1] > 0.5
