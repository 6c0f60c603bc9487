"""qcompile bench MODEL [MODEL ...]"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import click

from qcompile.commands._console import console, print_json, progress_bar, table
from qcompile.commands._options import PATH, DataArguments, Ranged, custom_ops_option, data_options
from qcompile.compiler.stages import saturation_check
from qcompile.data.feeds import Feed, input_specs
from qcompile.data.open_data import open_data
from qcompile.data.synthetic import synthetic_feeds
from qcompile.errors import OutputError
from qcompile.ir import Graph
from qcompile.ir.analysis import shape_inference
from qcompile.ir.model_io import read_model
from qcompile.rewriting import registry
from qcompile.runtime import kernels, latency
from qcompile.runtime.evaluation.trial_run import trial_run
from qcompile.runtime.latency import Comparison
from qcompile.runtime.profiler import Profile, profile
from qcompile.system import atomic_write
from qcompile.system.json_values import json_value

_DEFAULTS = latency.TimingOptions()
_SHOWN_OPS = 12
_MIN_ROUNDS = 4  # with fewer, a bootstrap over rounds is meaningless


@dataclass(frozen=True, kw_only=True)
class BenchArguments(DataArguments):
    """One field per option; ``fixed``: shapes of whole inputs by name."""

    models: tuple[Path, ...]
    dims: tuple[tuple[str, tuple[int, ...]], ...]
    fixed: tuple[tuple[str, tuple[int, ...]], ...]
    data: str | None
    threads: int
    rounds: int
    seconds: float
    profile: bool
    target: str
    json_file: Path | None
    quiet: bool
    verbose: bool

    @property
    def to_stdout(self) -> bool:
        """True if JSON goes to stdout, and nothing else is shown."""
        return str(self.json_file) == "-"


@click.command()
@click.argument("models", nargs=-1, required=True, type=PATH)
@click.option("--dim", "dims", multiple=True, type=Ranged(), help="Size of a symbolic dimension; "
              "several sizes are timed one after another.")  # fmt: skip
@click.option("--shape", "fixed", multiple=True, type=Ranged("x"), help="Shape of an input.")
@click.option("--data", help="Time on the first batch of this data instead of random inputs.")
@data_options
@custom_ops_option
@click.option("--threads", type=click.IntRange(0), default=0,
              help="Threads of ONNX Runtime; 0 uses one per core.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(1), default=_DEFAULTS.rounds, show_default=True,
              help="Rounds; in each, every model is timed once.")  # fmt: skip
@click.option("--seconds", type=click.FloatRange(0.01), default=_DEFAULTS.seconds,
              show_default=True, help="Time for each model in each round.")  # fmt: skip
@click.option("--profile", is_flag=True, help="Show the time of each kind of operator.")
@click.option("--target", default="cpu", show_default=True, help="Whose provider runs the models.")
@click.option("--json", "json_file", type=PATH, help="Write the figures as JSON; - is stdout.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
def bench(**given: Any) -> None:
    """Time models against the first one, the reference.

    Models take turns in each round, one session at a time. Ratios are taken within a round; the
    interval is a bootstrap over rounds.
    """
    arguments = BenchArguments(**given)
    models, file = arguments.models, arguments.json_file
    provider = registry.target(arguments.target).provider
    graph = read_model.load(models[0])
    for other in models[1:]:
        shape_inference.infer(read_model.load(other))
    labelled = list(zip(_labels(models), models, strict=True))
    options = latency.TimingOptions(
        arguments.threads,
        arguments.rounds,
        arguments.seconds,
        provider=provider,
        exact=saturation_check.saturating_here(labelled, provider),
    )
    if file is not None and not arguments.to_stdout:
        if file.suffix != ".json":
            raise OutputError(f"--json {str(file)!r}: expected a .json file or -")
        atomic_write.check_writable(file)
    feeds = list(_feeds(graph, arguments))
    comparisons: list[Comparison] = []
    profiles: list[list[Profile]] = []
    with progress_bar(shown=not arguments.quiet) as bar:
        for feed in feeds:
            bar.step("bench", options.rounds)
            comparisons.append(latency.compare_latency(labelled, feed, options, bar.advance))
            if arguments.profile:
                profiles.append(
                    profile(labelled, feed, options.threads, provider=provider, exact=options.exact)
                )
    _write(arguments, comparisons, profiles)


def _labels(models: Sequence[Path]) -> list[str]:
    """File names where they differ, else paths."""
    distinct = len({m.name for m in models}) == len(models)
    return [m.name if distinct else str(m) for m in models]


def _feeds(graph: Graph, arguments: BenchArguments) -> Iterator[Feed]:
    """One feed for each combination of dimensions, or the first one of the data."""
    shape_inference.infer(graph)
    if arguments.data is not None:
        data = open_data(
            arguments.data,
            input_specs(graph),
            tokenizer=arguments.tokenizer,
            samples=arguments.samples,
            batch_size=arguments.batch_size,
            max_length=arguments.max_length,
            takes=trial_run(lambda: read_model.runnable(arguments.models[0])),
        )
        yield next(iter(data))
        return
    names = [name for name, _ in arguments.dims]
    fixed = dict(arguments.fixed)
    for sizes in product(*(sizes for _, sizes in arguments.dims)):
        dims = dict(zip(names, sizes, strict=True))
        yield synthetic_feeds(graph, dims, 1, 0, shapes=fixed)[0]


def _write(
    arguments: BenchArguments, comparisons: list[Comparison], profiles: list[list[Profile]]
) -> None:
    for comparison, profiled in zip(comparisons, profiles, strict=False):
        comparison.profile = profiled
    if arguments.to_stdout:
        print_json(comparisons)
        return
    if arguments.json_file is not None:
        text = json.dumps(json_value(comparisons), indent=1, allow_nan=False) + "\n"
        atomic_write.write_atomic(arguments.json_file, text.encode())
    if not arguments.quiet:
        for comparison in comparisons:
            show(comparison)
        for profiled in profiles:
            show_profile(profiled)


def show(comparison: Comparison) -> None:
    """Print a table with one row per model."""
    where = ", ".join(f"{n} {s}" for n, s in comparison.shapes.items())
    isa = ", ".join(kernels.instruction_sets()[:2]) or "unknown instruction set"
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
    for note in comparison.session_notes:
        click.echo(f"note: {note}")
    if comparison.noisy:
        click.echo("note: the machine was noisy: a model's rounds differ by over 25 %")


def show_profile(profiles: Sequence[Profile]) -> None:
    """Print milliseconds per run by operator and the number of nodes, one column per model."""
    rows = table("by operator", "ms per run (nodes)", *(p.label for p in profiles))
    by_op = [{o.op: o for o in p.ops} for p in profiles]
    # The largest time of each operator in any model; the slowest operators are shown.
    most = {op: max(m[op].ms for m in by_op if op in m) for op in {o for m in by_op for o in m}}
    for op in sorted(most, key=lambda o: (-most[o], o))[:_SHOWN_OPS]:
        cells = (f"{m[op].ms:.2f} ({m[op].nodes})" if op in m else "-" for m in by_op)
        rows.add_row(op, *cells)
    rows.add_row("all", *(f"{p.total:.2f}" for p in profiles))
    console().print(rows)
