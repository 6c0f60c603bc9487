"""A weight that makes up for errors of earlier layers, before it is rounded.

A layer of a quantized model reads Xq where the float model reads X. Its error E, what its outputs
lack with the float weight, is partly a linear function of Xq: that part moves into the weight by
least squares, and the mean into the bias. GPTAQ (Li et al. 2025, section 3) and Qronos (Zhang et
al. 2025) compensate the same error in their rounding loops; since the form that is minimized is
``|Xq (V - Wq)|²`` with V the corrected weight, correcting it first is enough. E may include the
error of what is added after the layer, as at a residual sum.
"""

from __future__ import annotations

import numpy as np

from qcompile.quant.types import Array, Floats


def retargeted(values: Array, moments: Array, cross: Array, damping: float) -> Floats:
    """The weight plus the ridge regression of the missing outputs on the inputs.

    values: (inputs, outputs). moments: (inputs, inputs), XqᵀXq. cross: (inputs, outputs), XqᵀE;
    both summed over the same rows, and E with its mean removed: the bias takes that, and the change
    of the mean by the new weight (``mean_error``). damping: in units of the mean of the diagonal of
    the moments; the more of it, the closer to ``values``. Moments of zero: ``values``.
    """
    level = float(np.mean(np.diagonal(moments), dtype=np.float64))
    if level <= 0:
        return np.asarray(values, np.float32)
    ridge = moments.astype(np.float64)
    ridge[np.diag_indices_from(ridge)] += max(damping, len(moments) * 2.0**-22) * level
    change = np.linalg.solve(ridge, cross.astype(np.float64))
    corrected: Floats = (values + change).astype(np.float32)
    return corrected


def mean_error(
    values: Array, real: Array, mean_input: Array, mean_missing: Array | None = None
) -> Floats:
    """What to add to the bias, (outputs,): the mean error that rounding and earlier layers leave.

    values, real: (inputs, outputs), the float and the rounded weight. mean_input: (inputs,), the
    mean of Xq. mean_missing: (outputs,), the mean of E with the float weight, None for zero.
    """
    rounding = mean_input @ (np.asarray(values, np.float64) - real)
    total = rounding if mean_missing is None else rounding + mean_missing
    return np.asarray(total, np.float32)
