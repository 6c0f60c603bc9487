"""Zero points for blocks of a weight of few bits, or smaller blocks: closeness at equal bytes.

    python -m benchmarks.zero_points MODEL.onnx [--bits 4 3 2]

For all matrices of MODEL that linear layers multiply by, rounded to nearest: the squared error
relative to the squared weights, with a multiplier per block (as qcompile has it), with a multiplier
and a zero point of as many bits as a code per block, and with a multiplier per block of half the
size, which takes about as many bytes as the zero points do. Scales and zero points are those of
least squared error, over shares of the range.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from models._common import fail
from qcompile import QCompileError
from qcompile.ir import array, is_constant, is_op, rank
from qcompile.ir.model_io.read_model import load
from qcompile.quant import Array
from qcompile.quant.rounding.few_bits import fitted_grid

BLOCKS = {4: 32, 3: 32, 2: 16}
HEADS = (
    "bits",
    "block",
    "multipliers",
    "multipliers and zero points",
    "multipliers, half the block",
)
_SHARES = np.linspace(0.6, 1.0, 21)
_MOST_MULTIPLIER = 7
_FEWEST = 1 << 14  # values of a matrix


def matrices(path: Path) -> Iterator[Array]:
    """Weights of MatMul and Gemm, float32 (inputs, outputs)."""
    for node in load(path).nodes:
        if is_op(node, "MatMul", "Gemm") and is_constant(node.inputs[1]):
            weight = array(node.inputs[1])
            if rank(node.inputs[1]) == 2 and weight.size >= _FEWEST:
                yield weight.T if node.attrs.get("transB") else weight


def symmetric_error(weight: Array, bits: int, block: int) -> float:
    """Squared error with a signed multiplier for each block."""
    grid = fitted_grid(weight, bits, block)
    values = grid.integers(grid.lattice.nearest(weight)) * grid.base.astype(np.float64)
    return float(np.square(values - weight).sum())


def asymmetric_error(weight: Array, bits: int, block: int) -> float:
    """Squared error with a multiplier from 1 to 7 and a zero point for each block.

    The last block is filled with zeros, which have no error.
    """
    inputs, outputs = weight.shape
    count = -(-inputs // block)
    padded = np.zeros((count * block, outputs))
    padded[:inputs] = weight
    values = padded.reshape(count, block, outputs)
    low, high = np.minimum(values.min(1), 0), np.maximum(values.max(1), 0)
    top = 2**bits - 1
    base = np.maximum(((high - low) / top).max(0) / _MOST_MULTIPLIER, np.finfo(np.float32).tiny)
    least = np.full(low.shape, np.inf)
    for share in _SHARES:
        wanted = np.rint((high - low) * share / top / base)
        scale = np.clip(wanted, 1, _MOST_MULTIPLIER) * base
        for shift in (-1, 0, 1):
            zero = np.clip(np.rint(-low * share / scale) + shift, 0, top)
            codes = np.clip(np.rint(values / scale[:, None]) + zero[:, None], 0, top)
            error = np.square((codes - zero[:, None]) * scale[:, None] - values).sum(1)
            least = np.minimum(least, error)
    return float(least.sum())


def errors(weights: list[Array], bits: int) -> tuple[float, float, float]:
    """Of a width: for each of the three columns, relative to the squared weights."""
    block, total = BLOCKS[bits], sum(float(np.square(w).sum()) for w in weights)
    found = (
        sum(symmetric_error(w, bits, block) for w in weights),
        sum(asymmetric_error(w, bits, block) for w in weights),
        sum(symmetric_error(w, bits, block // 2) for w in weights),
    )
    return found[0] / total, found[1] / total, found[2] / total


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", choices=sorted(BLOCKS), default=[4, 3, 2])
    args = parser.parse_args()
    try:
        weights = list(matrices(args.model))
    except QCompileError as error:
        fail(str(error))
    if not weights:
        fail(f"{args.model} has no linear layer with {_FEWEST} weights or more")
    print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}")
    for bits in args.bits:
        figures = " | ".join(f"{error:.5f}" for error in errors(weights, bits))
        print(f"| {bits} | {BLOCKS[bits]} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
