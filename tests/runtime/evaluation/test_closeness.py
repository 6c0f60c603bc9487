"""Closeness by closed forms, padding left out, and every gate once passed and once failed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

import numpy as np
import pytest

from qcompile.errors import DataError
from qcompile.quant import Array
from qcompile.rewriting.testing import model_proto
from qcompile.runtime.evaluation import closeness as compare
from qcompile.runtime.evaluation.closeness import Closeness, Gates, Verdict, cosine, judge
from qcompile.runtime.session import Session

OPEN = Gates(**dict.fromkeys((f.name for f in fields(Gates)), None))


def closeness(a: Array, b: Array, mask: Array | None = None, name: str = "y") -> Closeness:
    found = Closeness(name)
    found.update(a, b, mask)
    return found


def verdict(
    a: Array, b: Array, gates: Gates = OPEN, feed: Mapping[str, Array] | None = None
) -> Verdict:
    a = np.asarray(a)
    feed = feed or {"x": np.zeros(a.shape[:1] or (1,))}
    return judge([({"y": a}, {"y": np.asarray(b)}, feed)], gates)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 0], [1, 0], 1),
        ([1, 0], [5, 0], 1),
        ([1, 0], [0, 1], 0),
        ([1, 0], [-1, 0], -1),
        ([1, 0], [1, 1], np.sqrt(0.5)),
        ([0, 0], [0, 0], 1),
        ([0, 0], [1, 0], 0),
        ([1, np.nan], [1, np.nan], 1),
        ([1, np.nan], [1, 2], 0),
        ([1, 2], [1, np.inf], 0),
        ([], [], 1),
        ([[1, 0], [0, 0]], [[1, 0], [0, 0]], 1),
        ([3e38, 3e38], [3e38, 3e38], 1),
    ],
)
def test_cosine(a: list[float], b: list[float], expected: float) -> None:
    assert cosine(np.array(a), np.array(b)) == pytest.approx(expected, abs=1e-12)


def test_closed_forms_over_two_batches() -> None:
    found = Closeness("y")
    found.update(np.array([[3.0, 4.0]]), np.array([[3.0, 4.5]]), None)
    found.update(np.array([[0.0, 5.0], [5.0, 0.0]]), np.array([[0.0, 4.0], [0.0, 5.0]]), None)
    assert found.cosine == pytest.approx([27 / (5 * np.hypot(3, 4.5)), 1, 0])
    assert found.mean_cosine == pytest.approx(np.mean(found.cosine))
    assert found.worst_cosine == 0
    assert found.sqnr_db == pytest.approx(10 * np.log10(75 / (0.25 + 1 + 50)))
    assert found.max_abs == 5
    assert (found.decisions, found.flips, found.flip_share) == (3, 1, 1 / 3)


def test_equal_outputs() -> None:
    a = np.array([[1.0, np.nan], [np.inf, 0.0]])
    found = closeness(a, a.copy())
    assert (found.mean_cosine, found.sqnr_db, found.max_abs) == (1, np.inf, 0)


def test_nothing_against_something() -> None:
    found = closeness(np.zeros((1, 2)), np.ones((1, 2)))
    assert (found.mean_cosine, found.sqnr_db, found.max_abs) == (0, 0, 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["reference", "candidate"])
def test_what_is_not_finite_in_one_is_as_bad_as_can_be(bad: float, where: str) -> None:
    a, b = np.ones((2, 3)), np.ones((2, 3))
    (a if where == "reference" else b)[1, 1] = bad
    found = closeness(a, b)
    assert (found.worst_cosine, found.sqnr_db, found.max_abs) == (0, -np.inf, np.inf)
    for gate in ("min_cosine", "min_worst_cosine", "min_sqnr", "max_abs"):
        limit = 1e30 if gate == "max_abs" else 0.9
        assert not verdict(a, b, replace(OPEN, **{gate: limit})).passed, gate


def test_padding_does_not_count() -> None:
    a = np.ones((2, 3, 4))
    b = a.copy()
    b[0, 2], b[1, 1:] = -9, np.nan
    mask = np.array([[1, 1, 0], [1, 0, 0]], bool)
    assert closeness(a, b, mask).cosine == pytest.approx([1, 1])
    assert closeness(a, b, mask).max_abs == 0
    assert closeness(a, b).max_abs == np.inf
    assert verdict(a, b, feed={"attention_mask": mask.astype(np.int64)}).outputs[0].max_abs == 0


def test_masks_leave_outputs_without_tokens_alone() -> None:
    """A pooled output [batch, hidden], whose second axis is as long as the sequence by chance."""
    a, mask = np.eye(2, 5), np.array([[1, 1, 0], [1, 0, 0]], bool)
    assert closeness(a, -a, mask).cosine == [-1, -1]


def test_a_sample_of_nothing_but_padding_does_not_count() -> None:
    a = np.ones((1, 2, 4))
    assert closeness(a, -a, np.zeros((1, 2), bool)).cosine == []


def test_comparing_nothing_is_no_pass() -> None:
    """All padding, or no values at all: a verdict on nothing would be a pass for anything."""
    a, none = np.ones((1, 2, 4), np.float32), np.zeros((1, 2), np.int64)
    with pytest.raises(DataError, match="nothing to compare"):
        verdict(a, -a, feed={"attention_mask": none})
    with pytest.raises(DataError, match="nothing to compare"):
        verdict(a[:, :0], a[:, :0], feed={"x": a})


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 1, 1)])
def test_one_number_a_sample_is_one_vector_of_all(shape: tuple[int, ...]) -> None:
    """By itself the second would have cosine -1, for an error of a hundredth of the largest."""
    a = np.array([1.0, 0.005, -2.0, 0.5]).reshape(shape)
    b = np.array([1.0, -0.005, -2.0, 0.5]).reshape(shape)
    found = verdict(a, b, feed={"x": a}).outputs[0]
    assert found.cosine == [pytest.approx(1 - 0.01**2 / 2 / 5.25, abs=1e-7)]
    wrong = verdict(a, a[::-1], feed={"x": a}).outputs[0]
    assert wrong.worst_cosine < 0.2


def test_samples_of_several_numbers_are_vectors_of_their_own() -> None:
    a = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert verdict(a, a * [[1], [-1]], feed={"x": a}).outputs[0].cosine == [1, -1]


@pytest.mark.parametrize(
    ("shape", "name", "decisions"),
    [
        ((4, 3), "y", 4),
        ((2, 5, 3), "logits", 10),
        ((2, 5, 3), "hidden", 0),
        ((4, 1), "y", 0),
        ((4,), "y", 0),
        ((), "y", 0),
    ],
)
def test_what_counts_as_a_decision(shape: tuple[int, ...], name: str, decisions: int) -> None:
    a = np.arange(np.prod(shape, dtype=int), dtype=float).reshape(shape)
    found = closeness(a, -a, name=name)
    assert (found.decisions, found.flips) == (decisions, decisions)
    assert closeness(a, a, name=name).flips == 0


A = np.array([[3.0, 4.0], [4.0, 3.0]])
B = np.array([[4.0, 3.0], [4.0, 3.0]])  # cosines 0.96... and 1, one flip, 1 apart
# Each column 7 ± 1 and ± 0.25 away from it: energies 8 and 0.5, with n - 1 for the first.
EIGHT = np.tile([[6.0, 8.0], [8.0, 6.0]], (4, 1)), np.tile([[6.25, 8.25], [8.25, 6.25]], (4, 1))


@pytest.mark.parametrize(
    ("gate", "passes", "fails", "said"),
    [
        ("min_cosine", 0.9799, 0.9801, r"mean cosine 0\.98 is below 0\.9801 \(--min-cosine\)"),
        ("min_worst_cosine", 0.9599, 0.9601, r"worst cosine 0\.96 is below .*--min-worst-cosine"),
        ("min_sqnr", 13.9, 14.1, r"SQNR in dB 13\.979 is below 14\.1 \(--min-sqnr\)"),
        ("max_flips", 0.5, 0.49, r"share of argmax flips 0\.5 is above 0\.49 \(--max-flips\)"),
        (
            "min_r2",
            0.94,
            0.95,
            r"R² 0\.945.* is below 0\.95 \(--min-r2\)",
        ),
        ("min_single_r2", 0.94, 0.95, r"R² 0\.945.* is below 0\.95 \(--min-single-r2\)"),
        ("max_abs", 1.0, 0.99, r"largest difference 1 is above 0\.99 \(--max-abs\)"),
    ],
)
def test_every_gate_passes_and_fails(gate: str, passes: float, fails: float, said: str) -> None:
    a, b = EIGHT if gate.endswith("r2") else (A, B)
    if gate == "min_single_r2":
        a, b = a[:, 0], b[:, 0]
    assert verdict(a, b, replace(OPEN, **{gate: passes})).passed
    (failure,) = verdict(a, b, replace(OPEN, **{gate: fails})).failures
    assert failure.startswith("output 'y': ")
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(failure)


def test_a_failure_shows_digits_that_differ_from_the_limit() -> None:
    close = np.array([[1.0, 1.0 + 2e-4]])
    found = verdict(close[:, ::-1], close, replace(OPEN, min_cosine=0.99999999)).failures
    assert found == ["output 'y': mean cosine 0.99999998 is below 0.99999999 (--min-cosine)"]


def test_every_gate_was_tested() -> None:
    (mark,) = test_every_gate_passes_and_fails.pytestmark  # type: ignore[attr-defined]
    tested = {case[0] for case in mark.args[1]}
    assert {f.name for f in fields(Gates)} == tested | {
        "max_latency_ratio",
        "max_size_ratio",
        "min_metric",
    }


def test_the_users_own_measure_is_a_gate() -> None:
    for limit, passed in ((0.8, True), (0.81, False)):
        found, gates = verdict(A, B), replace(OPEN, min_metric=limit)
        found.measured(0.9, 0.8, gates)
        assert found.passed == passed and found.to_dict()["metric"] == {
            "float": 0.9,
            "compiled": 0.8,
        }
    assert found.failures == ["metric 0.8 is below 0.81 (--min-metric), float has 0.9"]


def test_error_and_sqnr_of_a_verdict() -> None:
    """Cosines .96 and 1; signal 50, noise 2."""
    found = verdict(A, B)
    assert found.error == pytest.approx(0.02) and found.sqnr_db == pytest.approx(13.979, abs=1e-3)


def test_the_default_gates_let_int8_pass_and_rubbish_not() -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((8, 64))
    assert verdict(a, a + 0.05 * rng.standard_normal(a.shape), Gates()).passed
    assert len(verdict(a, rng.standard_normal(a.shape), Gates()).failures) == 3


def test_plain_values_for_reports() -> None:
    found = verdict(A, B, Gates(min_cosine=0.99)).to_dict()
    assert found["samples"] == 2 and len(found["failures"]) == 1
    (row,) = found["outputs"]
    assert (row["output"], row["worst_sample"], row["flip_share"]) == ("y", 0, 0.5)
    assert verdict(A, A).to_dict()["outputs"][0]["sqnr_db"] is None


def test_integers_and_text_count_where_they_differ() -> None:
    same = np.array([[1, 2]])
    assert verdict(same, same).outputs == []
    assert verdict(same, np.array([[1, 3]])).outputs[0].max_abs == 1
    words = np.array(["a", "b"], object)
    assert verdict(words, words, Gates()).passed
    assert verdict(words, words[::-1], Gates()).failures


@pytest.mark.parametrize(
    ("new", "said"),
    [
        ({}, "output 'y' of the reference is missing in the candidate"),
        ({"y": np.ones((1, 3))}, r"output 'y' is float64\[1, 3\], expected float64\[1, 2\]"),
        ({"y": np.ones((1, 2), int)}, r"output 'y' is int64\[1, 2\], expected float64"),
    ],
)
def test_outputs_that_do_not_match(new: dict[str, Array], said: str) -> None:
    with pytest.raises(DataError, match=said):
        judge([({"y": np.ones((1, 2))}, new, {"x": np.ones(1)})], OPEN)


def test_no_feed_is_an_error() -> None:
    with pytest.raises(DataError, match="the data holds no feed"):
        judge([], OPEN)


def test_two_models_side_by_side() -> None:
    text = "g (float[N,2] x) => (float[N,2] y) {{ y = {}(x) }}"
    models = (model_proto(text.format(op)) for op in ("Abs", "Relu"))
    old, new = (Session(m.SerializeToString()) for m in models)
    feeds = [{"x": np.array([[1, 2], [-1, 2]], np.float32)}, {"x": np.ones((1, 2), np.float32)}]
    found = compare.compare_outputs(old, new, feeds, Gates())
    assert found.samples == 3
    assert found.outputs[0].cosine == pytest.approx([1, 2 / np.sqrt(5), 1])
    assert compare.compare_outputs(old, old, feeds, Gates()).passed
