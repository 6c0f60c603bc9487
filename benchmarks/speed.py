"""Speed of a model compiled by qcompile beside ONNX Runtime's own quantizer, in one run.

    python -m benchmarks.speed MODEL.onnx [--dim sequence_length=128 ...]
        [--data DATA --tokenizer DIR]

Builds the same model with every peer that is installed (onnxruntime's quantizers and fusions,
OpenVINO through NNCF) and qcompile's float, dynamic and (with data, or made-up inputs) static
forms, then times all of them: one live session at a time, alternating rounds. --dim name=32,128
times one table a size; --data without --dim times its first --batch sentences, padded to the
longest. docs/performance.md says how to read the figures.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from itertools import product
from pathlib import Path

from benchmarks._peer_runtimes import made
from qcompile import Options, Recipe, compile
from qcompile.commands.bench import show
from qcompile.compiler.config.recipe import merge_settings, read_recipe
from qcompile.data.feeds import Feed, input_specs
from qcompile.data.open_data import open_data
from qcompile.data.synthetic import synthetic_feeds
from qcompile.ir import Graph
from qcompile.ir.analysis.shape_inference import infer
from qcompile.ir.model_io.read_model import load
from qcompile.runtime import latency

FORMS: dict[str, Recipe] = {
    "qcompile float": Recipe(mode="float"),
    "qcompile dynamic": Recipe(mode="dynamic"),
    "qcompile static": Recipe(mode="static"),
    "qcompile static, recipe fast": merge_settings(
        read_recipe("fast"), {"mode": "static"}, "speed.py"
    ),
}


def ours(model: Path, feeds: list[Feed], folder: Path) -> list[tuple[str, latency.Runnable]]:
    """The forms of target cpu; not verified here, only timed."""
    unchecked = Options(verify=False, bench=False)
    found: list[tuple[str, latency.Runnable]] = []
    for name, recipe in FORMS.items():
        data = feeds if recipe.mode == "static" else None
        result = compile(model, data, recipe=recipe, options=unchecked)
        path = folder / f"{name}.onnx"
        result.save(path)
        found.append((name, path))
    return found


def sizes(given: list[str]) -> list[dict[str, int]]:
    """Every combination of ``name=a,b`` arguments."""
    named = [(d.split("=")[0], d.split("=")[1].split(",")) for d in given]
    names = [name for name, _ in named]
    return [
        {n: int(v) for n, v in zip(names, values, strict=True)}
        for values in product(*(values for _, values in named))
    ]


def main() -> None:
    """Print one table a set of shapes, or JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--dim", action="append", default=[], help="name=size[,size], repeatable")
    parser.add_argument(
        "--data", help="calibration data; without --dim its first sentences are timed"
    )
    parser.add_argument("--batch", type=int, default=8, help="sentences in a batch of --data")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    graph = load(args.model)
    infer(graph)
    timed = [synthetic_feeds(graph, dims, 4, 0) for dims in sizes(args.dim)]
    feeds = timed[0]
    if args.data:
        given = open_data(args.data, input_specs(graph), tokenizer=args.tokenizer)
        feeds = list(given)
        if not args.dim:
            timed = [batches(args.data, graph, args.tokenizer, args.batch)]
    options = latency.TimingOptions(args.threads, args.rounds, args.seconds)
    with tempfile.TemporaryDirectory() as name:
        models: list[tuple[str, latency.Runnable]] = [("float, defaults", args.model)]
        models += [*made(args.model, feeds, Path(name)), *ours(args.model, feeds, Path(name))]
        found = [latency.compare_latency(models, of[-1], options) for of in timed]
    if args.json:
        json.dump([c.to_dict() for c in found], sys.stdout, indent=1)
    else:
        for comparison in found:
            show(comparison)


def batches(data: str, graph: Graph, tokenizer: Path, size: int) -> list[Feed]:
    """Batches of sentences in the order of the file, padded to their longest, as a server sees."""
    given = open_data(data, input_specs(graph), tokenizer=tokenizer, samples=size, batch_size=size)
    return list(given)


if __name__ == "__main__":
    main()
