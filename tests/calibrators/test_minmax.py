"""Min-max: exact bounds, for tensors and channels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.calibrators.minmax import MinMax
from qcompile.quant import QSpec

TENSOR = QSpec("uint8", symmetric=False)
CHANNEL = QSpec("int8", symmetric=True, granularity="channel", axis=-1)


def test_range_over_batches_of_any_shape() -> None:
    observer = MinMax().observer(TENSOR)
    for batch in (np.ones((2, 3, 4)), np.full((1, 5), -2.5), np.array(7.0)):
        observer.update(batch)
    span = observer.range()
    assert (float(span.lo), float(span.hi)) == (-2.5, 7.0)
    assert span.axis is None
    assert span.lo.shape == ()


def test_channels_keep_their_own_range() -> None:
    observer = MinMax().observer(CHANNEL)
    observer.update(np.array([[1.0, -1.0, 0.0], [3.0, -9.0, 0.0]]))
    observer.update(np.array([[2.0, 5.0, -0.0]]))
    span = observer.range()
    assert span.lo.tolist() == [1.0, -9.0, 0.0]
    assert span.hi.tolist() == [3.0, 5.0, 0.0]
    assert span.axis == -1


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_range_contains_every_value_and_is_the_smallest(values: list[float]) -> None:
    observer = MinMax().observer(TENSOR)
    observer.update(np.array(values, np.float32))
    span = observer.range()
    assert (float(span.lo), float(span.hi)) == (min(values), max(values))


def test_nothing_seen_is_an_error_and_empty_batches_are_nothing() -> None:
    observer = MinMax().observer(CHANNEL)
    observer.update(np.empty((0, 4)))
    with pytest.raises(ValueError, match="no values seen"):
        observer.range()
