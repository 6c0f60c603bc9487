"""What a bound on int8 values costs in precision, predicted from scales alone.

Rounding to steps of s adds noise of energy s² / 12 to each value (Widrow and Kollár, Quantization
Noise, 2008, chapter 4). A bound enlarges steps, and nothing else, so that the ratio of the steps'
energies is the ratio of the noises. ``round-weights`` trades noise of the weight for noise of the
output in both cases alike.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qcompile.quant.affine import qparams, weight_range
from qcompile.quant.types import Array, QParams, QSpec, Range


def weight_cost_db(values: Array, params: QParams) -> float | None:
    """By how many dB a bounded weight's rounding noise is above that of plain 8 bits.

    ``values``: float, any shape. None for a spec without a bound. Raises ValueError where the
    weight is empty or holds NaN or infinity.
    """
    plain = _unbounded(params.spec)
    if plain is None:
        return None
    return _ratio_db(params, qparams(weight_range(values, plain), plain))


def activation_cost_db(span: Range, params: QParams) -> float | None:
    """The same for an activation with this range."""
    plain = _unbounded(params.spec)
    return None if plain is None else _ratio_db(params, qparams(span, plain))


def _unbounded(spec: QSpec) -> QSpec | None:
    """The spec with all 8 bits, None for one that has them."""
    if not (spec.paired or spec.reduced):
        return None
    return replace(spec, paired=False, reduced=False)


def _ratio_db(bounded: QParams, plain: QParams) -> float:
    """10 log10 of the energies of the steps; channels have equally many values."""
    energies = (np.square(p.scale.astype(np.float64)).mean() for p in (bounded, plain))
    return 10 * float(np.log10(np.divide(*energies)))
