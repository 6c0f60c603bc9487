"""Rounding methods compared layer by layer: error of the outputs relative to nearest, and CPU time.

    python -m benchmarks.rounding_error MODEL.onnx --data sentences.txt --tokenizer DIR
        [--bits 4 --block 32] [--match '*layer.0*']

For each MatMul with a constant weight that --match names, its data is collected from the float
model. Every second row is what the methods see, the others are held out. A cell has the squared
error of the outputs on either, divided by that of rounding to nearest, then CPU seconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from qcompile.data.feeds import input_specs
from qcompile.data.open_data import open_data
from qcompile.ir.model_io.read_model import load
from qcompile.quant import Array
from qcompile.quant.rounding.adaround import adarounded
from qcompile.quant.rounding.block_multipliers import BlockMultipliers
from qcompile.quant.rounding.few_bits import alternated, fitted_grid
from qcompile.quant.rounding.gptq import compensated_codes, damped
from qcompile.quant.rounding.lattice_search import output_error
from qcompile.runtime.session import Session, with_outputs

DAMPING = 0.1
Found = tuple[BlockMultipliers, Array]


@dataclass(frozen=True)
class Layer:
    """A weight (inputs, outputs), and second moments of the rows seen and of those held out."""

    name: str
    weight: Array
    seen: Array
    held_out: Array


def layers(args: argparse.Namespace) -> Iterator[Layer]:
    """Of the model, one after the other, since moments are large."""
    proto = onnx.load(args.model)
    constants = {c.name: c for c in proto.graph.initializer}
    specs = input_specs(load(args.model))
    options = {"tokenizer": args.tokenizer, "samples": args.samples}
    feeds = list(open_data(args.data, specs, batch_size=1, **options))
    for node in proto.graph.node:
        is_linear = node.op_type == "MatMul" and node.input[1] in constants
        if not is_linear or not fnmatchcase(node.name, args.match):
            continue
        session = Session(with_outputs(proto, [node.input[0]]).SerializeToString())
        data = [session.run({n: f[n] for n in session.inputs})[node.input[0]] for f in feeds]
        rows = np.concatenate([x.reshape(-1, x.shape[-1]) for x in data]).astype(np.float32)
        seen, held_out = rows[::2], rows[1::2]
        weight = numpy_helper.to_array(constants[node.input[1]]).astype(np.float32)
        yield Layer(node.name, weight, seen.T @ seen, held_out.T @ held_out)


def methods(layer: Layer, moments: Array, grid: BlockMultipliers) -> dict[str, Callable[[], Found]]:
    """What is compared, by the name of its column."""
    w, lattice = layer.weight, grid.lattice

    def gptq() -> Array:
        return compensated_codes(w, layer.seen, lattice, DAMPING)

    def descent(codes: Array) -> Found:
        return alternated(w, moments, grid, codes)

    return {
        "GPTQ": lambda: (grid, gptq()),
        "GPTQ, descent": lambda: descent(gptq()),
        "AdaRound": lambda: (grid, adarounded(w, moments, lattice)),
        "GPTQ, AdaRound": lambda: (grid, adarounded(w, moments, lattice, gptq())),
        "GPTQ, AdaRound, descent": lambda: descent(adarounded(w, moments, lattice, gptq())),
    }


def compared(layer: Layer, bits: int, block: int | None) -> dict[str, tuple[float, float, float]]:
    """Error of each method on data seen and held out, over that of nearest, and CPU seconds.

    A layer whose data is all zero has no rows to compare: an empty dict.
    """
    moments = damped(layer.seen, DAMPING)
    if moments is None:
        return {}
    grid = fitted_grid(layer.weight, bits, block)

    def errors(grid: BlockMultipliers, codes: Array) -> Array:
        real = grid.lattice.real(codes)
        both = [output_error(layer.weight, m, real).sum() for m in (layer.seen, layer.held_out)]
        return np.array(both)

    nearest = errors(grid, grid.lattice.nearest(layer.weight))
    found = {}
    for name, method in methods(layer, moments, grid).items():
        start = time.process_time()
        result = method()
        spent = time.process_time() - start
        seen, held_out = errors(*result) / nearest
        found[name] = (float(seen), float(held_out), spent)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--block", type=int, default=0, help="0: one scale per channel")
    parser.add_argument("--match", default="*", metavar="GLOB", help="names of nodes")
    args = parser.parse_args()
    columns: list[str] = []
    for layer in layers(args):
        found = compared(layer, args.bits, args.block or None)
        if found and not columns:
            columns = ["layer", "size", *found]
            print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        cells = [f"{a:.3f} / {b:.3f} ({t:.1f} s)" for a, b, t in found.values()]
        size = " x ".join(map(str, layer.weight.shape))
        print(f"| {' | '.join([layer.name, size, *cells])} |", flush=True)


if __name__ == "__main__":
    main()
