"""How close two models' answers are, in the terms of the job: 1 is equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

SAME_BOX = 0.5  # intersection over union, as PASCAL VOC counts detections


@dataclass(frozen=True)
class Box:
    """A detected object: label, and left, top, right, bottom in pixels."""

    label: str
    corners: tuple[float, float, float, float]


def neighbour_order(expected: ArrayLike, found: ArrayLike) -> float:
    """Spearman's correlation of the cosine similarities of all pairs. Embeddings [n, width]."""
    return spearman(_similarities(expected), _similarities(found))


def same_labels(expected: Sequence[str], found: Sequence[str]) -> float:
    """The share of inputs that get the same label."""
    if len(expected) != len(found):
        raise ValueError(f"{len(found)} labels, expected {len(expected)}")
    return float(np.mean([a == b for a, b in zip(expected, found, strict=True)]))


def ranking_order(expected: ArrayLike, found: ArrayLike) -> float:
    """Mean over queries of Spearman's correlation of the scores [queries, candidates]."""
    rows = zip(np.asarray(expected), np.asarray(found), strict=True)
    return float(np.mean([spearman(a, b) for a, b in rows]))


def same_boxes(expected: Sequence[Sequence[Box]], found: Sequence[Sequence[Box]]) -> float:
    """F1 of the boxes that both models find, over all images.

    A box counts as found if the other model has one of the same label that overlaps it with an
    intersection over union of at least .5; each box is used once.
    """
    pairs = list(zip(expected, found, strict=True))
    total = sum(len(a) + len(b) for a, b in pairs)
    if not any(map(len, expected)):
        raise ValueError("the float model found no box, so there is nothing to compare")
    return 2 * sum(_matches(a, b) for a, b in pairs) / total


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Rank correlation of two vectors; 0 if one is constant or not finite."""
    x, y = (np.asarray(v, np.float64).reshape(-1) for v in (a, b))
    if not (np.isfinite(x).all() and np.isfinite(y).all()) or np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 0; equal values share their mean rank."""
    _, groups, counts = np.unique(values, return_inverse=True, return_counts=True)
    means = np.cumsum(counts) - (counts + 1) / 2
    ranks: NDArray[np.float64] = means[groups]
    return ranks


def _similarities(vectors: ArrayLike) -> NDArray[np.float64]:
    rows = np.asarray(vectors, np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows / np.maximum(lengths, 1e-12)
    above = np.triu_indices(len(rows), 1)
    similarities: NDArray[np.float64] = (rows @ rows.T)[above]
    return similarities


def _matches(expected: Sequence[Box], found: Sequence[Box]) -> int:
    left = list(found)
    count = 0
    for box in expected:
        same = [b for b in left if b.label == box.label]
        best = max(same, key=lambda b: _overlap(box, b), default=None)
        if best is not None and _overlap(box, best) >= SAME_BOX:
            left.remove(best)
            count += 1
    return count


def _overlap(a: Box, b: Box) -> float:
    """Intersection over union."""
    left, top = (max(a.corners[i], b.corners[i]) for i in (0, 1))
    right, bottom = (min(a.corners[i], b.corners[i]) for i in (2, 3))
    inside = max(0.0, right - left) * max(0.0, bottom - top)
    union = _area(a) + _area(b) - inside
    return inside / union if union > 0 else 0.0


def _area(box: Box) -> float:
    left, top, right, bottom = box.corners
    return max(0.0, right - left) * max(0.0, bottom - top)
