"""How many bits each weight gets, so that all of them fit into a number of bytes.

What a weight costs in accuracy is measured at a few widths and interpolated between them: each bit
less doubles the steps, so it multiplies the error's energy, and 1 - cosine, by four. Errors of
different weights are independent, so their energies add up. Minimizing a sum under a limit with
one choice for each weight is the multiple-choice knapsack problem, solved exactly by dynamic
programming over bytes (Kellerer, Pferschy and Pisinger 2004, chapter 11).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qcompile.quant import Array, QSpec

_PER_BIT = 4.0  # by which a bit less multiplies the energy of rounding errors
_UNITS = 1 << 16  # in which bytes are counted, so that tables of the program stay small
_MULTIPLIER_BITS = 4


@dataclass(frozen=True)
class Choice:
    """A width that a weight can have: its bytes in the file, and what it costs in accuracy."""

    bits: int
    bytes: int
    drop: float


def packed_bytes(elements: int, spec: QSpec, stored: int) -> int:
    """Bytes of the integers of a weight in the file, without its scales.

    ``stored``: bits of a value there. Codes of few bits are packed without gaps, and multipliers of
    blocks are INT4 (``packing.py``).
    """
    size = -(-elements * stored // 8)
    if spec.width is not None and spec.block:
        size += -(-elements // spec.block * _MULTIPLIER_BITS // 8)
    return size


def interpolated_drops(measured: Mapping[int, float], widths: Sequence[int]) -> dict[int, float]:
    """The drop of accuracy at each of ``widths``, from measured ones; never less with fewer bits.

    measured: by width, at least one. Between two of them the drop is interpolated in its
    logarithm, outside of them it follows the law of energies.
    """
    known = {bits: max(drop, 0.0) for bits, drop in measured.items()}
    found: dict[int, float] = {}
    most = 0.0
    for bits in sorted(widths, reverse=True):
        most = max(most, _drop_at(bits, known))
        found[bits] = most
    return found


def _drop_at(bits: int, known: Mapping[int, float]) -> float:
    if bits in known:
        return known[bits]
    above = min((b for b in known if b > bits), default=None)
    below = max((b for b in known if b < bits), default=None)
    if above is None or below is None:
        nearest = below if above is None else above
        assert nearest is not None  # at least one is measured
        return known[nearest] * _PER_BIT ** (nearest - bits)
    if not (known[above] > 0 and known[below] > 0):
        return known[below] * _PER_BIT ** (below - bits)
    share = (bits - below) / (above - below)
    return float(known[below] ** (1 - share) * known[above] ** share)


def fewest_bytes(weights: Sequence[Sequence[Choice]]) -> int:
    """Bytes of the smallest choice of each weight."""
    return sum(min(choice.bytes for choice in choices) for choices in weights)


def allocate(weights: Sequence[Sequence[Choice]], limit: int) -> list[Choice] | None:
    """One choice for each weight, with the smallest sum of drops within ``limit`` bytes.

    None if even the smallest do not fit. Of choices with equal sums, those of fewer bytes. With a
    larger limit the sum is never larger.
    """
    room = limit - fewest_bytes(weights)
    if room < 0:
        return None
    ordered = [sorted(choices, key=lambda c: (c.bytes, c.drop)) for choices in weights]
    most = sum(choices[-1].bytes - choices[0].bytes for choices in ordered)
    unit = max(1, -(-most // _UNITS))
    units = min(room, most) // unit
    best, taken = np.zeros(units + 1), list[Array]()
    for choices in ordered:
        best, chosen = _with_weight(best, choices, unit)
        taken.append(chosen)
    result: list[Choice] = []
    for choices, chosen in zip(reversed(ordered), reversed(taken), strict=True):
        choice = choices[chosen[units]]
        units -= _units(choice, choices[0], unit)
        result.append(choice)
    return result[::-1]


def _with_weight(best: Array, choices: Sequence[Choice], unit: int) -> tuple[Array, Array]:
    """Least sums for each number of units, and the choice of the weight that was added."""
    least, chosen = best + choices[0].drop, np.zeros(len(best), np.int8)
    for i, choice in enumerate(choices[1:], 1):
        needed = _units(choice, choices[0], unit)
        if needed >= len(best):
            break
        sums = best[: len(best) - needed] + choice.drop
        better = sums < least[needed:]
        least[needed:][better] = sums[better]
        chosen[needed:][better] = i
    return least, chosen


def _units(choice: Choice, smallest: Choice, unit: int) -> int:
    """Units that a choice needs beyond the smallest one, rounded up."""
    return -(-(choice.bytes - smallest.bytes) // unit)
