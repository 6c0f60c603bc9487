"""Runs one case in a separate process, which may crash, hang or try to use all memory.

The child is forked from a process without threads that has imported the package already, so a case
costs milliseconds, where a new interpreter costs a second.
"""

from __future__ import annotations

import math
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_POLL = 0.005
_PATIENCE = 10
_LAST = 4096  # characters of output that are returned


@dataclass(frozen=True)
class Outcome:
    """How a case ended. ``code`` is None where a signal ended it; ``memory``: peak in bytes;
    ``output``: the end of stdout and stderr."""

    code: int | None
    signal: int
    hung: bool
    seconds: float
    memory: int
    output: str

    @property
    def crashed(self) -> bool:
        return self.signal != 0 and not self.hung


def run(case: Callable[[], object], seconds: float, memory: int, log: Path) -> Outcome:
    """Run ``case``: it is killed after ``seconds``, and allocations over ``memory`` bytes fail.

    The seconds are CPU time, since the machine may be busy; the limit of wall time is ten times as
    long. Output is written to ``log``. An uncaught exception gives code 99 and a traceback.
    """
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        _work(case, seconds, memory, log)
    hung = False
    while True:
        done, status, used = os.wait4(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() - start > _PATIENCE * seconds and not hung:
            os.kill(child, signal.SIGKILL)
            hung = True
        time.sleep(_POLL)
    cpu_seconds = used.ru_utime + used.ru_stime
    code = os.waitstatus_to_exitcode(status)
    hung = hung or code == -signal.SIGXCPU
    output = log.read_bytes().decode(errors="replace")[-_LAST:]
    memory = used.ru_maxrss * 1024
    return Outcome(None if code < 0 else code, max(0, -code), hung, cpu_seconds, memory, output)


def _work(case: Callable[[], object], seconds: float, memory: int, log: Path) -> None:
    """The child: never returns."""
    code = 99
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        limit = math.ceil(seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        case()
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
