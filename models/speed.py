"""Speed of a model compiled by qcompile beside ONNX Runtime's own quantizer, in one run.

    python models/speed.py MODEL.onnx [--dim sequence_length=128 ...] [--data DATA --tokenizer DIR]

Builds onnxruntime.quantization.quantize_dynamic of the same model and qcompile's float, dynamic
and (with data, or made-up inputs) static forms, then times all of them: one live session at a
time, alternating rounds. docs/performance.md says how to read the figures.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from qcompile import Options, Recipe, compile, timing
from qcompile.api import Mode
from qcompile.commands.bench import show
from qcompile.data import open_data
from qcompile.feeds import Feed, input_specs
from qcompile.loading import load
from qcompile.shapes import infer
from qcompile.synthetic import synthetic_feeds


def peers(model: Path, folder: Path) -> list[tuple[str, Path]]:
    """quantize_dynamic with its defaults, as a user would call it."""
    from onnxruntime.quantization import quantize_dynamic

    path = folder / "quantize_dynamic.onnx"
    quantize_dynamic(model, path)
    return [("onnxruntime quantize_dynamic", path)]


def ours(model: Path, feeds: list[Feed], folder: Path) -> list[tuple[str, Path]]:
    """The three forms of target cpu; not verified here, only timed."""
    unchecked = Options(verify=False, bench=False)
    modes: tuple[Mode, ...] = ("float", "dynamic", "static")
    found = []
    for mode in modes:
        data = feeds if mode == "static" else None
        result = compile(model, data, recipe=Recipe(mode=mode), options=unchecked)
        path = folder / f"{mode}.onnx"
        result.save(path)
        found.append((f"qcompile {mode}", path))
    return found


def main() -> None:
    """Print one table a set of shapes, or JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--dim", action="append", default=[], help="name=size, repeatable")
    parser.add_argument("--data", help="calibration data; the last feed is timed")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    graph = load(args.model)
    infer(graph)
    dims = {name: int(size) for name, size in (d.split("=") for d in args.dim)}
    timed = synthetic_feeds(graph, dims, 4, 0)
    feeds = timed
    if args.data:
        feeds = list(open_data(args.data, input_specs(graph), tokenizer=args.tokenizer))
        timed = timed if dims else feeds
    with tempfile.TemporaryDirectory() as name:
        models: list[Any] = [("float, ONNX Runtime's defaults", args.model)]
        models += [*peers(args.model, Path(name)), *ours(args.model, feeds, Path(name))]
        options = timing.Options(args.threads, args.rounds, args.seconds)
        found = timing.compare(models, timed[-1], options)
    if args.json:
        json.dump(found.to_dict(), sys.stdout, indent=1)
    else:
        show(found)


if __name__ == "__main__":
    main()
