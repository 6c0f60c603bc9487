"""Kills workers and clients at random, and compares the bytes with those of one process.

    python -m benchmarks.robustness.cluster_kills MODEL.onnx [--workers 2] [--kills 20]
        [--clients 5] [--seed 0] -- --data DATA …

Arguments after ``--`` are passed to ``qcompile compile``. The first build has no workers; its
seconds set the pace. Then builds with workers run, one after the other, until so many workers have
been killed (SIGKILL) at random times, at most two in one build. Then so many clients are killed in
the same way, and each time the same command runs again. Exit code 1 unless every build gives the
same bytes and no killed client leaves a worker.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.robustness.kill_and_resume import (
    command,
    environment,
    split_arguments,
    undisturbed,
)

_WORKER = "spawn_main"  # in the command line of processes that multiprocessing starts
_MOST = 2  # kills in one build: an item that is hit three times ends it


def workers_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes of the workers that a client has started."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
        return [p for p in family if any(_WORKER in part for part in p.cmdline())]
    except psutil.Error:
        return []


def kill_workers(
    process: subprocess.Popen[bytes], draw: random.Random, span: float, most: int
) -> int:
    """Kill workers of a running build at random times; how many."""
    killed = 0
    while killed < most:
        try:
            process.wait(draw.uniform(0.1, 0.7) * span)
            return killed
        except subprocess.TimeoutExpired:
            found = workers_of(process)
            if found:
                draw.choice(found).kill()
                killed += 1
    return killed


def start(args: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """A build in a process of its own."""
    return subprocess.Popen(args, env=environment(folder), stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes], folder: Path, expected: bytes) -> str:
    """What is wrong with a build once it ends, empty where its bytes are the expected ones."""
    _, errors = process.communicate()
    if process.returncode:
        lines = errors.decode(errors="replace").strip().splitlines() or ["no message"]
        return f"exit code {process.returncode}: {lines[-1]}"
    return "" if (folder / "out.onnx").read_bytes() == expected else "other bytes"


def with_dead_workers(
    args: list[str], folder: Path, expected: bytes, draw: random.Random, span: float, most: int
) -> tuple[int, str]:
    """How many workers were killed in one build, and what went wrong."""
    process = start([*args, "--no-cache", "-q"], folder)
    killed = kill_workers(process, draw, span, most)
    return killed, finish(process, folder, expected)


def with_dead_client(
    args: list[str], folder: Path, expected: bytes, draw: random.Random, span: float
) -> str | None:
    """What went wrong, None where the build ended before it was killed."""
    args = [*args, "--cache", str(folder / "cache"), "-q"]
    process = start(args, folder)
    try:
        process.wait(draw.uniform(0.2, 1) * span)
        return None
    except subprocess.TimeoutExpired:
        left = workers_of(process)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    _, alive = psutil.wait_procs(left, timeout=30)
    wrong = finish(start(args, folder), folder, expected)
    return "; ".join(filter(None, [f"{len(alive)} workers are left" if alive else "", wrong]))


def main() -> None:
    """Parse, kill, count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="MODEL.onnx")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kills", type=int, default=20, help="of workers")
    parser.add_argument("--clients", type=int, default=5, help="that are killed")
    parser.add_argument("--seed", type=int, default=0)
    own, given = split_arguments(sys.argv[1:])
    args, draw, faults = parser.parse_args(own), random.Random(0), 0
    draw.seed(args.seed)
    with tempfile.TemporaryDirectory() as base:
        expected, span = undisturbed(args.model, Path(base) / "whole", given)
        print(f"one process: {len(expected):,} bytes in {span:.1f} s", flush=True)
        options = [*given, "--workers", str(args.workers)]
        killed, builds = 0, 0
        while killed < args.kills:
            with tempfile.TemporaryDirectory(dir=base) as name:
                folder, builds, begun = Path(name), builds + 1, time.monotonic()
                line = command(args.model, folder, options)
                most = min(_MOST, args.kills - killed)
                count, wrong = with_dead_workers(line, folder, expected, draw, span, most)
            killed, faults = killed + count, faults + bool(wrong)
            took = time.monotonic() - begun
            print(f"{count} workers killed in {took:.1f} s: {wrong or 'same bytes'}", flush=True)
        clients = 0
        while clients < args.clients:
            with tempfile.TemporaryDirectory(dir=base) as name:
                folder = Path(name)
                line = command(args.model, folder, options)
                found = with_dead_client(line, folder, expected, draw, span)
            if found is not None:
                clients, faults = clients + 1, faults + bool(found)
                print(f"client killed: {found or 'same bytes'}", flush=True)
    print(f"{killed} workers killed in {builds} builds, {clients} clients; {faults} faults")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
