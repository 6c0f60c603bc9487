"""AdaRound: learns for each weight whether to round it up or down, by the error of the outputs.

The error ``|X (W - Wq)|²`` is a quadratic form of the weight's error with the second moments
H = XᵀX. It is minimized by gradient descent on soft roundings h(V) between 0 (down) and 1 (up),
with a penalty that drives them to either end (Nagel et al. 2020, equations 21 to 25). So all
weights of an output are decided together, where GPTQ and coordinate descent decide one at a time.
The best use is between the two: from the codes of ``gptq``, followed by the descent of
``lattice_search``, whose codes may leave the two neighbours of a value.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompile.quant.rounding.lattice import Lattice
from qcompile.quant.types import Array, Floats

_STRETCH = (np.float32(-0.1), np.float32(1.1))  # γ and ζ of equation 23
_EDGE = np.float32(1e-3)  # a soft rounding starts between its ends, where it has a gradient
_WARM_UP = 0.2  # share of the steps without penalty
# β of equation 24 from first to last step: first only the ends repel, last nearly everything. The
# paper starts at 20, for tens of times as many steps.
_EXPONENTS = (8.0, 2.0)
_MOMENTA, _TINY = (0.9, 0.999), np.float32(1e-8)  # of Adam (Kingma and Ba 2015, algorithm 1)
_OF_START = np.float32(0.9)  # of a first soft rounding: the rest is the value's distance from down
_OUTPUTS = 128  # at a time, so that temporaries stay in the cache


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: ``steps`` of Adam with learning ``rate``.

    penalty: λ of equation 21, in units of the error that a weight alone makes per squared step.
    Above 0.2 hardly anything depends on it, nor on a rate from 0.05 to 0.2: with less of either,
    roundings are still undecided after the last step.
    """

    steps: int = 300
    rate: float = 0.1
    penalty: float = 0.5

    def exponent(self, step: int) -> float | None:
        """β at a step from 0, None during warm-up."""
        warm = self.steps * _WARM_UP
        if step < warm:
            return None
        first, last = _EXPONENTS
        return first + (last - first) * (step - warm) / (self.steps - warm)


USUAL = Schedule()


def adarounded(
    values: Array,
    moments: Array,
    lattice: Lattice,
    start: Array | None = None,
    schedule: Schedule = USUAL,
) -> Array:
    """Codes, uint8 (inputs, outputs), of small output error; scales do not change.

    values: (inputs, outputs). moments: (inputs, inputs), positive diagonal, so damped. Each code is
    one of the two next to its value (the paper's floor and ceiling). start: codes to start from,
    uint8 (inputs, outputs), such as those of ``compensated_codes``; where one is neither of the
    two, its neighbour towards the value is the alternative. Without it, from the values
    themselves, as in the paper. The same input gives the same codes. Raises ValueError where shapes
    do not fit, or the moments have a diagonal that is not positive.
    """
    _check(values, moments, lattice, start)
    target, moments = np.asarray(values, np.float32), np.asarray(moments, np.float32)
    scale, middle = lattice.by_row(), np.float32(lattice.middle)
    position = np.clip(target / scale + middle, 0, lattice.largest_code)
    down = np.minimum(np.floor(position), lattice.largest_code - 1)
    if start is None:
        soft = position - down
    else:
        first = start.astype(np.float32)
        down = np.clip(down, np.maximum(first - 1, 0), np.minimum(first, lattice.largest_code - 1))
        soft = _OF_START * (first - down) + (1 - _OF_START) * np.clip(position - down, 0, 1)
    # The weight's error in steps is up - offset, and of a weight that is rounded down -offset.
    offset = target / scale + middle - down
    up = np.empty(target.shape, bool)
    for left in range(0, target.shape[1], _OUTPUTS):
        part = np.s_[:, left : left + _OUTPUTS]
        up[part] = _learned(moments, scale[part], offset[part], soft[part], schedule)
    codes: Array = (down + up).astype(np.uint8)
    return codes


def _check(values: Array, moments: Array, lattice: Lattice, start: Array | None) -> None:
    shape = (lattice.inputs, lattice.scale.shape[1])
    for name, found, expected in (
        ("values", values.shape, shape),
        ("moments", moments.shape, (lattice.inputs, lattice.inputs)),
        ("start", shape if start is None else start.shape, shape),
    ):
        if found != expected:
            raise ValueError(f"{name} have shape {list(found)}, expected {list(expected)}")
    if not (np.diagonal(moments) > 0).all():
        raise ValueError("moments need a positive diagonal: damp them")


def _learned(
    moments: Floats, scale: Floats, offset: Floats, soft: Floats, schedule: Schedule
) -> Array:
    """Which weights to round up, bool (inputs, outputs), from first soft roundings.

    Gradients are divided by each weight's own curvature, H_ii · scale². That changes nothing for
    Adam, and makes λ fit inputs and blocks of any size: with one λ for all weights, those of small
    inputs would be decided long before those of large ones.
    """
    low, high = _STRETCH
    variable = _logit((np.clip(soft, _EDGE, 1 - _EDGE) - low) / (high - low))
    per_step = (2 / (np.diagonal(moments)[:, None] * scale)).astype(np.float32)
    adam = _Adam.of(variable.shape, schedule.rate)
    for step in range(schedule.steps):
        sigmoid: Floats = np.reciprocal(1 + np.exp(-variable))
        stretched = sigmoid * (high - low) + low
        up: Floats = np.clip(stretched, 0, 1)
        slope: Floats = (moments @ ((up - offset) * scale)) * per_step
        exponent = schedule.exponent(step)
        if exponent is not None:
            slope += np.float32(schedule.penalty) * _penalty_slope(up, exponent)
        # Equation 23 is flat outside of 0 to 1: what arrives at an end stays there.
        slope *= np.where(up == stretched, sigmoid * (1 - sigmoid) * (high - low), 0)
        variable -= adam.change(slope)
    decided: Array = variable >= 0
    return decided


def _penalty_slope(up: Floats, exponent: float) -> Floats:
    """Derivative of ``1 - |2h - 1|^β`` (equation 24) with respect to h."""
    distance = 2 * up - 1
    slope: Floats = np.abs(distance) ** np.float32(exponent - 1)
    signed: Floats = np.copysign(np.float32(2 * exponent) * slope, -distance)
    return signed


def _logit(share: Floats) -> Floats:
    """What the sigmoid of gives ``share``."""
    found: Floats = np.log(share / (1 - share))
    return found


@dataclass
class _Adam:
    """Moments of the gradient, and from them the change of each step."""

    rate: float
    mean: Floats
    square: Floats
    steps: int = 0

    @classmethod
    def of(cls, shape: tuple[int, ...], rate: float) -> _Adam:
        return cls(rate, np.zeros(shape, np.float32), np.zeros(shape, np.float32))

    def change(self, slope: Floats) -> Floats:
        """What to subtract from the variables for this gradient."""
        self.steps += 1
        first, second = _MOMENTA
        self.mean += np.float32(1 - first) * (slope - self.mean)
        self.square += np.float32(1 - second) * (slope * slope - self.square)
        # Both start at zero, so early averages are too small by these factors.
        of_mean, of_square = 1 - first**self.steps, 1 - second**self.steps
        root = np.sqrt(self.square / np.float32(of_square)) + _TINY
        change: Floats = np.float32(self.rate / of_mean) * self.mean / root
        return change
