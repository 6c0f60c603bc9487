"""What calibration costs: time relative to float inference, and peak memory by sample count.

    python -m benchmarks.calibration_cost MODEL.onnx --data DATA [--tokenizer DIR]
        [--calibrator minmax]

Prints the time of float inference over the samples (ONNX Runtime's defaults, same threads), the
time of the collector over the same samples, their ratio in alternating rounds, and the peak memory
of child processes that calibrate on 1, 2 and 4 times the samples.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from qcompile import Recipe
from qcompile.calibration.collector import CollectorOptions, collect, collector
from qcompile.compiler.stages.pipelines import SIMPLIFY
from qcompile.data.feeds import Feed, input_specs
from qcompile.data.open_data import open_data
from qcompile.ir import Graph
from qcompile.ir.analysis.shape_inference import infer
from qcompile.ir.model_io.read_model import load
from qcompile.planning import Context, PassSettings
from qcompile.rewriting.pass_manager import PassManager
from qcompile.rewriting.pipeline_spec import parse
from qcompile.rewriting.registry import target
from qcompile.runtime import session as runtime
from qcompile.runtime.session import Session, SessionOptions
from qcompile.system.memory import peak_memory


def planned(model: Path) -> tuple[Graph, Context]:
    """The simplified graph, and a context with the ranges that target cpu requests."""
    graph = load(model)
    infer(graph)
    ctx = Context(target("cpu"), runtime.evaluate, PassSettings("static"))
    PassManager(parse(f"{SIMPLIFY},plan-operands")).run(graph, ctx)
    return graph, ctx


def feeds_of(graph: Graph, args: argparse.Namespace) -> list[Feed]:
    """The samples, read once."""
    specs = input_specs(graph)
    return list(
        open_data(args.data, specs, tokenizer=args.tokenizer, samples=args.samples, batch_size=8)
    )


def float_seconds(model: Path, feeds: list[Feed]) -> float:
    """Seconds of float inference over all feeds, without the creation of the session."""
    session = Session(model, SessionOptions(threads=runtime.threads()))
    session.run(feeds[0])
    start = time.perf_counter()
    for feed in feeds:
        session.run(feed)
    return time.perf_counter() - start


def collect_seconds(graph: Graph, ctx: Context, calibrator: str, feeds: list[Feed]) -> float:
    """Seconds of the collector over all feeds, without the creation of the session."""
    options = CollectorOptions(threads=runtime.threads())
    rule = Recipe(calibrator=calibrator).make_calibrator()
    observers = collector(graph, ctx.requests, rule, ctx.evaluate, options)
    observers.update(feeds[0])
    start = time.perf_counter()
    collect(observers, feeds)
    return time.perf_counter() - start


def peak_megabytes(args: argparse.Namespace, repeat: int) -> float:
    """Peak resident memory of a new process that calibrates on the samples ``repeat`` times."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.calibration_cost",
        str(args.model),
        "--data",
        args.data,
    ]
    command += ["--calibrator", args.calibrator, "--child", str(repeat)]
    command += ["--samples", str(args.samples)] if args.samples else []
    command += ["--tokenizer", str(args.tokenizer)] if args.tokenizer else []
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def child(args: argparse.Namespace) -> None:
    """Calibrate and print the peak memory in MB."""
    graph, ctx = planned(args.model)
    rule = Recipe(calibrator=args.calibrator).make_calibrator()
    observers = collector(graph, ctx.requests, rule, ctx.evaluate)
    feeds = feeds_of(graph, args)
    collect(observers, (feed for _ in range(args.child) for feed in feeds))
    print(peak_memory() / 1024**2)


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--calibrator", default="minmax")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    graph, ctx = planned(args.model)
    feeds = feeds_of(graph, args)
    pairs = [
        (float_seconds(args.model, feeds), collect_seconds(graph, ctx, args.calibrator, feeds))
        for _ in range(args.rounds)
    ]
    best = [min(times) for times in zip(*pairs, strict=True)]
    figures = {
        "float_s": best[0],
        "calibrate_s": best[1],
        "ratio_best": best[1] / best[0],
        "ratios": [c / f for f, c in pairs],
        "peak_mb": {n: peak_megabytes(args, n) for n in (1, 2, 4)},
    }
    json.dump(figures, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
