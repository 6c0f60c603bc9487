"""What workers of a local cluster save, what they cost, and how much moves.

    python -m benchmarks.cluster_cost MODEL.onnx --data DATA [--samples 2000] [--rounds 1]
        [--calibrator mse] [--skip-sensitivity]

Prints the seconds of calibration with a histogram and of sensitivity for target qdq, by this
process on one thread, by one worker and by two workers of one thread each, with the ratios; and for
each calibrator the bytes of observers that a shard sends, those of samples of channels separately.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import qcompile
from qcompile.calibration import shards
from qcompile.calibration.shards import ObservedTap
from qcompile.compiler.cluster.calibration_task import CalibrationTask
from qcompile.compiler.cluster.connect import connected
from qcompile.compiler.cluster.dask_workers import SHARD
from qcompile.compiler.stages.options import CompileOptions
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
    """Does items here as a worker would, and notes what would move: ``moved``, by shard."""

    shard = SHARD

    def __init__(self) -> None:
        self.moved: list[tuple[int, int]] = []

    def map(self, task: Any, items: Iterable[Any]) -> Iterator[Any]:
        """Observe by fresh observers, count, merge."""
        assert isinstance(task, CalibrationTask)
        taps = shards.ShardCollector.of(task.collector)
        worker = taps.collector(task.collector.model, 1, spill=False)
        for item in items:
            observed = shards.observe(worker, task.sent(item))
            self.moved.append(sizes(observed))
            yield task.received(item, observed)

    def account(self, since: Any = None) -> None:
        """There is no cluster."""


def sizes(observed: list[ObservedTap]) -> tuple[int, int]:
    """Bytes of ranges, and of samples of channels."""
    parts = [(name, len(packed.data)) for tap in observed for name, packed in tap.state.items()]
    channels = sum(size for name, size in parts if name in _CHANNELS)
    return sum(size for _, size in parts) - channels, channels


def bytes_moved(args: argparse.Namespace, calibrator: str) -> str:
    """A row of the table: bytes of a shard, the mean and the most."""

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
    return (
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
    parser.add_argument("--skip-times", action="store_true", help="only bytes")
    args = parser.parse_args()
    about = kernels.environment()
    print(f"{', '.join(about.isa)}; onnxruntime {about.onnxruntime}, numpy {about.numpy}")
    if not args.skip_times:
        compare(
            f"calibration, {args.calibrator}, {args.samples} samples", args, calibration_seconds
        )
        if not args.skip_sensitivity:
            compare("sensitivity, qdq", args, sensitivity_seconds)
    print(f"MB that a shard of {SHARD} feeds moves:")
    print("| calibrator | shards | ranges, mean | most | channels, mean | most | last |")
    print("|---|---|---|---|---|---|---|")
    for name in sorted(calibrators()):
        print(bytes_moved(args, name), flush=True)


if __name__ == "__main__":
    main()
