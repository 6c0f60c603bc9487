"""qcompile bench MODEL [MODEL ...]"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import click

from qcompile.commands._console import console, print_json, progress_bar, table
from qcompile.commands._options import PATH, Ranged, data_options
from qcompile.data.feeds import Feed, input_specs
from qcompile.data.open_data import open_data
from qcompile.data.synthetic import synthetic_feeds
from qcompile.errors import OutputError
from qcompile.ir import Graph
from qcompile.ir.analysis import shape_inference
from qcompile.ir.model_io import read_model
from qcompile.rewriting import registry
from qcompile.runtime import latency
from qcompile.runtime.latency import Comparison
from qcompile.runtime.profiler import Profile, profile
from qcompile.system import atomic_write
from qcompile.system.json_values import plain
from qcompile.system.processor import instruction_sets

_DEFAULTS = latency.TimingOptions()
_SHOWN_OPS = 12
_MIN_ROUNDS = 4  # below, a bootstrap over rounds says nothing


@click.command()
@click.argument("models", nargs=-1, required=True, type=PATH)
@click.option("--dim", "dims", multiple=True, type=Ranged(), help="Size of a symbolic dimension; "
              "several sizes make a sweep.")  # fmt: skip
@click.option("--shape", "fixed", multiple=True, type=Ranged("x"), help="Shape of a whole input.")
@click.option("--data", help="Time on the first feed of real data instead of made-up inputs.")
@data_options
@click.option("--threads", type=click.IntRange(0), default=0, help="0: one a core.")
@click.option("--rounds", type=click.IntRange(1), default=_DEFAULTS.rounds, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.01), default=_DEFAULTS.seconds,
              show_default=True, help="Timed per model and round.")  # fmt: skip
@click.option("--profile", is_flag=True, help="Show where the time goes, by operator.")
@click.option("--target", default="cpu", show_default=True, help="Whose provider runs the models.")
@click.option("--json", "json_file", type=PATH, help="Figures as JSON; - is stdout.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
def bench(**given: Any) -> None:
    """Time models side by side; the first is the reference.

    One session lives at a time, models take turns in each round, and ratios are taken within
    rounds: the interval is a bootstrap over them.
    """
    models: Sequence[Path] = given["models"]
    provider = registry.target(given["target"]).provider
    options = latency.TimingOptions(
        given["threads"], given["rounds"], given["seconds"], provider=provider
    )
    graph = read_model.load(models[0])
    for other in models[1:]:
        shape_inference.infer(read_model.load(other))
    if given["json_file"] is not None and str(given["json_file"]) != "-":
        if given["json_file"].suffix != ".json":
            raise OutputError(f"--json {str(given['json_file'])!r}: expected a .json file or -")
        atomic_write.check_writable(given["json_file"])
    feeds = list(_feeds(graph, given))
    found: list[Comparison] = []
    profiles: list[list[Profile]] = []
    with progress_bar(given["quiet"]) as bar:
        for feed in feeds:
            bar.step("bench", options.rounds)
            labelled = list(zip(_labels(models), models, strict=True))
            found.append(latency.compare_latency(labelled, feed, options, bar.advance))
            if given["profile"]:
                profiles.append(profile(labelled, feed, options.threads, provider=provider))
    _write(given, found, profiles)


def _labels(models: Sequence[Path]) -> list[str]:
    """File names where they differ, else paths."""
    distinct = len({m.name for m in models}) == len(models)
    return [m.name if distinct else str(m) for m in models]


def _feeds(graph: Graph, given: dict[str, Any]) -> Iterator[Feed]:
    """One feed for each combination of dimensions, or the first one of real data."""
    shape_inference.infer(graph)
    if given["data"] is not None:
        data = open_data(
            given["data"],
            input_specs(graph),
            tokenizer=given["tokenizer"],
            samples=given["samples"],
            batch_size=given["batch_size"],
        )
        yield next(iter(data))
        return
    names = [name for name, _ in given["dims"]]
    fixed = dict(given["fixed"])
    for sizes in product(*(sizes for _, sizes in given["dims"])):
        dims = dict(zip(names, sizes, strict=True))
        yield synthetic_feeds(graph, dims, 1, 0, shapes=fixed)[0]


def _write(given: dict[str, Any], found: list[Comparison], profiles: list[list[Profile]]) -> None:
    for comparison, profiled in zip(found, profiles, strict=False):
        comparison.profile = profiled
    path = given["json_file"]
    if path is not None and str(path) == "-":
        print_json(found)
        return
    if path is not None:
        atomic_write.write_atomic(
            path, (json.dumps(plain(found), indent=1, allow_nan=False) + "\n").encode()
        )
    if not given["quiet"]:
        for comparison in found:
            show(comparison)
        for profiled in profiles:
            show_profile(profiled)


def show(comparison: Comparison) -> None:
    """One row a model."""
    where = ", ".join(f"{n} {s}" for n, s in comparison.shapes.items())
    isa = ", ".join(instruction_sets()[:2]) or "unknown instruction set"
    title = f"{where}; {comparison.threads} threads, {isa}"
    made = table(title, "model", "best ms", "median", "p90", "speed-up (best)", "(median)", "95 %")
    for i, timed in enumerate(comparison.timings):
        cells = ["1.00", "1.00", ""]
        if i:
            ratio = comparison.ratio(i)
            enough = len(timed.rounds) >= _MIN_ROUNDS
            interval = f"{1 / ratio.high:.2f} to {1 / ratio.low:.2f}" if enough else "-"
            cells = [f"{1 / ratio.best:.2f}", f"{1 / ratio.median:.2f}", interval]
        made.add_row(
            timed.label, f"{timed.best:.2f}", f"{timed.median:.2f}", f"{timed.p90:.2f}", *cells
        )
    console().print(made)
    if comparison.noisy:
        click.echo("note: the machine was noisy: a model's rounds differ by over 25 %")


def show_profile(profiles: Sequence[Profile]) -> None:
    """Milliseconds a run by operator, one column a model, with the number of nodes."""
    made = table("by operator", "ms a run (nodes)", *(p.label for p in profiles))
    known = [{o.op: o for o in p.ops} for p in profiles]
    dearest = {op: max(k[op].ms for k in known if op in k) for op in {o for k in known for o in k}}
    for op in sorted(dearest, key=lambda o: (-dearest[o], o))[:_SHOWN_OPS]:
        cells = (f"{k[op].ms:.2f} ({k[op].nodes})" if op in k else "-" for k in known)
        made.add_row(op, *cells)
    made.add_row("all", *(f"{p.total:.2f}" for p in profiles))
    console().print(made)
