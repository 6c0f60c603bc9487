"""How much faster a model is if positions that no output depends on are not computed.

    python -m benchmarks.unused_positions MODEL.onnx [--dim sequence_length=128 ...] [--mode static]

Compiles the model with and without the pass drop-unused-positions, calibrated on synthetic inputs,
and times both in alternating rounds. For a classifier of BERT-base's size:
python -m models.bert_base bert/ --classes 2.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from qcompile import Options, Recipe, compile
from qcompile.commands.bench import show
from qcompile.data.synthetic import synthetic_feeds
from qcompile.ir.analysis.shape_inference import infer
from qcompile.ir.model_io.read_model import load
from qcompile.passes.simplify.drop_unused_positions import DropUnusedPositions
from qcompile.rewriting.pipeline_spec import parse, spell
from qcompile.runtime import latency
from qcompile.targets.target import Mode

MODES: tuple[Mode, ...] = ("float", "dynamic", "static")


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--dim", action="append", default=[], metavar="NAME=N")
    parser.add_argument("--mode", action="append", choices=MODES, help="repeatable; default: all")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a round of one model")
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    dims = {name: int(size) for name, size in (d.split("=") for d in args.dim)}
    graph = load(args.model)
    infer(graph)
    feeds = synthetic_feeds(graph, dims, 16, 0)
    options = latency.TimingOptions(seconds=args.seconds, rounds=args.rounds, threads=args.threads)
    with tempfile.TemporaryDirectory() as folder:
        chosen: list[Mode] = args.mode or [*MODES]
        for mode in chosen:
            recipe = Recipe(mode=mode, dims=tuple(dims.items()))
            data = feeds if mode == "static" else None
            unchecked = Options(verify=False, bench=False)
            with_pass = compile(args.model, data, recipe=recipe, options=unchecked)
            passes = [
                p for p in parse(with_pass.report.pipeline) if p.name != DropUnusedPositions.name
            ]
            whole = compile(
                args.model, data, recipe=replace(recipe, pipeline=spell(passes)), options=unchecked
            )
            paths = [Path(folder) / f"{mode}-{name}.onnx" for name in ("all", "used")]
            for path, result in zip(paths, (whole, with_pass), strict=True):
                result.save(path)
            labels = (f"{mode}, all positions", f"{mode}, used positions")
            print("; ".join(with_pass.report.note_texts))
            show(latency.compare_latency(list(zip(labels, paths, strict=True)), feeds[0], options))


if __name__ == "__main__":
    main()
