"""What a whole compilation costs in memory: the peak of each stage, in a separate process.

    python -m benchmarks.memory_cost MODEL.onnx --data DATA [--tokenizer DIR]
        [--max-memory 1GiB ...]
    python -m benchmarks.memory_cost --make LARGE.onnx [--gigabytes 2.5]

Compiles once per budget, or once without a limit where none is given. The resident memory is read
every few milliseconds; the largest value of each stage is printed, also relative to the size of the
float model. --make instead writes a stack of linear layers with random weights in external data,
and inputs for it, LARGE.npz, next to it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from onnx import TensorProto, helper

from qcompile.commands._options import Size
from qcompile.compiler.config.recipe import Recipe
from qcompile.compiler.driver import compile_model
from qcompile.compiler.stages.options import CompileOptions, Request
from qcompile.ir.model_io.external_data import external_bytes
from qcompile.ir.model_io.read_model import read_model
from qcompile.system.memory import resident_memory

WIDTH = 2048
_EVERY = 0.003  # seconds between readings


class Watch:
    """Progress that notes the largest resident memory of each stage, in bytes."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self._stage, self._start = "start", time.perf_counter()
        threading.Thread(target=self._read, daemon=True).start()

    def step(self, name: str, total: int | None = None) -> None:
        """Start of a stage."""
        now = time.perf_counter()
        spent = self.seconds.get(self._stage, 0.0) + now - self._start
        self.seconds[self._stage] = round(spent, 2)
        self._stage, self._start = name, now

    def advance(self) -> None:
        """Does nothing: only stages count."""

    def _read(self) -> None:
        while True:
            resident = resident_memory().now
            self.peaks[self._stage] = max(self.peaks.get(self._stage, 0), resident)
            time.sleep(_EVERY)


def child(args: argparse.Namespace) -> None:
    """Compile once and print the peaks as JSON."""
    watch = Watch()
    options = CompileOptions(
        tokenizer=args.tokenizer,
        samples=args.samples,
        batch_size=args.batch_size,
        max_memory=args.max_memory[0] if args.max_memory else None,
        bench=not args.no_bench,
        force=True,
    )
    recipe = Recipe(calibrator=args.calibrator, mode=args.mode)
    result = compile_model(Request(args.model, args.data, recipe, options=options, progress=watch))
    watch.step("write")
    with TemporaryDirectory() as folder:
        result.save(Path(folder) / "model.onnx")
    watch.step("end")
    notes = [note for note in result.report.note_texts if "memory" in note]
    print(json.dumps({"peaks": watch.peaks, "seconds": watch.seconds, "notes": notes}))


def measure(args: argparse.Namespace, budget: int | None) -> dict[str, object]:
    """One compilation in a new process: megabytes by stage, and relative to the float model."""
    command = [sys.executable, "-m", "benchmarks.memory_cost", *sys.argv[1:], "--child"]
    command += ["--max-memory", str(budget)] if budget else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"max_memory_mb": budget and budget / 1e6, "failed": done.stderr.splitlines()[-1]}
    figures = json.loads(done.stdout.splitlines()[-1])
    peak = max(figures["peaks"].values())
    size = args.model.stat().st_size + external_bytes(read_model(args.model)[0])
    return {
        "max_memory_mb": budget and round(budget / 1e6),
        "float_mb": round(size / 1e6),
        "peak_mb": round(peak / 1e6),
        "peak_over_float": round(peak / size, 2),
        "over_budget_mb": budget and round((peak - budget) / 1e6),
        "stages_mb": {name: round(value / 1e6) for name, value in figures["peaks"].items()},
        "seconds": figures["seconds"],
        "notes": figures["notes"],
    }


def make(path: Path, gigabytes: float) -> None:
    """Write a stack of square linear layers with Relu between them, layer by layer."""
    layers = max(1, round(gigabytes * 1e9 / (4 * WIDTH * WIDTH)))
    rng, nodes, weights, last = np.random.default_rng(0), [], [], "x"
    with path.with_suffix(".data").open("wb") as file:
        for i in range(layers):
            values = rng.standard_normal((WIDTH, WIDTH), np.float32)
            values *= np.float32(np.sqrt(2 / WIDTH))  # so that activations keep their size
            weight = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=[WIDTH, WIDTH])
            weight.data_location = TensorProto.EXTERNAL
            where = {"location": f"{path.stem}.data", "offset": file.tell()}
            for key, value in {**where, "length": values.nbytes}.items():
                weight.external_data.add(key=key, value=str(value))
            file.write(values.tobytes())
            weights.append(weight)
            nodes.append(helper.make_node("MatMul", [last, f"w{i}"], [f"h{i}"], f"linear{i}"))
            last = f"r{i}"
            nodes.append(helper.make_node("Relu", [f"h{i}"], [last], f"relu{i}"))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH])
        for name in ("x", last)
    ]
    graph = helper.make_graph(nodes, "stack", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    np.savez(path.with_suffix(".npz"), x=rng.standard_normal((64, WIDTH), np.float32))


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--data")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--calibrator", default="minmax")
    parser.add_argument("--mode")
    parser.add_argument("--max-memory", action="append", type=_size, default=[])
    parser.add_argument("--no-bench", action="store_true")
    parser.add_argument("--make", type=Path, help="write a large model instead")
    parser.add_argument("--gigabytes", type=float, default=2.5)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make is not None:
        make(args.make, args.gigabytes)
    elif args.model is None:
        parser.error("give a model, or --make")
    elif args.child:
        args.max_memory = args.max_memory[-1:]
        child(args)
    else:
        json.dump([measure(args, b) for b in args.max_memory or [None]], sys.stdout, indent=1)


def _size(text: str) -> int:
    return int(Size().convert(text, None, None))


if __name__ == "__main__":
    main()
