"""How much of an output's own spread a model keeps: R² of columns that vary on the same scale.

The cosine of a whole output is blind where columns differ in scale (boxes in pixels next to scores)
or where the answers are far from zero (prices): a constant answer may have a cosine of .98, or
1.0000. R², the coefficient of determination, is 1 - sum (x - y)² / sum (x - mean of its column)²,
where x are the float model's values: 1 for equal outputs, 0 for answers as good as the float
model's mean, negative for worse ones. It is pooled over columns whose standard deviations are
within a factor of ten, so that large columns do not hide small ones, and a column that hardly
varies does not count as much as its neighbours.

Columns are the entries along an axis behind the batch axis: channels, not positions, since some
rows of an image or some tokens may be empty in all samples. Outputs do not say which axis that is
([batch, 14, boxes], [batch, boxes, 85], [batch, channels, height, width]). So of a map it is the
first or the last axis, and of two axes the shorter one, as there are fewer channels than positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qcompile.quant import Array

# Fewer values in a column do not tell its spread.
_LEAST_VALUES = 8
# Standard deviations of the columns of a group are within this factor.
_DECADE = 10.0
# Groups with a smaller share of the columns do not count: encoders have a few channels out of
# hundreds that stay almost constant and carry nothing.
_LEAST_SHARE = 1 / 32
_PART = 1 << 18  # values that are looked at together
# Of two axes of so few entries both may hold columns.
_SHORT = 32


@dataclass(frozen=True)
class _Limits:
    """Of what counts, relative to the size of a group's values.

    spread: less is constant. Two float32 implementations of a model differ by up to 1e-5 of an
    output's size (2^-24 a rounding, over thousands of them), so a few times that says nothing.
    error: less is fine, however little the values vary. A thousandth (60 dB) is below the steps of
    8-bit integers.
    """

    spread: float = 2.0**-14
    error: float = 2.0**-10


# With several positions in a sample (tokens, boxes, pixels), a channel that varies by less than a
# thousandth over all of them is constant, and what integers leave of an offset (36 dB) is fine.
_BY_POSITION = _Limits(2.0**-10, 2.0**-6)


@dataclass(frozen=True)
class ColumnGroup:
    """Columns of one scale, and how much of their spread is kept.

    is_fine: the error is so small next to the values' size that ``r2`` only says how little they
    vary. axis: of the output, on which the columns lie. columns: their indices, of ``of``.
    """

    r2: float
    is_fine: bool
    axis: int
    columns: list[int]
    of: int

    def __str__(self) -> str:
        """Such as ``columns 4-13 of 14 on axis 1``; empty for all columns."""
        if len(self.columns) == self.of:
            return ""
        return f"columns {_spans(self.columns)} of {self.of} on axis {self.axis}"


@dataclass
class ColumnSpread:
    """Collects one output, batch by batch."""

    _axes: dict[int, _Moments] = field(default_factory=dict)
    _dropped: set[int] = field(default_factory=set)
    _whole: _Moments = field(default_factory=lambda: _Moments(1))
    _limits: _Limits = _Limits()
    _rank: int = 0  # of a sample

    def update(self, reference: Array, candidate: Array, *, rows: int = 0) -> None:
        """Add samples [n, …] of equal shapes; the first ``rows`` axes of a sample are no columns.

        In parts of a few MB, as float64.
        """
        size = max(int(np.prod(reference.shape[1:], dtype=np.int64)), 1)
        step = max(_PART // size, 1)
        for start in range(0, len(reference), step):
            part = slice(start, start + step)
            self._add(reference[part].astype(float), candidate[part].astype(float), rows)

    def _add(self, x: Array, y: Array, rows: int) -> None:
        shape = x.shape[1:]
        if sum(size > 1 for size in shape) > 1:
            self._limits = _BY_POSITION
        self._whole.update(x.reshape(1, -1), y.reshape(1, -1))
        self._rank = len(shape)
        for axis in range(rows, len(shape)):
            moments = self._axes.setdefault(axis, _Moments(shape[axis]))
            if axis in self._dropped or moments.size != shape[axis]:
                self._dropped.add(axis)
                continue
            across = [np.moveaxis(v, axis + 1, 0).reshape(shape[axis], -1) for v in (x, y)]
            moments.update(*across)

    def groups(self) -> list[list[ColumnGroup]]:
        """The groups of each axis that holds columns; none if nothing varies, or values are few."""
        found = [
            [
                ColumnGroup(
                    moments.r2(group),
                    moments.is_fine(group, self._limits.error),
                    axis + 1,
                    group.tolist(),
                    moments.size,
                )
                for group in moments.groups(self._limits.spread)
            ]
            for axis, moments in self._columns().items()
        ]
        return [groups for groups in found if groups]

    def _columns(self) -> dict[int, _Moments]:
        """The axes that may hold channels; all values as one column where there are none."""
        ends = (0, self._rank - 1) if self._rank > 2 else range(self._rank)
        kept = {
            axis: self._axes[axis] for axis in ends if axis in self._axes.keys() - self._dropped
        }
        if self._rank == 2:
            kept = {axis: moments for axis, moments in kept.items() if moments.size > 1}
        sizes = [moments.size for moments in kept.values()]
        if self._rank < 4 and max(sizes, default=0) > _SHORT:
            kept = {axis: moments for axis, moments in kept.items() if moments.size == min(sizes)}
        kept = {axis: moments for axis, moments in kept.items() if moments.size > 1}
        return kept or {-1: self._whole}


def worst_group(axes: list[list[ColumnGroup]]) -> ColumnGroup | None:
    """The group with the smallest R², one of those that are not fine if there are any."""
    found = (group for groups in axes for group in groups)
    return min(found, key=lambda group: (group.is_fine, group.r2), default=None)


def lost_spread(axes: list[list[ColumnGroup]]) -> float:
    """1 - R², the mean over columns, of the axis where it is largest; 0 without groups."""
    return max((_mean_loss(groups) for groups in axes), default=0.0)


def _mean_loss(groups: list[ColumnGroup]) -> float:
    columns = [len(group.columns) for group in groups]
    return float(np.average([1 - group.r2 for group in groups], weights=columns))


class _Moments:
    """Count, mean, squared deviations and squared errors of each of ``size`` columns."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.count, self.mean, self.deviation, self.error = np.zeros((4, size))

    def update(self, x: Array, y: Array) -> None:
        """Add values [size, n]; those that are infinite or NaN in one model are left out."""
        valid = np.isfinite(x) & np.isfinite(y)
        count = valid.sum(1)
        x, y = np.where(valid, x, 0.0), np.where(valid, y, 0.0)
        mean = x.sum(1) / np.maximum(count, 1)
        own = (np.square(x - mean[:, None]) * valid).sum(1)
        # Chan et al. 1983: deviations of two parts, plus those of their means.
        total = np.maximum(self.count + count, 1)
        shift = mean - self.mean
        self.deviation += own + np.square(shift) * self.count * count / total
        self.mean += shift * count / total
        self.count += count
        self.error += np.square(x - y).sum(1)

    def groups(self, least: float) -> list[Array]:
        """Indices of columns that vary, those within a decade of standard deviation together.

        least: how much a group must vary, relative to the size of its values.
        """
        variance = self.deviation / np.maximum(self.count - 1, 1)
        left = np.flatnonzero((self.count >= _LEAST_VALUES) & (variance > 0))
        left = left[np.argsort(-variance[left], kind="stable")]
        found = []
        while left.size:
            near = variance[left] * _DECADE**2 > variance[left[0]]
            group, left = left[near], left[~near]
            energy = (variance + np.square(self.mean))[group].sum()
            varies = variance[group].sum() > least**2 * energy
            if varies and group.size >= _LEAST_SHARE * self.size:
                found.append(np.sort(group))
        return found

    def is_fine(self, group: Array, limit: float) -> bool:
        """True where the errors of a group are below ``limit`` times the size of its values."""
        count = self.count[group]
        energy = self.deviation[group] / count + np.square(self.mean[group])
        return bool((self.error[group] / count).sum() < limit**2 * energy.sum())

    def r2(self, group: Array) -> float:
        """Pooled over the columns of the group, with the unbiased estimate of their spread."""
        count = self.count[group]
        spread = self.deviation[group] * count / (count - 1)
        return 1 - float(self.error[group].sum() / spread.sum())


def _spans(numbers: list[int]) -> str:
    """``0-3, 7``; the first spans only where there are many."""
    spans: list[list[int]] = []
    for n in numbers:
        if spans and n == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], n]
        else:
            spans.append([n])
    texts = ["-".join(map(str, span)) for span in spans]
    return ", ".join([*texts[:3], "…"] if len(texts) > 3 else texts)
