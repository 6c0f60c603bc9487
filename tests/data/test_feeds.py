"""Feeds are checked against what the model declares, split, and their padding found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.data.feeds import (
    Feed,
    HoldOut,
    InputSpec,
    first_sample,
    input_specs,
    padding_mask,
    sample_count,
    split_to_fit,
)
from qcompile.data.open_data import open_data
from qcompile.errors import DataError, ModelError
from qcompile.ir.model_io.read_model import load
from qcompile.rewriting.testing import model_proto

F32, I64 = np.dtype(np.float32), np.dtype(np.int64)
X = InputSpec("x", F32, ("batch", 3))


def rows(count: int, start: int = 0) -> np.ndarray[Any, Any]:
    """float32 [count, 3], every value another."""
    return np.arange(start * 3, (start + count) * 3, dtype=np.float32).reshape(count, 3)


def test_input_specs_have_types_and_symbolic_dimensions() -> None:
    proto = model_proto("g (int64[N,S] ids, float[2,?] y) => (int64[N,S] o) { o = Identity(ids) }")
    ids, y = input_specs(load(proto))
    assert (ids.name, ids.dtype, ids.shape) == ("ids", I64, ("N", "S"))
    assert (y.name, y.dtype, y.shape) == ("y", F32, (2, None))


def test_input_specs_leave_out_initializers_and_know_unknown_ranks() -> None:
    proto = model_proto(
        "g (float x, float[3] w) => (float y) <float[3] w = {1,2,3}> { y = Add(x, w) }"
    )
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    proto.graph.input.append(onnx.helper.make_tensor_value_info("w", 1, [3]))
    assert input_specs(load(proto)) == (InputSpec("x", F32, None),)


def test_input_specs_of_bfloat16_and_of_negative_dimensions() -> None:
    proto = model_proto("g (bfloat16[N] x) => (bfloat16[N] y) { y = Identity(x) }")
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    (spec,) = input_specs(load(proto))
    assert spec.dtype.name == "bfloat16" and spec.shape == (None,)


def test_input_without_a_type_is_a_model_error() -> None:
    graph = load(model_proto("g (float[N] x) => (float[N] y) { y = Identity(x) }"))
    graph.inputs[0].dtype = None
    with pytest.raises(ModelError, match="input 'x' of the model is no tensor"):
        input_specs(graph)


def bad(value: object, spec: InputSpec = X) -> Callable[[], list[Feed]]:
    return lambda: list(open_data([{"x": rows(1)}, {"x": value}], [spec]))


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (bad(rows(1).astype(np.float64)), "feed 1, input 'x': found dtype float64, expected fl"),
        (bad(rows(1).astype(">f4")), "found dtype >f4, expected float32"),
        (bad(rows(2)[0]), r"feed 1, input 'x': found rank 1 \(shape \[3\]\), expected rank 2"),
        (bad(rows(2)[:, :2]), r"input 'x': found 2 on axis 1 .*, expected 3 \(\[batch, 3\]\)"),
        (bad(np.full((1, 3), np.nan, np.float32)), "feed 1, input 'x': found NaN or infinity"),
        (bad(np.full((1, 3), -np.inf, np.float32)), "feed 1, input 'x': found NaN or infinity"),
        (bad([[1.0], [2.0, 3.0]]), "feed 1, input 'x': list is no array"),
        (bad({"a": 1}), "found dtype object, expected float32"),
        (bad(rows(0)), "feed 1: holds no samples"),
        (lambda: list(open_data([(1, 2)], [X])), "feed 0: found tuple, expected a dict"),
        (lambda: list(open_data([{"z": 1}], [X])), "no array for input 'x'; found z, expected x"),
        (lambda: list(open_data([{}], [X])), "no array for input 'x'; found nothing"),
        (lambda: list(open_data([], [X])), "data yields no feeds"),
        (lambda: list(open_data(lambda: 3, [X])), "data is int, expected an iterable"),
        (lambda: open_data(3, [X]), "data is int, expected an iterable"),  # type: ignore[arg-type]
        (lambda: open_data([], [X], samples=0), "samples 0: expected at least 1"),
        (lambda: open_data([], [X], batch_size=-1), "batch size -1: expected at least 1"),
        (lambda: open_data([], [X], max_length=0), "length 0: expected at least 1"),
    ],
)
def test_python_data_that_does_not_fit(read: Callable[[], object], said: str) -> None:
    with pytest.raises(DataError, match=said):
        read()


def test_the_name_of_a_dimension_is_no_constraint() -> None:
    """ONNX Runtime takes any sizes; what fails there is explained there."""
    inputs = [InputSpec(name, I64, ("batch", "seq")) for name in ("ids", "mask")]
    feed = {"ids": np.ones((2, 4), np.int64), "mask": np.ones((2, 5), np.int64)}
    assert len(list(open_data([feed], inputs))) == 1


def test_a_past_of_length_0_does_not_count_as_samples() -> None:
    inputs = [InputSpec("past", F32, (None, None)), InputSpec("x", F32, (None, None))]
    feed = {"past": rows(0), "x": rows(3)}
    assert len(list(open_data([feed], inputs))) == 1
    with pytest.raises(DataError, match="holds no samples"):
        list(open_data([{"past": rows(0), "x": rows(0)}], inputs))


def test_unnamed_dimensions_differ_freely() -> None:
    inputs = [InputSpec(name, F32, (None, None)) for name in "ab"]
    assert len(list(open_data([{"a": rows(2), "b": rows(5)}], inputs))) == 1
    with pytest.raises(DataError, match=r"expected rank 2 \(\[\?, \?\]\)"):
        list(open_data([{"a": rows(2)[0], "b": rows(5)}], inputs))


def test_bfloat16_nan_is_found() -> None:
    bfloat = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16)
    spec = InputSpec("x", bfloat, ("n",))
    assert len(list(open_data([{"x": np.ones(2, bfloat)}], [spec]))) == 1
    with pytest.raises(DataError, match="found NaN"):
        list(open_data([{"x": np.asarray([np.nan], bfloat)}], [spec]))


def test_strings_fit_inputs_of_strings() -> None:
    spec = InputSpec("x", np.dtype(object), ("n",))
    assert len(list(open_data([{"x": np.asarray(["a", "bc"])}], [spec]))) == 1


def split(count: int, batch: int = 8, **options: int) -> tuple[list[Feed], HoldOut]:
    source = [{"x": rows(batch, start=i * batch)} for i in range(count)]
    holder = HoldOut(source, **options)
    return list(holder.calibration()), holder


def test_every_eighth_feed_is_held_back_up_to_a_bound() -> None:
    kept, holder = split(64)
    held = [int(f["x"][0, 0]) // 24 for f in holder.held_out]
    assert held == [1, 9, 17, 25] and len(kept) == 60 and not holder.reused


def test_a_lone_feed_serves_for_both_and_two_are_split() -> None:
    kept, holder = split(1)
    assert holder.reused and len(kept) == len(holder.held_out) == 1
    assert list(holder.calibration()) and holder.reused  # and again
    kept, holder = split(2, batch=100)
    assert not holder.reused and len(kept) == len(holder.held_out) == 1


def test_held_feeds_survive_a_source_that_reuses_its_array() -> None:
    def source() -> Iterator[Feed]:
        buffer = rows(1)
        for value in range(12):
            buffer[:] = value
            yield {"x": buffer}

    holder = HoldOut(source())
    list(holder.calibration())
    assert [f["x"][0, 0] for f in holder.held_out] == [1, 9]


def test_hold_back_needs_something_left() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        HoldOut([], every=1)


@pytest.mark.parametrize(
    ("limit", "divisible", "batches"),
    [(5, True, [5]), (3, True, [2, 3]), (2, True, [2, 1, 2]), (0, True, [1] * 5), (4, False, [5])],
)
def test_feeds_are_halved_until_each_fits(limit: int, divisible: bool, batches: list[int]) -> None:
    """What is left whole although it does not fit was shown to the last check."""
    seen: list[int] = []
    feed = {"x": rows(5)}
    parts = list(
        split_to_fit(
            feed,
            lambda part: len(part["x"]) <= limit,
            lambda part: seen.append(len(part["x"])),
            divisible=divisible,
        )
    )
    assert [len(p["x"]) for p in parts] == batches
    assert seen == [n for n in batches if n > limit]
    assert np.array_equal(np.concatenate([p["x"] for p in parts]), feed["x"])


def test_a_feed_whose_arrays_differ_in_batch_stays_whole() -> None:
    feed = {"x": rows(4), "bias": rows(1)}
    assert first_sample(feed) is feed
    assert [*split_to_fit(feed, lambda _: False, lambda _: None, divisible=True)] == [feed]
    with pytest.raises(DataError):
        list(split_to_fit(feed, lambda _: False, refused, divisible=True))


def refused(feed: Feed) -> None:
    raise DataError("too large")


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 9), st.integers(1, 64))
def test_splitting_loses_and_doubles_nothing(
    count: int, batch: int, every: int, at_most: int
) -> None:
    kept, holder = split(count, batch, every=every, at_most=at_most)
    first = [float(f["x"][0, 0]) for f in (*kept, *holder.held_out)]
    assert holder.reused == (count == 1) and kept and holder.held_out
    assert len(set(first)) == count and len(first) == count + holder.reused
    assert sum(map(sample_count, holder.held_out)) <= max(at_most, batch)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.bool_, np.float32])
def test_padding_mask(dtype: type) -> None:
    mask = padding_mask({"attention_mask": np.asarray([[1, 1, 0], [1, 1, 1]], dtype)})
    assert mask is not None and mask.dtype == np.bool_
    assert mask.tolist() == [[True, True, False], [True] * 3]


@pytest.mark.parametrize(
    "feed",
    [
        {},
        {"attention_mask": np.ones((2, 3), np.int64)},
        {"attention_mask": np.zeros((2, 1, 3), np.int64)},
        {"attention_mask": np.asarray([[0, -1e9]], np.float32)},  # additive
    ],
)
def test_no_padding_mask(feed: Feed) -> None:
    assert padding_mask(feed) is None
