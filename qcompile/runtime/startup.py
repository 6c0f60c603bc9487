"""What it costs to start serving a model: time to load and to answer first, and memory.

Each is measured in a new process, so that models do not find memory that others have left, and
peaks are their own.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qcompile.data.feeds import Feed
from qcompile.errors import ModelError, QCompileError
from qcompile.runtime import session as runtime
from qcompile.runtime.latency import TimingOptions
from qcompile.runtime.request_load import Call, Load, send
from qcompile.runtime.session import Session
from qcompile.system import memory

# A model for ONNX Runtime, or a function that returns, for a number of streams and of threads of
# each, one function per stream that runs a feed. It is pickled, so it must be one of a module.
Served = bytes | Path | Callable[[int, int], Sequence[Call]]
_CHILD = "from qcompile.runtime.startup import main; main()"
_LOADED = 1.0  # seconds under load until memory counts as steady


@dataclass(frozen=True)
class Startup:
    """Seconds, and bytes of resident memory, None where the system does not tell.

    ``base``: of the process before the model was loaded. ``resident`` and ``peak``: of the model,
    that is above ``base``, under load and at most.
    """

    load: float
    first_run: float
    base: int | None
    resident: int | None
    peak: int | None


def open_streams(
    label: str, model: Served, feeds: Sequence[Feed], load: Load, options: TimingOptions
) -> tuple[list[Call], list[Feed]]:
    """One call per stream, and feeds without what the model does not read.

    If ``options.threads`` is 1, all streams share one session, and with it the weights: a run then
    computes in the thread that calls it. With more threads every stream has its own session, since
    concurrent runs of one session would share its threads. Raises ModelError.
    """
    threads = options.threads
    if callable(model):
        return list(model(load.streams, threads)), list(feeds)
    count = sessions_of(load, threads)
    sessions = [Session(model, options.session(label, threads)) for _ in range(count)]
    inputs = sessions[0].inputs
    calls: list[Call] = [sessions[i % count].call for i in range(load.streams)]
    return calls, [{n: feed[n] for n in inputs if n in feed} for feed in feeds]


def sessions_of(load: Load, threads: int) -> int:
    """Sessions of a model for ONNX Runtime."""
    return 1 if threads == 1 else load.streams


def measure_startup(
    label: str, model: Served, feeds: Sequence[Feed], load: Load, options: TimingOptions
) -> Startup:
    """Load the model in this process, run the first feed, then all of them under load."""
    memory.release_memory()
    base = memory.resident_memory()
    memory.reset_peak()
    start = time.perf_counter()
    calls, feeds = open_streams(label, model, feeds, load, options)
    loaded = time.perf_counter()
    calls[0](feeds[0])
    first = time.perf_counter()
    closed = replace(load, arrival=None)
    send(calls, feeds, closed.plan(0, min(options.seconds, _LOADED), len(feeds)))
    after = memory.resident_memory()
    above = after.now - base.now, after.peak - base.now
    return Startup(loaded - start, first - loaded, base.now, *above)


def startup_in_new_process(
    label: str, model: Served, feeds: Sequence[Feed], load: Load, options: TimingOptions
) -> Startup:
    """``measure_startup`` in a new process. Raises ModelError where that fails."""
    task = runtime.library_paths(), label, model, list(feeds), load, options
    done = subprocess.run(
        [sys.executable, "-c", _CHILD],
        input=pickle.dumps(task),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        check=False,
    )
    lines = done.stdout.decode(errors="replace").splitlines()
    if done.returncode or not lines:
        said = lines or done.stderr.decode(errors="replace").splitlines()
        why = said[-1] if said else f"exit code {done.returncode}"
        raise ModelError(f"{label} cannot be started in a process of its own: {why}")
    return Startup(**json.loads(lines[-1]))


def main() -> None:
    """The new process: a task on stdin, its result as the last line on stdout."""
    libraries, *task = pickle.load(sys.stdin.buffer)
    try:
        with runtime.custom_operators(libraries):
            print("\n" + json.dumps(vars(measure_startup(*task))))
    except QCompileError as e:
        print(f"\n{e}")
        sys.exit(e.exit_code)
