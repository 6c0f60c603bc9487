"""What workers of a local cluster save, what they cost, and how much moves.

    python -m benchmarks.cluster_cost MODEL.onnx --data DATA [--samples 2000] [--rounds 1]
        [--calibrator mse] [--skip-sensitivity] [--skip-times] [--costs FILE]

Prints the seconds of calibration with a histogram and of sensitivity for target qdq, by this
process on one thread, by one worker and by two workers of one thread each, with the ratios; and for
each calibrator the bytes of observers that a shard sends, those of samples of channels separately.
--costs writes what --calibrator costs for benchmarks/cluster_simulation.py.
"""

from __future__ import annotations

import argparse
import json
import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import qcompile
from benchmarks.cluster_simulation import Costs
from qcompile.calibration import shards
from qcompile.calibration.collector import Collector
from qcompile.calibration.shards import ObservedTap
from qcompile.compiler.cluster.calibration_task import CalibrationTask
from qcompile.compiler.cluster.connect import connected
from qcompile.compiler.cluster.dask_workers import SHARD
from qcompile.compiler.stages.options import CompileOptions
from qcompile.data.npz import DEFAULT_BATCH
from qcompile.ir import is_constant, is_op
from qcompile.ir.model_io.read_model import load
from qcompile.rewriting.registry import calibrators
from qcompile.runtime import kernels

WORKERS = (None, 1, 2)
_CHANNELS = ("rows", "keys", "second_moments", "row_sums")


def options(samples: int, client: Any) -> CompileOptions:
    """One thread, no cache, nothing but the work."""
    return CompileOptions(samples=samples, threads=1, client=client, verify=False, bench=False)


def calibration_seconds(args: argparse.Namespace, client: Any) -> float:
    """Of the stage that calibrates."""
    result = qcompile.compile(
        args.model, args.data, calibrator=args.calibrator, options=options(args.samples, client)
    )
    return float(result.report.seconds["calibrate"])


def sensitivity_seconds(args: argparse.Namespace, client: Any) -> float:
    """Of the whole command, with its calibration on 256 samples."""
    begun = time.monotonic()
    qcompile.sensitivity(args.model, args.data, target="qdq", options=options(256, client))
    return time.monotonic() - begun


def compare(what: str, args: argparse.Namespace, work: Callable[..., float]) -> None:
    """Best of the rounds, each with all numbers of workers in turn."""
    best = dict.fromkeys(WORKERS, float("inf"))
    for _ in range(args.rounds):
        for count in WORKERS:
            with connected(count, None) if count else nullcontext() as client:
                best[count] = min(best[count], work(args, client))
    alone, one, two = (best[count] for count in WORKERS)
    print(f"{what}: {alone:.1f} s in one process, {one:.1f} s with 1 worker, {two:.1f} s with 2")
    added = one - alone
    print(f"  2 workers: {one / two:.2f} times as fast as 1")
    print(f"  1 worker: {added:+.1f} s ({added / alone:+.1%}) over none", flush=True)


class Counting:
    """Does items here as a worker would, and notes what would move: ``moved``, by shard.

    prepare, observe, merge: seconds of each shard. sample: bytes of all samples of channels.
    """

    shard = SHARD

    def __init__(self) -> None:
        self.moved: list[tuple[int, int]] = []
        self.prepare: list[float] = []
        self.observe: list[float] = []
        self.merge: list[float] = []
        self.sent: list[int] = []
        self.sample = 0
        self.model = 0

    def map(self, task: Any, items: Iterable[Any]) -> Iterator[Any]:
        """Observe by fresh observers, count, merge."""
        assert isinstance(task, CalibrationTask)
        taps = shards.ShardCollector.of(task.collector)
        self.model = sum(p.stat().st_size for p in task.kit().files.values())
        worker, source = taps.collector(task.collector.model, 1, spill=False), iter(items)
        while True:
            begun = time.perf_counter()
            item = next(source, None)
            if item is None:
                return
            pickled = pickle.dumps(task.sent(item), protocol=5)
            sent = time.perf_counter()
            observed = shards.observe(worker, pickle.loads(pickled))
            done = time.perf_counter()
            [merged] = task.received([item], observed)
            self.merge.append(time.perf_counter() - done)
            self.prepare.append(sent - begun)
            self.observe.append(done - sent)
            self.sent.append(len(pickled))
            self.moved.append(sizes(observed))
            self.sample = samples(task.collector)
            yield merged

    def costs(self, texts: int) -> Costs:
        """What was measured, of the shards of the data; ``texts``: in a feed.

        The first shard loads the model, and those of general text at the end are others.
        """
        own = slice(1, -1) if len(self.observe) > 2 else slice(None)
        observe = median(self.observe[own])
        return Costs(
            SHARD, texts, median(self.prepare[own]), observe, median(self.merge[own]),
            max(self.observe[0] - observe, 0.0), median(self.sent[own]),
            median(ranges for ranges, _ in self.moved), self.sample, self.model, 0.0,
        )  # fmt: skip

    def account(self, since: Any = None) -> None:
        """There is no cluster."""


