"""Speed of a model compiled by qcompile, compared with other quantizers and runtimes in one run.

    python -m benchmarks.speed MODEL.onnx [--dim sequence_length=128 ...]
        [--data DATA --tokenizer DIR] [--streams 2 --threads 1 [--arrival RATE]]

Builds the same model with every peer that is installed (onnxruntime's quantizers and fusions,
OpenVINO through NNCF) and with qcompile in the modes float, dynamic and static (calibrated on data,
or on synthetic inputs), then times all of them: one session at a time, in alternating rounds. --dim
name=32,128 prints one table per size; --data without --dim times its first --batch sentences,
padded to the longest. --streams and --arrival compare all of them as servers, as `qcompile bench`
does (OpenVINO tuned for throughput, with one request for each stream); with --data in batches of
--batch. docs/performance.md says how to read the figures.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from itertools import product
from pathlib import Path

from benchmarks._peer_runtimes import build_peers, served
from qcompile import Options, Recipe, compile
from qcompile.commands._server_table import show_server
from qcompile.commands.bench import show
from qcompile.compiler.config.recipe import merge_settings, read_recipe
from qcompile.data.feeds import Feed, input_specs
from qcompile.data.open_data import open_data
from qcompile.errors import DataError
from qcompile.ir import Graph
from qcompile.ir.analysis.shape_inference import infer
from qcompile.ir.model_io.read_model import load as load_graph
from qcompile.runtime import latency
from qcompile.runtime.evaluation.trial_run import made_up_feeds
from qcompile.runtime.request_load import Load
from qcompile.runtime.server_comparison import MOST_FEEDS, SECONDS, compare_under_load

RECIPES: dict[str, Recipe] = {
    "qcompile float": Recipe(mode="float"),
    "qcompile dynamic": Recipe(mode="dynamic"),
    "qcompile static": Recipe(mode="static"),
    "qcompile static, recipe fast": merge_settings(
        read_recipe("fast"), {"mode": "static"}, "speed.py"
    ),
}


def build_own(model: Path, feeds: list[Feed], folder: Path) -> list[tuple[str, latency.Runnable]]:
    """The model compiled for target cpu by each recipe; not verified, only timed."""
    unchecked = Options(verify=False, bench=False)
    built: list[tuple[str, latency.Runnable]] = []
    for name, recipe in RECIPES.items():
        data = feeds if recipe.mode == "static" else None
        result = compile(model, data, recipe=recipe, options=unchecked)
        path = folder / f"{name}.onnx"
        result.save(path)
        built.append((name, path))
    return built


def load_of(args: argparse.Namespace) -> Load | None:
    """The load that was asked for, None without. Raises DataError for values out of range."""
    if args.streams is None and args.arrival is None:
        return None
    load = Load(1 if args.streams is None else args.streams, args.arrival, args.seed)
    load.check_seconds(seconds_of(args))
    return load


def seconds_of(args: argparse.Namespace) -> float:
    """For each model in each round."""
    is_loaded = args.streams is not None or args.arrival is not None
    usual = SECONDS if is_loaded else 1.0
    return usual if args.seconds is None else float(args.seconds)


def sizes(arguments: list[str]) -> list[dict[str, int]]:
    """Every combination of ``name=a,b`` arguments."""
    named = [(d.split("=")[0], d.split("=")[1].split(",")) for d in arguments]
    names = [name for name, _ in named]
    return [
        {n: int(v) for n, v in zip(names, values, strict=True)}
        for values in product(*(values for _, values in named))
    ]


def main() -> None:
    """Print one table per set of shapes, or JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--dim", action="append", default=[], help="name=size[,size], repeatable")
    parser.add_argument(
        "--data", help="calibration data; without --dim its first sentences are timed"
    )
    parser.add_argument("--batch", type=int, default=8, help="sentences in a batch of --data")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--threads", type=int, help="by default 2; under load the cores, divided")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, help="by default 1, or 2 under load")
    parser.add_argument("--streams", type=int, help="requests computed at the same time")
    parser.add_argument("--arrival", type=float, help="requests per second, arriving at random")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    try:
        load = load_of(args)
    except DataError as e:
        parser.error(str(e))
    graph = load_graph(args.model)
    infer(graph)
    timed = [made_up_feeds(graph, args.model, dims, 4) for dims in sizes(args.dim)]
    feeds = timed[0]
    if args.data:
        feeds = list(open_data(args.data, input_specs(graph), tokenizer=args.tokenizer))
        if not args.dim:
            timed = [batches(args.data, graph, args.tokenizer, args.batch, whole=load is not None)]
    threads = (2 if load is None else 0) if args.threads is None else args.threads
    options = latency.TimingOptions(threads, args.rounds, seconds_of(args))
    with tempfile.TemporaryDirectory() as name:
        models: list[tuple[str, latency.Runnable]] = [("float, defaults", args.model)]
        models += build_peers(args.model, feeds, Path(name))
        models += build_own(args.model, feeds, Path(name))
        if load is None:
            comparisons = [latency.compare_latency(models, inputs[-1], options) for inputs in timed]
        else:
            servers = [(label, served(model)) for label, model in models]
            comparisons = [compare_under_load(servers, inputs, load, options) for inputs in timed]
    if args.json:
        json.dump([c.to_dict() for c in comparisons], sys.stdout, indent=1)
    else:
        for comparison in comparisons:
            (show if comparison.server is None else show_server)(comparison)


def batches(
    data: str, graph: Graph, tokenizer: Path, size: int, *, whole: bool = False
) -> list[Feed]:
    """Batches of sentences in the order of the file, padded to their longest, as in a server.

    The first one only, unless ``whole``.
    """
    samples = size * MOST_FEEDS if whole else size
    specs = input_specs(graph)
    return list(open_data(data, specs, tokenizer=tokenizer, samples=samples, batch_size=size))


if __name__ == "__main__":
    main()
