"""Whether two programs compute the same function: differences beyond what rounding explains.

Unlike ``closeness``, which says how much quantization changed, both sides are meant to be equal
here: a model in torch and in ONNX Runtime. They add floats in another order. In a float model that
changes results by rounding alone. In a quantized one, a value that lies on the boundary between two
integers becomes one or the other, and what reads it differs by a whole step, so the largest
difference of any sample says little; that is why the limit is on the root mean square (RMS).

Nor can every decision (argmax) be the same: where two outputs are closer to each other than
rounding moves them, either may be the larger one. Where they are further apart, it must be.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from qcompile.data.feeds import Feed, padding_mask
from qcompile.quant import Array
from qcompile.system.json_values import Unbounded

Outputs = Mapping[str, Array]
Run = tuple[Outputs, Outputs, Feed]


@dataclass(frozen=True)
class Agreement:
    """How far two programs are from each other, relative to the RMS of the expected outputs.

    ``argmax_equal`` of ``decisions``: rows of outputs of rank 2, tokens of outputs of rank 3.
    """

    samples: int
    decisions: int
    argmax_equal: Annotated[int, "of the decisions"]
    largest: Annotated[Unbounded, "largest difference, over the outputs' RMS"]
    rms: Annotated[Unbounded, "RMS of the differences, over the outputs' RMS"]
    limit: Annotated[float, "of rms: what rounding explains"]
    margin: Annotated[
        Unbounded,
        "over the outputs' RMS: largest value by which an expected argmax is above the one found",
    ] = 0.0
    margin_limit: Annotated[
        float | None, "of margin: what rounding explains; null: not limited"
    ] = None
    lead_change: Annotated[
        Unbounded,
        "over the outputs' RMS: largest change of an expected argmax's lead over another output",
    ] = 0.0

    @property
    def holds(self) -> bool:
        """False also where a value is not a number."""
        is_decided = self.margin_limit is None or self.margin <= self.margin_limit
        return self.rms <= self.limit and is_decided

    def __str__(self) -> str:
        others = ""
        if self.argmax_equal < self.decisions and self.margin_limit is not None:
            others = f", in others by {self.margin:.1e} (limit {self.margin_limit:.1e})"
        return (
            f"differ by {self.rms:.1e} of their size (limit {self.limit:.1e}), {self.largest:.1e} "
            f"at most; the same argmax in {self.argmax_equal} of {self.decisions}{others}"
        )


@dataclass
class _Sums:
    samples: int = 0
    decisions: int = 0
    equal: int = 0
    largest: float = 0.0
    margin: float = 0.0
    lead_change: float = 0.0
    noise: float = 0.0
    signal: float = 0.0
    values: int = 0


def agree(runs: Iterable[Run], limit: float) -> Agreement:
    """Compare float outputs by name; what a mask calls padding is left out.

    runs: what is expected, what was found, and the feed of both. Raises KeyError where an expected
    output was not found.
    """
    sums = _Sums()
    for expected, found, feed in runs:
        real = padding_mask(feed)
        sums.samples += len(next(iter(feed.values())))
        for name, values in expected.items():
            if np.issubdtype(values.dtype, np.floating):
                _add(sums, *(_real(a, real) for a in (values, found[name])))
    size = float(np.sqrt(sums.signal / max(sums.values, 1))) or 1.0
    rms = float(np.sqrt(sums.noise / max(sums.values, 1))) / size
    return Agreement(
        sums.samples,
        sums.decisions,
        sums.equal,
        sums.largest / size,
        rms,
        limit,
        sums.margin / size,
        lead_change=sums.lead_change / size,
    )


def _real(values: Array, mask: Array | None) -> Array:
    """The rows of real tokens of an output that has one for each; else all of it."""
    if mask is None or values.ndim < 3 or values.shape[:2] != mask.shape:
        return values
    return values[mask]


def _add(sums: _Sums, expected: Array, found: Array) -> None:
    if expected.shape != found.shape:
        sums.noise = sums.largest = float("inf")
        return
    wide, error = expected.astype(np.float64), expected.astype(np.float64) - found
    sums.signal += float(np.square(wide).sum())
    sums.noise += float(np.square(error).sum())
    sums.values += expected.size
    sums.largest = max(sums.largest, float(np.abs(error).max(initial=0.0)))
    if expected.ndim >= 2 and expected.shape[-1] > 1:
        same = expected.argmax(axis=-1) == found.argmax(axis=-1)
        sums.decisions += same.size
        sums.equal += int(same.sum())
        sums.margin = max(sums.margin, _margin(expected[~same], found[~same]))
        sums.lead_change = max(sums.lead_change, _lead_change(expected, found))


def _margin(expected: Array, found: Array) -> float:
    """The largest value by which an expected argmax is above the one found; rows of outputs."""
    chosen = np.take_along_axis(expected, found.argmax(axis=-1)[..., None], axis=-1)[..., 0]
    return float((expected.max(axis=-1) - chosen).max(initial=0.0))


def _lead_change(expected: Array, found: Array) -> float:
    """The largest change of the lead of an expected argmax over another output of its row."""
    error = expected.astype(np.float64) - found
    top = np.take_along_axis(error, expected.argmax(axis=-1)[..., None], axis=-1)
    with np.errstate(invalid="ignore"):  # of infinite errors, whose RMS fails by itself
        return float(np.abs(top - error).max(initial=0.0))
