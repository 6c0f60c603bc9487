"""Compiles one model of the battery by the command line, as a user would, in a separate process."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import onnxruntime

from benchmarks.robustness._battery_feeds import random_feeds
from qcompile.commands import cli
from qcompile.commands import compile as _  # noqa: F401  so that it is imported once, not by each
from qcompile.compiler.report.notes import NOTHING_QUANTIZED, RANDOM_MODEL, detail_of
from qcompile.data.feeds import Feed
from qcompile.errors import DataError, QCompileError
from qcompile.ir.model_io import read_model
from qcompile.runtime.evaluation import closeness
from qcompile.runtime.evaluation.closeness import Gates
from qcompile.runtime.session import Session

_PATIENCE = 10


@dataclass(frozen=True)
class Form:
    """How a model is compiled; ``data`` False: without data, as by a user who has none."""

    target: str
    mode: str
    data: bool = True


FORMS = {
    "static": Form("cpu", "static"),
    "dynamic": Form("cpu", "dynamic"),
    "weight-only": Form("cpu", "weight-only"),
    "float": Form("cpu", "float"),
    "qdq": Form("qdq", "static"),
    "qdq-weight-only": Form("qdq", "weight-only"),
    "qdq-float": Form("qdq", "float"),
    "dynamic-no-data": Form("cpu", "dynamic", data=False),
    "weight-only-no-data": Form("cpu", "weight-only", data=False),
    "float-no-data": Form("cpu", "float", data=False),
}


@dataclass(frozen=True)
class Limits:
    """Limits for one model: seconds of processor time, and bytes of address space.

    Wall time is limited to ten times the seconds, since the machine may be busy.
    """

    seconds: float = 60.0
    memory: int = 8 << 30


@dataclass(frozen=True)
class Outcome:
    """The result of one model in one form.

    ``verdict``: as in the table of battery.py. ``runs``: ONNX Runtime runs the original model on
    random inputs.
    """

    file: str
    form: str
    verdict: str
    detail: str = ""
    runs: bool = False


def outcome(model: Path, form: str, limits: Limits, label: str = "") -> Outcome:
    """Compile one model in a process that is killed when it takes too long."""
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=_work, args=(model, form, limits, sender))
    worker.start()
    sender.close()
    verdict, detail, runs = "hung", f"over {limits.seconds:g} s", False
    if receiver.poll(_PATIENCE * limits.seconds):
        try:
            verdict, detail, runs = receiver.recv()
        except EOFError:
            worker.join()
            if worker.exitcode != -signal.SIGXCPU:
                verdict, detail = "crashed", f"ended with code {worker.exitcode}"
    worker.kill()
    worker.join()
    return Outcome(label or model.name, form, verdict, detail, runs)


def _work(model: Path, form: str, limits: Limits, sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory, limits.memory))
    seconds = math.ceil(limits.seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # SIGXCPU would leave a core file
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        feeds = random_feeds(model)
        save(feeds.calibration, folder / "feeds")
        has_data = FORMS[form].data and bool(feeds.calibration)
        code, stderr = run_compile(model, form, folder, has_data=has_data)
        verdict = judge(model, folder / "out.onnx", code, stderr, feeds.fresh)
        sender.send((*verdict, bool(feeds.calibration)))


def save(feeds: list[Feed], folder: Path) -> None:
    """Write each feed as .npz: a folder of them is data for ``compile``."""
    folder.mkdir()
    for i, feed in enumerate(feeds):
        np.savez(folder / f"{i:03}.npz", allow_pickle=False, **feed)


def run_compile(model: Path, form: str, folder: Path, *, has_data: bool) -> tuple[int, str]:
    """Exit code of ``qcompile compile``, and its output on stderr."""
    arguments = ["compile", str(model), "-o", str(folder / "out.onnx"), "--no-bench", "--json"]
    arguments += ["--target", FORMS[form].target, "--mode", FORMS[form].mode]
    if has_data:
        arguments += ["--data", str(folder / "feeds")]
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
        setattr(sys, name, os.fdopen(number, "w", closefd=False))  # even where it was replaced
    sys.argv = ["qcompile", *arguments]
    try:
        cli.main(arguments)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 2
    sys.stderr.flush()
    return code, (folder / "stderr").read_text(errors="replace")


def judge(
    model: Path, out: Path, code: int, stderr: str, fresh: Sequence[list[Feed]]
) -> tuple[str, str]:
    """The verdict and its detail, from the exit code, the messages and the file written."""
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    message = (lines or [""])[0].removeprefix("error: ")
    if "Traceback" in stderr or message.startswith("internal error"):
        return "crashed", message or stderr.splitlines()[-1]
    if code == 0:
        return _judge_file(model, out, fresh)
    if out.exists():
        return "wrong", f"exit code {code}, but a file was written"
    if len(lines) != 1:
        return "wrong", f"exit code {code} with {len(lines)} lines of error"
    return ("gate" if code == 1 else "refused"), message


def _judge_file(model: Path, out: Path, fresh: Sequence[list[Feed]]) -> tuple[str, str]:
    """The verdict on a compiled file, on inputs and at sizes that the compiler has not seen."""
    report = json.loads(out.with_name(f"{out.stem}.report.json").read_text(encoding="utf-8"))
    unchanged = detail_of(NOTHING_QUANTIZED, report["notes"])
    random = detail_of(RANDOM_MODEL, report["notes"]) is not None
    for feeds in fresh:
        try:
            fault = _compare(model, out, feeds)
        except QCompileError as e:
            return "broken", f"does not run {_shown(feeds)}: {e}"
        if fault and not random and _is_deterministic(model, feeds):
            return "wrong", f"on fresh inputs {_shown(feeds)}: {fault}"
    return ("ok", "") if unchanged is None else ("unchanged", unchanged)


def _compare(model: Path, out: Path, feeds: list[Feed]) -> str:
    """The first gate that fails, empty where none does. Raises QCompileError where the compiled
    model does not run."""
    reference = Session(read_model.runnable(model))
    old = [reference.run(feed) for feed in feeds]
    compiled = Session(out)
    new = [compiled.run(feed) for feed in feeds]
    try:
        verdict = closeness.judge(zip(old, new, feeds, strict=True), Gates())
    except DataError as e:
        return "" if "nothing to compare" in str(e) else str(e)
    return (verdict.failures or [""])[0]


def _shown(feeds: list[Feed]) -> str:
    sizes = (f"{name} {list(values.shape)}" for name, values in feeds[0].items())
    return f"at {', '.join(sizes)}"


def _is_deterministic(model: Path, feeds: list[Feed]) -> bool:
    """False where the float model's outputs are random, or depend on earlier runs."""
    forwards, backwards = Session(read_model.runnable(model)), Session(read_model.runnable(model))
    first = [forwards.run(feed) for feed in feeds]
    second = [backwards.run(feed) for feed in reversed(feeds)][::-1]
    runs = zip(first, second, feeds, strict=True)
    return closeness.judge(runs, Gates(None, None, max_abs=0.0)).passed


def runtime_version() -> str:
    """The version of ONNX Runtime."""
    return str(onnxruntime.__version__)
