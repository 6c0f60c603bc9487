"""Kills a compile at random points, runs the same command again, and compares the bytes.

    python -m benchmarks.robustness.kill_and_resume MODEL.onnx [--points 20] [--seed 0]
        -- --data DATA …

Arguments after ``--`` are passed to ``qcompile compile``. The first build is not interrupted and
has no cache: all others must give the same bytes, and are killed within its duration, by SIGKILL,
SIGTERM and SIGINT in turn. A killed build may leave no partial file next to its output, and after
SIGTERM and SIGINT no temporary file anywhere. Exit code 1 unless all resume.
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

from models._common import fail

_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
_OF_THE_RUNTIME = (".ses",)  # onnxruntime's, which importing it writes
# qcompile's exit code, and that of a process killed before qcompile handles the signal.
_CODES = {
    signal.SIGKILL: (-signal.SIGKILL,),
    signal.SIGTERM: (143, -signal.SIGTERM),
    signal.SIGINT: (130, -signal.SIGINT),
}


def command(model: Path, folder: Path, options: list[str]) -> list[str]:
    """The command line of a compilation into this folder."""
    own = [sys.executable, "-m", "qcompile.commands.cli", "compile", str(model)]
    return [*own, "-o", str(folder / "out.onnx"), *options]


def environment(folder: Path) -> dict[str, str]:
    """An environment with the folder for temporary files inside ``folder``."""
    scratch = folder / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    return {**os.environ, "TMPDIR": str(scratch)}


def undisturbed(model: Path, folder: Path, options: list[str]) -> tuple[bytes, float]:
    """Bytes and seconds of a build that is not interrupted."""
    start = time.monotonic()
    args = [*command(model, folder, options), "--no-cache", "-q"]
    done = subprocess.run(args, env=environment(folder), check=False)
    if done.returncode:
        fail("the first build failed: nothing to compare with", done.returncode)
    return (folder / "out.onnx").read_bytes(), time.monotonic() - start


def enable_sigint() -> None:
    """Undo that a shell's background jobs, and their children, ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def kill(args: list[str], folder: Path, after: float, number: signal.Signals) -> int | None:
    """The exit code of a build killed after so many seconds, None where it ended before."""
    process = subprocess.Popen(
        args,
        env=environment(folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=enable_sigint,
    )
    try:
        process.wait(after)
        return None
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        return process.wait() or None


def debris(folder: Path, number: signal.Signals, expected: bytes) -> list[str]:
    """Partial outputs and temporary files that a killed build left."""
    out, found = folder / "out.onnx", []
    if out.exists() and out.read_bytes() != expected:
        found.append("half an output")
    if number is not signal.SIGKILL:
        found += [str(p) for p in folder.glob(".*")]
        found += [str(p) for p in (folder / "tmp").iterdir() if p.name not in _OF_THE_RUNTIME]
    return found


def resume(args: list[str], folder: Path, expected: bytes) -> tuple[bool, str]:
    """Whether the same command now gives the expected bytes, and its notes or what is wrong."""
    done = subprocess.run(
        args, env=environment(folder), capture_output=True, text=True, check=False
    )
    if done.returncode:
        return False, done.stderr.strip().splitlines()[-1]
    notes = [line for line in done.stdout.splitlines() if "earlier run" in line]
    same = (folder / "out.onnx").read_bytes() == expected
    return same, "; ".join(notes) if same else "other bytes"


def attempt(
    model: Path, folder: Path, options: list[str], expected: bytes, after: float, number: int
) -> str | None:
    """What went wrong, "" for nothing, None where the build ended before it was killed."""
    args = [*command(model, folder, options), "--cache", str(folder / "cache")]
    sign = _SIGNALS[number % len(_SIGNALS)]
    code = kill(args, folder, after, sign)
    if code is None:
        return None
    left = debris(folder, sign, expected)
    ok, detail = resume(args, folder, expected)
    faults = [f"left behind: {', '.join(left)}"] if left else []
    faults += [] if ok else [detail]
    faults += [] if code in _CODES[sign] else [f"exit code {code}"]
    entries = list((folder / "cache").glob("*"))
    faults += [f"{len(entries)} entries left in the cache"] if entries else []
    result = "; ".join(faults) or f"same bytes  {detail}"
    print(f"{number + 1:3d}  {sign.name:8} after {after:6.2f} s  {result}", flush=True)
    return "; ".join(faults)


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The script's own arguments, and those after ``--``."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def main() -> None:
    """Parse, kill, count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="MODEL.onnx")
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    own, options = split_arguments(sys.argv[1:])
    args = parser.parse_args(own)
    draw, good, done = random.Random(args.seed), 0, 0
    with tempfile.TemporaryDirectory() as base:
        expected, span = undisturbed(args.model, Path(base) / "whole", options)
        print(f"not interrupted: {len(expected):,} bytes in {span:.1f} s", flush=True)
        while done < args.points:
            with tempfile.TemporaryDirectory(dir=base) as folder:
                after = draw.uniform(0.1, 1) * span
                faults = attempt(args.model, Path(folder), options, expected, after, done)
            if faults is not None:
                done, good = done + 1, good + (faults == "")
    print(f"{good} of {args.points} resume to the same bytes")
    sys.exit(0 if good == args.points else 1)


if __name__ == "__main__":
    main()
