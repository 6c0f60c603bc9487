"""What exact sums on x86 without VNNI cost: the rounding noise of weights, by way of bounding them.

    python -m benchmarks.pair_bound MODEL.onnx ...

For the constant matrices of MatMul and Gemm in float models: the mean square of rounding errors,
step² / 12, relative to 8 bits without a bound, mean over all weights. "pairs": the bound on sums of
neighbours (docs/processors.md). "7 bits": every weight within ±64. "own order": the bound on pairs,
if each matrix had an order of rows of its own (quant/pair_order.py). That is more than a compiled
model reaches, as most channels are shared by many matrices.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.ir import array, is_constant, is_op, rank
from qcompile.ir.model_io.read_model import load
from qcompile.quant import QSpec, pair_order
from qcompile.quant.weight_rounding import weight_params
from qcompile.targets.cpu import WEIGHT

Array = npt.NDArray[Any]
PLAIN = replace(WEIGHT, paired=False)
SEVEN = replace(PLAIN, reduced=True, narrow=False)


def matrices(model: Path) -> Iterator[Array]:
    """The weights as float32 [inputs, outputs]."""
    for node in load(model).nodes:
        if not is_op(node, "MatMul", "Gemm"):
            continue
        weight = node.inputs[1]
        if is_constant(weight) and rank(weight) == 2:
            values = array(weight).astype(np.float32)
            yield values.T if node.attrs.get("transB") else values


def noise(weight: Array, spec: QSpec) -> float:
    """Mean of step² over the weights, up to a constant factor."""
    return float(np.mean(np.square(weight_params(weight, spec).scale, dtype=np.float64)))


def reordered(weight: Array) -> Array:
    """The rows in the order that suits this matrix."""
    order: Array = pair_order(weight[None, :, None])[0]
    return weight[order]


def row(model: Path) -> tuple[int, float, float, float]:
    """Number of matrices, and the relative noise of the three."""
    sums = np.zeros(4)
    count = 0
    for weight in matrices(model):
        count += 1
        plain = noise(weight, PLAIN)
        # Each matrix in units of its own noise: layers of large weights count as much as others.
        found = [noise(weight, WEIGHT), noise(weight, SEVEN), noise(reordered(weight), WEIGHT)]
        sums += weight.size * np.array([1, *(value / plain for value in found)])
    bounded, seven, best = sums[1:] / max(sums[0], 1)
    return count, float(bounded), float(seven), float(best)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    args = parser.parse_args()
    print("| model | matrices | pairs | 7 bits | own order |\n|---|---|---|---|---|")
    for model in args.models:
        count, bounded, seven, best = row(model)
        print(f"| {model} | {count} | {bounded:.2f} | {seven:.2f} | {best:.2f} |", flush=True)


if __name__ == "__main__":
    main()