def sizes(observed: list[ObservedTap]) -> tuple[int, int]:
    """Bytes of ranges, and of samples of channels."""
    parts = [(name, len(packed.data)) for tap in observed for name, packed in tap.state.items()]
    channels = sum(size for name, size in parts if name in _CHANNELS)
    return sum(size for _, size in parts) - channels, channels


def samples(collector: Collector) -> int:
    """Bytes of the rows that samples of channels have now."""
    states = (tap.observer.state() or {} for tap in collector.taps)
    return sum(state["rows"].nbytes for state in states if "rows" in state)


def bytes_moved(args: argparse.Namespace, calibrator: str) -> tuple[Counting, str]:
    """A row of the table: bytes of a shard, the mean and the most; and what was counted."""
    counting = Counting()

    class Options(CompileOptions):
        @property
        def workers(self) -> Any:
            """Those that count."""
            return counting

    given = Options(samples=args.samples, threads=1, verify=False, bench=False)
    qcompile.compile(args.model, args.data, calibrator=calibrator, options=given)
    moved = counting.moved
    ranges, channels = zip(*moved, strict=True)
    means = [sum(part) / len(part) / 1e6 for part in (ranges, channels)]
    return counting, (
        f"| {calibrator} | {len(moved)} | {means[0]:.3f} | {max(ranges) / 1e6:.3f} "
        f"| {means[1]:.2f} | {max(channels) / 1e6:.1f} | {channels[-1] / 1e6:.2f} |"
    )


def main() -> None:
    """Print times, ratios and the table of bytes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--calibrator", default="mse", help="one with a histogram")
    parser.add_argument("--skip-sensitivity", action="store_true")
    parser.add_argument("--skip-bytes", action="store_true", help="only times")
    parser.add_argument("--skip-times", action="store_true", help="only bytes")
    parser.add_argument("--costs", type=Path, help="write what a shard costs")
    args = parser.parse_args()
    about = kernels.environment()
    print(f"{', '.join(about.isa)}; onnxruntime {about.onnxruntime}, numpy {about.numpy}")
    if not args.skip_times:
        compare(
            f"calibration, {args.calibrator}, {args.samples} samples", args, calibration_seconds
        )
        if not args.skip_sensitivity:
            compare("sensitivity, qdq", args, sensitivity_seconds)
    if args.skip_bytes:
        return
    print(f"MB that a shard of {SHARD} feeds moves:")
    print("| calibrator | shards | ranges, mean | most | channels, mean | most | last |")
    print("|---|---|---|---|---|---|---|")
    for name in sorted(calibrators()):
        counting, row = bytes_moved(args, name)
        print(row, flush=True)
        if args.costs is not None and name == args.calibrator:
            costs = replace(counting.costs(DEFAULT_BATCH), weights=weights_of(args.model))
            args.costs.write_text(json.dumps(asdict(costs), indent=1) + "\n", encoding="utf-8")


def weights_of(model: Path) -> float:
    """Values of the model's matrices that are multiplied, without tables."""
    graph = load(model)
    constants = [t for n in graph.nodes if is_op(n, "MatMul", "Gemm") for t in n.inputs]
    return float(sum(t.values.size for t in constants if is_constant(t)))


if __name__ == "__main__":
    main()
