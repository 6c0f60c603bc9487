"""Answers that depend on batch mates or padding are found, and others are not accused."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.data.feeds import Feed
from qcompile.errors import ModelError
from qcompile.quant import Array
from qcompile.rewriting.testing import normal
from qcompile.runtime.evaluation.batch_invariance import EQUAL, Invariance, invariance

MASK = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 1, 1]], np.int64)


def feed(mask: Array = MASK) -> Feed:
    return {"x": normal(*mask.shape, 6), "attention_mask": mask}


def honest(feed: Feed) -> dict[str, Array]:
    """By position, and a sum of what is no padding."""
    real = feed["attention_mask"][..., None]
    return {"y": np.tanh(feed["x"]), "pooled": (feed["x"] * real).sum(1)}


def by_batch(feed: Feed) -> dict[str, Array]:
    """Steps that are taken from the range of the batch."""
    step = np.abs(feed["x"]).max() / 8
    return {"y": np.rint(feed["x"] / step) * step}


def by_length(feed: Feed) -> dict[str, Array]:
    """A mean over the padding too."""
    shifted: Array = feed["x"] - feed["x"].sum(1, keepdims=True) / feed["x"].shape[1] ** 2
    return {"y": shifted}


def test_a_model_that_looks_at_nothing_else() -> None:
    found = invariance(honest, [feed()])
    assert found.alone is not None and found.alone > EQUAL
    assert found.padded is not None and found.padded > EQUAL
    assert found.note is None


def test_ranges_of_the_batch_show() -> None:
    found = invariance(by_batch, [feed()])
    assert found.alone is not None and found.alone < 0.9999
    assert found.note is not None and found.note.startswith(
        "a sample's output depends on the rest of its batch (cosine 0.9"
    )


def test_padding_that_counts_shows() -> None:
    found = invariance(by_length, [feed()])
    assert found.padded is not None and found.padded < 0.9999
    assert "its padding (cosine" in str(found.note)


def test_what_cannot_be_tried_is_not_judged() -> None:
    single = {"x": normal(1, 4, 6)}
    assert invariance(lambda f: {"y": f["x"]}, [single]) == Invariance()

    def fixed(feed: Feed) -> dict[str, Array]:
        if feed["x"].shape != (3, 4, 6):
            raise ModelError("shape")
        return {"y": feed["x"]}

    assert invariance(fixed, [feed()]) == Invariance()


@pytest.mark.parametrize("limit", [1, 2])
def test_so_many_samples_at_most(limit: int) -> None:
    runs: list[int] = []

    def counted(feed: Feed) -> dict[str, Array]:
        runs.append(len(feed["x"]))
        return honest(feed)

    invariance(counted, [feed()], limit)
    assert runs.count(1) == limit
