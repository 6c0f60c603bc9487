"""What a job is, and how one is run: make a model, compile it, load both, compare their answers."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

HERE = Path(__file__).parent
MOST_SECONDS = 300  # of a job, on two cores that do nothing else
HANGS_AFTER = 900  # seconds of a command
# Commands run with this interpreter, so that they are those of its environment.
PROGRAMS = {"qcompile": "qcompile.commands.cli", "optimum-cli": "optimum.commands.optimum_cli"}
NPM_INSTALL = "npm install --ignore-scripts --no-package-lock --prefix benchmarks/jobs"


class JobError(Exception):
    """A command or a package of a job failed."""


@dataclass(frozen=True)
class Job:
    """One task for one architecture in one package.

    ``make`` writes the model and its data into an empty folder. ``build`` and then ``gate`` are
    commands that run in that folder; they make ``float`` and ``compiled``, which are folders or
    files. ``answer`` asks the package, given that folder and one of these two paths.
    ``compare`` gives the ``measure`` of the answers of ``float`` and ``compiled``: 1 if equal,
    and ``least`` is the smallest that passes.
    """

    name: str
    package: str
    needs: tuple[str, ...]
    make: Callable[[Path], None]
    build: tuple[str, ...]
    answer: Callable[[Path, Path], Any]
    compare: Callable[[Any, Any], float]
    measure: str
    least: float
    gate: str = ""
    npm: tuple[str, ...] = ()
    float_name: str = "float"
    compiled_name: str = "compiled"
    compiled_file: str = "model.onnx"

    @property
    def commands(self) -> tuple[str, ...]:
        """All commands, in their order."""
        return (*self.build, self.gate) if self.gate else self.build

    def model_file(self, work: Path) -> Path:
        """The compiled model that the package loads."""
        compiled = work / self.compiled_name
        return compiled if compiled.suffix == ".onnx" else compiled / self.compiled_file


@dataclass(frozen=True)
class Outcome:
    """One line of the table. ``faults`` is empty if the job passed; ``missing`` says what is."""

    job: Job
    versions: str = ""
    missing: str = ""
    score: float | None = None
    size: int = 0
    float_size: int = 0
    seconds: float = 0.0
    faults: tuple[str, ...] = ()
    gate_failed: bool = False


def run(
    job: Job, work: Path, *, damaged: bool = False, most_seconds: float = MOST_SECONDS
) -> Outcome:
    """Do a job in an empty folder. ``damaged``: damage the compiled file before it is used."""
    try:
        versions = versions_of(job)
    except JobError as error:
        return Outcome(job, missing=str(error))
    started = time.monotonic()
    faults: list[str] = []
    refused: list[str] = []
    score = None
    try:
        job.make(work)
        for command in job.build:
            call(command, work)
        if damaged:
            damage(job.model_file(work))
        if job.gate:
            refused = gate_faults(job.gate, work)
        score = compare(job, work)
        if not score >= job.least:
            faults.append(f"{job.measure} {score:.4f} is below {job.least}")
    except Exception as error:  # of any package: the other jobs go on
        faults.append(f"{type(error).__name__}: {error}")
    seconds = time.monotonic() - started
    if seconds > most_seconds:
        faults.append(f"took {seconds:.0f} s; at most {most_seconds:.0f} are allowed")
    sizes = size_of(job.model_file(work)), size_of(float_file(job, work))
    all_faults = (*refused, *faults)
    return Outcome(job, versions, "", score, *sizes, seconds, all_faults, bool(refused))


def compare(job: Job, work: Path) -> float:
    """The measure of a job, from the answers of both models."""
    expected = job.answer(work, work / job.float_name)
    found = job.answer(work, work / job.compiled_name)
    return job.compare(expected, found)


def gate_faults(command: str, work: Path) -> list[str]:
    """What a gate in CI says: nothing if it passes."""
    try:
        call(command, work)
    except JobError as error:
        return [str(error)]
    return []


def call(command: str, work: Path) -> str:
    """What a command prints to stdout.

    Raises:
        JobError: it failed; the last lines of its stderr are in the message.
    """
    name, *arguments = shlex.split(command)
    program = [sys.executable, "-m", PROGRAMS[name]] if name in PROGRAMS else [name]
    paths = [str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [*program, *arguments],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANGS_AFTER,
    )
    if done.returncode != 0:
        last = " ".join(done.stderr.strip().splitlines()[-3:])
        raise JobError(f"`{command}`: exit code {done.returncode}: {last}")
    return done.stdout


def ask_node(script: str, work: Path, *arguments: object) -> Any:
    """The JSON that a script of this folder prints in Node."""
    words = [str(HERE / script), *map(str, arguments)]
    return json.loads(call(shlex.join(["node", *words]), work).splitlines()[-1])


def versions_of(job: Job) -> str:
    """Names and versions of the packages that a job needs.

    Raises:
        JobError: one is not installed; the message says how to install it.
    """
    found = []
    for name in job.needs:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            raise JobError(f"{name} is not installed: pip install -e '.[jobs]'") from None
    if job.npm and shutil.which("node") is None:
        raise JobError("Node is not installed")
    for name in job.npm:
        path = HERE / "node_modules" / name / "package.json"
        if not path.is_file():
            raise JobError(f"{name} is not installed: {NPM_INSTALL}")
        found.append(f"{name} {json.loads(path.read_text(encoding='utf-8'))['version']}")
    return ", ".join(found)


def float_file(job: Job, work: Path) -> Path:
    """The float model that was compiled."""
    path = work / job.float_name
    return path if path.suffix == ".onnx" else path / "model.onnx"


def size_of(path: Path) -> int:
    """Bytes of a file; 0 if there is none."""
    return path.stat().st_size if path.is_file() else 0


def damage(path: Path) -> None:
    """Shuffle the values of each weight: a valid file, and a useless model.

    Reversing them would not do: where all weights are, one undoes the other.
    """
    model, rng = onnx.load(path), np.random.default_rng(0)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.size >= 256:
            shuffled = rng.permutation(values.reshape(-1)).reshape(values.shape)
            tensor.CopyFrom(numpy_helper.from_array(shuffled, tensor.name))
    onnx.save(model, path)
