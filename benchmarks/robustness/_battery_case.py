"""Compiles one model of the battery by the command line, as a user would, in a separate process."""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import onnxruntime

from qcompile.commands import cli
from qcompile.commands import compile as _  # noqa: F401  so that it is imported once, not by each
from qcompile.compiler.report.notes import NOTHING_QUANTIZED, RANDOM_MODEL, detail_of
from qcompile.data.feeds import Feed, InputSpec, input_specs
from qcompile.data.synthetic import synthetic_feeds
from qcompile.errors import QCompileError
from qcompile.ir.analysis import shape_inference
from qcompile.ir.model_io import read_model
from qcompile.runtime.evaluation import closeness
from qcompile.runtime.evaluation.closeness import Gates
from qcompile.runtime.session import Session

CALIBRATION_FEEDS, FRESH_FEEDS = 12, 4
# Sizes to try for dynamic dimensions; None: as the compiler would choose.
SIZES = (5, None, 2, 1)
# Target and mode of each form that a model is compiled to.
FORMS = {
    "static": ("cpu", "static"),
    "dynamic": ("cpu", "dynamic"),
    "weight-only": ("cpu", "weight-only"),
    "qdq": ("qdq", "static"),
}


@dataclass(frozen=True)
class Limits:
    """Limits for one model: seconds of wall time, and bytes of address space."""

    seconds: float = 60.0
    memory: int = 8 << 30


@dataclass(frozen=True)
class Outcome:
    """The result of one model in one form.

    ``verdict``: ok, unchanged, refused, gate, wrong, crashed or hung. ``runs``: ONNX Runtime runs
    the original model on the synthetic inputs.
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
    if receiver.poll(limits.seconds):
        try:
            verdict, detail, runs = receiver.recv()
        except EOFError:
            worker.join()
            verdict, detail = "crashed", f"ended with code {worker.exitcode}"
    worker.kill()
    worker.join()
    return Outcome(label or model.name, form, verdict, detail, runs)


def _work(model: Path, form: str, limits: Limits, sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory, limits.memory))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        feeds = random_feeds(model)
        save(feeds[:CALIBRATION_FEEDS], folder / "feeds")
        code, stderr = run_compile(model, form, folder, has_data=bool(feeds))
        verdict = judge(model, folder / "out.onnx", code, stderr, feeds[CALIBRATION_FEEDS:])
        sender.send((*verdict, bool(feeds)))


def random_feeds(model: Path) -> list[Feed]:
    """Random feeds that ONNX Runtime accepts, for calibration and for comparison; may be empty.

    Dynamic dimensions get the first of ``SIZES`` that runs: position tables may be short.
    """
    try:
        graph = read_model.load(model)
        shape_inference.infer(graph)
        specs, session = input_specs(graph), Session(read_model.runnable(model))
    except QCompileError:
        return []
    for size in SIZES:
        open_shapes = {} if size is None else {s.name: _sized(s, size) for s in specs}
        try:
            feeds = synthetic_feeds(
                graph, {}, CALIBRATION_FEEDS + FRESH_FEEDS, 0, shapes=open_shapes
            )
            session.run(feeds[0])
        except QCompileError:
            continue
        return feeds
    return []


def _sized(spec: InputSpec, size: int) -> tuple[int, ...]:
    """The declared shape with every dynamic dimension set; a vector where no rank is declared."""
    declared = (None,) if spec.shape is None else spec.shape
    return tuple(d if isinstance(d, int) else size for d in declared)


def save(feeds: list[Feed], folder: Path) -> None:
    """Write each feed as .npz: a folder of them is data for ``compile``."""
    folder.mkdir()
    for i, feed in enumerate(feeds):
        np.savez(folder / f"{i:03}.npz", allow_pickle=False, **feed)


def run_compile(model: Path, form: str, folder: Path, *, has_data: bool) -> tuple[int, str]:
    """Exit code of ``qcompile compile``, and its output on stderr."""
    target, mode = FORMS[form]
    arguments = ["compile", str(model), "-o", str(folder / "out.onnx"), "--no-bench", "--json"]
    arguments += ["--target", target, "--mode", mode]
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


def judge(model: Path, out: Path, code: int, stderr: str, fresh: list[Feed]) -> tuple[str, str]:
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


def _judge_file(model: Path, out: Path, fresh: list[Feed]) -> tuple[str, str]:
    """The verdict on a compiled file, on inputs that the compiler has not seen."""
    report = json.loads(out.with_name(f"{out.stem}.report.json").read_text())
    unchanged = detail_of(NOTHING_QUANTIZED, report["notes"])
    try:
        old = Session(read_model.runnable(model)) if fresh else None
        new = Session(out)
        verdict = None if old is None else closeness.compare_outputs(old, new, fresh, Gates())
    except QCompileError as e:
        if "nothing to compare" not in str(e):
            return "wrong", f"the compiled file does not run: {e}"
        verdict = None
    random = detail_of(RANDOM_MODEL, report["notes"]) is not None
    if verdict is not None and verdict.failures and not random and _is_deterministic(model, fresh):
        return "wrong", f"on fresh inputs: {verdict.failures[0]}"
    return ("ok", "") if unchanged is None else ("unchanged", unchanged)


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
