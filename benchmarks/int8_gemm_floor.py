"""How long only the int8 matrix multiplications of an encoder take: a lower bound of its latency.

    python -m benchmarks.int8_gemm_floor [--layers 12] [--width 768] [--inner 3072] [--tokens 128]

Times a graph of MatMulIntegerToFloat nodes, uint8 by per-channel int8 with a bias. Each layer has
four weights [width, width], one [width, inner] and one [inner, width]; no weight is shared, so that
weights come from memory as in a model. Prints milliseconds per run (best and median of alternating
rounds), billions of operations per second and core (a multiplication and an addition are two), and
the same for one layer, whose weights stay in the caches. A compiler can at most save the time that
a model takes beyond the first figure.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from qcompile.runtime import kernels, latency, session

Array = npt.NDArray[Any]
MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Size:
    """Sizes of an encoder and its input."""

    layers: int
    width: int
    inner: int
    tokens: int

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Shapes of the weights of one layer."""
        return [(self.width, self.width)] * 4 + [(self.width, self.inner), (self.inner, self.width)]

    @property
    def operations(self) -> int:
        """Multiplications and additions per run."""
        return 2 * self.tokens * self.layers * sum(k * n for k, n in self.shapes)


def matmul_model(size: Size, seed: int = 0) -> onnx.ModelProto:
    """A model of all matrix multiplications; its inputs are ``x{K}``, uint8 [tokens, K]."""
    rng = np.random.default_rng(seed)
    constants: dict[str, Array] = {
        "step": np.array(0.02, np.float32),
        "zero": np.array(128, np.uint8),
    }
    nodes, outputs = [], []
    for i in range(size.layers):
        for j, (k, n) in enumerate(size.shapes):
            name = f"{i}.{j}"
            constants[f"w{name}"] = rng.integers(-127, 128, (k, n), np.int8)
            constants[f"s{name}"] = np.full(n, 0.01, np.float32)
            constants[f"b{name}"] = np.zeros(n, np.float32)
            inputs = [f"x{k}", f"w{name}", "step", f"s{name}", "zero", "", f"b{name}"]
            nodes.append(
                helper.make_node("MatMulIntegerToFloat", inputs, [f"y{name}"], domain=MICROSOFT)
            )
            outputs.append(
                helper.make_tensor_value_info(f"y{name}", TensorProto.FLOAT, [size.tokens, n])
            )
    inputs_of_graph = [
        helper.make_tensor_value_info(f"x{k}", TensorProto.UINT8, [size.tokens, k])
        for k in sorted({k for k, _ in size.shapes})
    ]
    stored = [numpy_helper.from_array(v, name) for name, v in constants.items()]
    graph = helper.make_graph(nodes, "products", inputs_of_graph, outputs, stored)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def feed(size: Size, seed: int = 0) -> dict[str, Array]:
    """Random uint8 inputs, by name."""
    rng = np.random.default_rng(seed)
    widths = sorted({k for k, _ in size.shapes})
    return {f"x{k}": rng.integers(0, 256, (size.tokens, k), np.uint8) for k in widths}


def measure(sizes: Sequence[Size], options: latency.TimingOptions) -> list[latency.Timing]:
    """Timings of one model for each size, in alternating rounds."""
    models = [(str(s.layers), matmul_model(s).SerializeToString()) for s in sizes]
    return latency.compare_latency(models, feed(sizes[0]), options).timings


def main() -> None:
    """Parse, time, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--inner", type=int, default=0, help="four times the width by default")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=0.5)
    args = parser.parse_args()
    inner = args.inner or 4 * args.width
    sizes = [Size(n, args.width, inner, args.tokens) for n in (args.layers, 1)]
    threads = args.threads or session.threads()
    options = latency.TimingOptions(threads, args.rounds, args.seconds)
    table = Table(title=f"{threads} threads, {', '.join(kernels.instruction_sets())}")
    for heading in ("layers", "MatMuls", "best ms", "median", "GOPS per core"):
        table.add_column(heading, justify="right")
    for size, timing in zip(sizes, measure(sizes, options), strict=True):
        gops = size.operations / timing.best / 1e6 / threads
        count = size.layers * len(size.shapes)
        cells = f"{size.layers}", f"{count}", f"{timing.best:.2f}", f"{timing.median:.2f}"
        table.add_row(*cells, f"{gops:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
