"""Fifteen jobs of users: compile a model, load it in the package, compare its answers.

    python -m benchmarks.jobs [--match GLOB]

Five jobs (embed, classify, rerank, detect, serve) with three architectures each; docs/jobs.md shows
their commands. Prints a line for each job: package and versions, measure of the answers, size,
seconds. The exit code is 1 if a job fails. A job whose package is not installed is a line with the
reason and fails nothing. With --damaged, the compiled file of each job is damaged before it is
used, and a job that does not notice fails.

Install what the jobs need, in a checkout:

    pip install -e '.[jobs]'
    npm install --ignore-scripts --no-package-lock --prefix benchmarks/jobs
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from fnmatch import fnmatch
from pathlib import Path

from benchmarks.jobs import classify, detect, embed, rerank, serve
from benchmarks.jobs._job import MOST_SECONDS, Job, Outcome, run
from models._common import fail
from qcompile.runtime import kernels

ALL: tuple[Job, ...] = (*embed.JOBS, *classify.JOBS, *rerank.JOBS, *detect.JOBS, *serve.JOBS)
COLUMNS = "| job | package | versions | measure | answers | at least | size | seconds | result |"


def line(outcome: Outcome, *, damaged: bool = False) -> str:
    """One line of the table."""
    job = outcome.job
    score = "-" if outcome.score is None else f"{outcome.score:.4f}"
    size = "-"
    if outcome.float_size:
        ratio = outcome.size / outcome.float_size
        size = f"{outcome.size / 1e6:.2f} MB, {ratio:.0%}"
    seconds = f"{outcome.seconds:.0f}" if outcome.versions else "-"
    cells = (job.name, job.package, outcome.versions, job.measure, score, f"{job.least}", size)
    return f"| {' | '.join((*cells, seconds, result(outcome, damaged=damaged)))} |"


def result(outcome: Outcome, *, damaged: bool = False) -> str:
    """What became of a job, in a few words; | would end a cell of the table."""
    if outcome.missing:
        return f"not run: {outcome.missing}"
    faults = "; ".join(outcome.faults).replace("|", "/").replace("\n", " ")
    if damaged:
        return f"noticed: {faults}" if noticed(outcome) else "FAILED: the damage was not noticed"
    return f"FAILED: {faults}" if faults else "passed"


def noticed(outcome: Outcome) -> bool:
    """Whether a damaged file failed the comparison of the answers, and the gate if there is one."""
    compared = outcome.score is not None and not outcome.score >= outcome.job.least
    return compared and (not outcome.job.gate or outcome.gate_failed)


def failed(outcome: Outcome, *, damaged: bool = False) -> bool:
    """Whether a job counts for the exit code."""
    if outcome.missing:
        return False
    return not noticed(outcome) if damaged else bool(outcome.faults)


def chosen(pattern: str) -> list[Job]:
    """The jobs whose name matches."""
    found = [job for job in ALL if fnmatch(job.name, pattern)]
    if not found:
        fail(f"no job matches {pattern}; there are {', '.join(job.name for job in ALL)}")
    return found


def table(jobs: Sequence[Job], *, damaged: bool, most_seconds: float = MOST_SECONDS) -> int:
    """Print the table line by line; the exit code."""
    print(f"{COLUMNS}\n|{'---|' * COLUMNS.count(' | ')}---|", flush=True)
    count = 0
    for job in jobs:
        # What packages print must not get between the lines of the table.
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
            outcome = run(job, Path(folder), damaged=damaged, most_seconds=most_seconds)
        count += failed(outcome, damaged=damaged)
        print(line(outcome, damaged=damaged), flush=True)
    here = kernels.environment()
    print(f"\nPython {here.python}; {here.machine}, {', '.join(here.isa)}.")
    return min(count, 1)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.jobs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--match", default="*", metavar="GLOB", help="jobs to run, as 'embed/*'")
    parser.add_argument("--damaged", action="store_true", help="damage each compiled file")
    parser.add_argument(
        "--most-seconds",
        type=float,
        default=MOST_SECONDS,
        metavar="N",
        help="a job that takes longer fails; default: %(default)s",
    )
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # before a package reads it: nothing is downloaded
    jobs = chosen(args.match)
    return table(jobs, damaged=args.damaged, most_seconds=args.most_seconds)


if __name__ == "__main__":
    raise SystemExit(main())
