"""What a model costs until its first result: time to load it, and memory, in a separate process.

    python -m benchmarks._session_cost MODEL.onnx FEED.npz [--threads N]

Prints JSON. Weights that are stored in few bits are unpacked while the session loads, so what they
save in the file is neither saved in memory nor free of time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qcompile.runtime.session import Session, SessionOptions
from qcompile.system.memory import release_memory, resident_memory

_LOADS = 5


@dataclass(frozen=True)
class SessionCost:
    """load_ms: best of five loads. memory: bytes resident after the first of them and one run, less
    those before; None where the system does not say."""

    load_ms: float
    memory: int | None


def session_cost(model: Path, feed: Path, threads: int) -> SessionCost:
    """Measured in a process of its own. Raises RuntimeError with its last line where it fails."""
    command = [sys.executable, "-m", "benchmarks._session_cost", str(model), str(feed)]
    done = subprocess.run(
        [*command, "--threads", str(threads)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return SessionCost(**json.loads(done.stdout))


def measured(model: Path, feed: Path, options: SessionOptions) -> SessionCost:
    """The cost in this process."""
    with np.load(feed) as file:
        inputs = dict(file)
    times, memory = [], None
    for number in range(_LOADS):
        before = resident_memory()
        start = time.perf_counter()
        session = Session(model, options)
        times.append(1000 * (time.perf_counter() - start))
        session.run({name: inputs[name] for name in session.inputs})
        release_memory()
        after = resident_memory()
        if number == 0 and before is not None and after is not None:
            memory = after.now - before.now
        del session
    return SessionCost(round(min(times), 2), memory)


def main() -> None:
    """Print the cost as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("feed", type=Path, help="inputs by name")
    parser.add_argument("--threads", type=int, default=0, help="default: all cores")
    args = parser.parse_args()
    found = measured(args.model, args.feed, SessionOptions(args.threads, exact=False))
    print(json.dumps({"load_ms": found.load_ms, "memory": found.memory}))


if __name__ == "__main__":
    main()
