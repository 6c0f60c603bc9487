"""An order of channels in which large weights of one sign are seldom neighbours.

Rows 2i and 2i + 1 of a matrix share the bound on pairs, and an output's scale follows its worst
pair (``weight_rounding.weight_params``). The order makes the sum of squared scales small, to which
the rounding noise is proportional.

The worst pair of an output is replaced by a smooth maximum over its pairs of rows (a, b):

    worst ≈ 1 + log(S) / k        S = sum over pairs of e^(k (p_a + p_b - 1))

where p are its positive weights, relative to its largest magnitude; S also has the negative ones.
Each summand is a product of a factor of a and one of b, so that one matrix multiplication gives the
cost of all possible pairs: its summands, each output's weighted by the derivative of its squared
scale by S. Pairs exchange rows while that lowers the total cost (2-opt). As the derivative depends
on the pairs, this is repeated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompile.quant.types import Array
from qcompile.quant.weight_rounding import paired_scale

_SHARPNESS = 20.0  # k: a larger one is closer to the maximum, but exchanges get stuck earlier
_ROUNDS, _SWEEPS = 3, 3
_LONGEST = 1024  # longer blocks are cut: time and memory grow with the square, gains hardly do
_TINY = np.finfo(np.float32).tiny


def pair_order(weight: Array) -> Array:
    """An order of channels, (blocks, channels), with a small sum of squared scales.

    weight: float32 (blocks, channels, repeats, outputs). Channels 2i and 2i + 1 of a block are a
    pair, once in each repeat; an odd last one has no partner. Channels stay in their block. Each
    output has one scale. Returns the identity where nothing better is found. Deterministic.
    """
    blocks, channels, _, _ = weight.shape
    cuts = [
        (block, slice(start, min(start + _LONGEST, channels // 2 * 2)))
        for block in range(blocks)
        for start in range(0, channels - 1, _LONGEST)
    ]
    search = _Search(weight, np.maximum(np.abs(weight).max((0, 1, 2)), _TINY), cuts)
    best = order = np.tile(np.arange(channels), (blocks, 1))
    least = search.noise(order)
    for _ in range(_ROUNDS if cuts else 0):
        order = search.improved(order)
        noise = search.noise(order)
        if noise < least:
            best, least = order, noise
    return best


@dataclass(frozen=True)
class _Search:
    """``largest``: magnitude by output. ``cuts``: block and places whose channels may change."""

    weight: Array
    largest: Array
    cuts: list[tuple[int, slice]]

    def noise(self, order: Array) -> float:
        """The sum over outputs of squared scales."""
        ordered = np.take_along_axis(self.weight, order[..., None, None], axis=1)
        even = ordered[:, : ordered.shape[1] // 2 * 2]
        outputs = self.weight.shape[-1]
        first, second = (even[:, i::2].reshape(-1, outputs) for i in (0, 1))
        scale = paired_scale(self.largest / 127, first, second)
        return float(np.sum(np.square(scale, dtype=np.float64)))

    def improved(self, order: Array) -> Array:
        """The order after exchanges in every cut."""
        importance = np.sqrt(self._importance(order)).astype(np.float32)
        order = order.copy()
        for block, cut in self.cuts:
            rows = order[block, cut]
            factors = (self._factors(block, rows) * importance).reshape(len(rows), -1)
            order[block, cut] = rows[_exchanged(factors @ factors.T)]
        return order

    def _factors(self, block: int, rows: Array) -> Array:
        """Each row's factor of S, by sign of the weights, (rows, repeats, 2, outputs)."""
        relative = self.weight[block, rows] / self.largest
        signs = np.maximum(np.stack([relative, -relative], axis=-2), 0)
        factors: Array = np.exp(np.float32(_SHARPNESS) * (signs - np.float32(0.5)))
        return factors

    def _importance(self, order: Array) -> Array:
        """Derivative of each output's squared scale by S, up to a constant; (outputs,)."""
        total = np.zeros_like(self.largest, np.float64)
        for block, cut in self.cuts:
            factors = self._factors(block, order[block, cut])
            total += (factors[0::2] * factors[1::2]).sum((0, 1, 2), dtype=np.float64)
        worst = np.maximum(1 + np.log(total) / _SHARPNESS, 1)
        importance: Array = (self.largest / self.largest.max()) ** 2 * worst / total
        return importance


def _exchanged(costs: Array) -> Array:
    """The order of rows after exchanges between pairs, for the cost of each pair (rows, rows).

    The costliest pairs are first to choose with which other pair they exchange a row.
    """
    first, second = np.arange(0, len(costs), 2), np.arange(1, len(costs), 2)
    cost = costs[first, second]
    for _ in range(_SWEEPS):
        for i in np.argsort(-cost, kind="stable"):
            mine, partners = costs[first[i]], costs[second[i]]
            # By how much both pairs get costlier, if this one's second row is exchanged for
            # another's second one, or for its first.
            by_second = mine[second] + partners[first] - cost
            by_first = mine[first] + partners[second] - cost
            by_second[i] = by_first[i] = np.inf
            theirs, more = (
                (second, by_second) if by_second.min() <= by_first.min() else (first, by_first)
            )
            j = int(more.argmin())
            if more[j] < cost[i] * (1 - 1e-6):  # beyond rounding: it ends
                second[i], theirs[j] = theirs[j], second[i]
                cost[[i, j]] = costs[first[[i, j]], second[[i, j]]]
    return np.stack([first, second], axis=1).reshape(-1)
