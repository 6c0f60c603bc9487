"""qcompile bench MODEL [MODEL ...]"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import click

from qcompile.commands._console import console, print_json, progress_bar, table
from qcompile.commands._help import GroupedCommand
from qcompile.commands._names import TARGET
from qcompile.commands._options import (
    MODEL,
    PATH,
    DataArguments,
    Ranged,
    custom_ops_option,
    data_options,
)
from qcompile.commands._server_table import show_server
from qcompile.compiler.stages import saturation_check
from qcompile.compiler.stages.models import BFLOAT16_NOTE, in_float32_if_bfloat16
from qcompile.data.feeds import Feed, input_specs
from qcompile.data.open_data import open_data
from qcompile.data.tokenizer import folder_near
from qcompile.errors import OutputError
from qcompile.ir import Graph
from qcompile.ir.analysis import shape_inference
from qcompile.ir.model_io import read_model
from qcompile.rewriting import registry
from qcompile.runtime import kernels, latency
from qcompile.runtime.evaluation.trial_run import made_up_feeds, trial_run
from qcompile.runtime.latency import Comparison
from qcompile.runtime.profiler import Profile, profile
from qcompile.runtime.request_load import MOST_STREAMS, Load
from qcompile.runtime.server_comparison import MOST_FEEDS, SECONDS, compare_under_load
from qcompile.system import atomic_write
from qcompile.system.json_values import json_value
from qcompile.system.progress import Progress

_DEFAULTS = latency.TimingOptions()
_SHOWN_OPS = 12


@dataclass(frozen=True, kw_only=True)
class BenchArguments(DataArguments):
    """One field per option; ``fixed``: shapes of whole inputs by name."""

    models: tuple[Path, ...]
    dims: tuple[tuple[str, tuple[int, ...]], ...]
    fixed: tuple[tuple[str, tuple[int, ...]], ...]
    data: str | None
    threads: int
    streams: int | None
    arrival: float | None
    seed: int
    rounds: int
    seconds: float | None
    profile: bool
    target: str
    json_file: Path | None
    quiet: bool
    verbose: bool

    @property
    def to_stdout(self) -> bool:
        """True if JSON goes to stdout, and nothing else is shown."""
        return str(self.json_file) == "-"

    @property
    def load(self) -> Load | None:
        """What servers are asked, None where models are timed without load."""
        if self.streams is None and self.arrival is None:
            return None
        return Load(1 if self.streams is None else self.streams, self.arrival, self.seed)

    def timing_options(self, provider: str, exact: frozenset[str]) -> latency.TimingOptions:
        """Seconds that are not given depend on whether there is load."""
        usual = _DEFAULTS.seconds if self.load is None else SECONDS
        seconds = usual if self.seconds is None else self.seconds
        return latency.TimingOptions(
            self.threads, self.rounds, seconds, provider=provider, exact=exact
        )


class _Command(GroupedCommand):
    """``--json`` with an optional value: only what can be one is taken as its value."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As in click, but in ``--json a.onnx`` the model is no value."""
        following = [*args[1:], ""]
        args = [
            "--json=-" if arg == "--json" and _is_model(after) else arg
            for arg, after in zip(args, following, strict=True)
        ]
        return super().parse_args(ctx, args)


def _is_model(argument: str) -> bool:
    path = Path(argument)
    return path.suffix != ".json" and path.exists()


@click.command(cls=_Command)
@click.argument("models", nargs=-1, required=True, type=MODEL)
@click.option("--dim", "dims", multiple=True, type=Ranged(), help="Size of a symbolic dimension; "
              "several sizes are timed one after another.")  # fmt: skip
@click.option("--shape", "fixed", multiple=True, type=Ranged("x"), help="Shape of an input.")
@click.option("--data", help="Time on the first batch of this data instead of random inputs; "
              "under load, on all of it.")  # fmt: skip
@data_options
@custom_ops_option
@click.option("--threads", type=click.IntRange(0), default=0,
              help="Threads of ONNX Runtime, of each stream; 0 uses one per core.")  # fmt: skip
@click.option("--streams", type=click.IntRange(1, MOST_STREAMS),
              help="Measure under load: requests that are computed at the same time, back to back. "
              "Also measures load time, first run and memory.")  # fmt: skip
@click.option("--arrival", type=float, metavar="RATE",
              help="Requests per second that arrive at random; latency then includes waiting for "
              "one of the --streams (1 unless given).")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True,
              help="Seed of the arrival times and of the order of --data.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(1), default=_DEFAULTS.rounds, show_default=True,
              help="Rounds; in each, every model is timed once.")  # fmt: skip
@click.option("--seconds", type=click.FloatRange(0.01),
              help=f"Time for each model in each round.  [default: {_DEFAULTS.seconds:g}; under "
              f"load {SECONDS:g}]")  # fmt: skip
@click.option("--profile", is_flag=True, help="Show the time of each kind of operator.")
@click.option("--target", type=TARGET, default="cpu", show_default=True,
              help="Target whose execution provider runs the models: "
                   f"{', '.join(registry.targets())}.")  # fmt: skip
@click.option("--json", "json_file", type=PATH, is_flag=False, flag_value="-", metavar="[FILE]",
              help="Print JSON instead of tables; with FILE write it there.")  # fmt: skip
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
def bench(**given: Any) -> None:
    """Time models against the first one, the reference.

    Models take turns in each round, one session at a time. Ratios are taken within a round; the
    interval is a bootstrap over rounds. --streams and --arrival compare models as servers.
    """
    arguments = BenchArguments(**given)
    models, file = arguments.models, arguments.json_file
    provider = registry.target(arguments.target).provider
    load = arguments.load
    if load is not None and arguments.profile:
        raise click.UsageError("--profile is of single runs: leave out --streams and --arrival")
    graph = read_model.load(models[0])
    for other in models[1:]:
        shape_inference.infer(read_model.load(other))
    raised = {m: r for m in models if (r := in_float32_if_bfloat16(m)) is not None}
    for model in raised:
        click.echo(f"note: {model.name} {BFLOAT16_NOTE}", err=True)
    running = [raised[m].path if m in raised else m for m in models]
    labelled = list(zip(_labels(models), running, strict=True))
    exact = saturation_check.saturating_here(labelled, provider)
    options = arguments.timing_options(provider, exact)
    if load is not None:
        load.check_seconds(options.seconds)
    if file is not None and not arguments.to_stdout:
        if file.suffix != ".json":
            raise OutputError(f"--json {str(file)!r}: expected a .json file or -")
        atomic_write.check_writable(file)
    comparisons: list[Comparison] = []
    profiles: list[list[Profile]] = []
    with progress_bar(shown=not arguments.quiet) as bar:
        sets_of_feeds = list(_sets_of_feeds(graph, running[0], arguments, provider, bar))
        for feeds in sets_of_feeds:
            bar.step("bench", options.rounds)
            if load is not None:
                comparison = compare_under_load(labelled, feeds, load, options, bar.advance)
            else:
                comparison = latency.compare_latency(labelled, feeds[0], options, bar.advance)
            comparisons.append(comparison)
            if arguments.profile:
                profiles.append(
                    profile(
                        labelled, feeds[0], options.threads, provider=provider, exact=options.exact
                    )
                )
    _write(arguments, comparisons, profiles)


def _labels(models: Sequence[Path]) -> list[str]:
    """File names where they differ, else paths."""
    distinct = len({m.name for m in models}) == len(models)
    return [m.name if distinct else str(m) for m in models]


def _sets_of_feeds(
    graph: Graph, model: Path, arguments: BenchArguments, provider: str, progress: Progress
) -> Iterator[list[Feed]]:
    """The feeds of each comparison: one for each combination of dimensions; or those of the data,
    without load only the first."""
    shape_inference.infer(graph)
    if arguments.data is not None:
        data = open_data(
            arguments.data,
            input_specs(graph),
            tokenizer=arguments.tokenizer or folder_near(*arguments.models),
            samples=arguments.samples,
            batch_size=arguments.batch_size,
            max_length=arguments.max_length,
            text_columns=arguments.text_columns,
            takes=trial_run(lambda: read_model.runnable(model)),
            progress=progress,
        )
        yield list(islice(data, 1 if arguments.load is None else MOST_FEEDS))
        return
    names = [name for name, _ in arguments.dims]
    fixed = dict(arguments.fixed)
    for sizes in product(*(sizes for _, sizes in arguments.dims)):
        dims = dict(zip(names, sizes, strict=True))
        yield made_up_feeds(graph, model, dims, shapes=fixed, provider=provider)


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
            (show if comparison.server is None else show_server)(comparison)
        for profiled in profiles:
            show_profile(profiled)


def show(comparison: Comparison) -> None:
    """Print a table with one row per model."""
    where = ", ".join(f"{n} {s}" for n, s in comparison.shapes.items())
    isa = ", ".join(kernels.instruction_sets()[:2]) or "unknown instruction set"
    title = f"{where}; threads: {comparison.threads}, {isa}"
    made = table(title, "model", "best ms", "median", "p90", "speed-up (best)", "(median)", "95 %")
    for i, timed in enumerate(comparison.timings):
        cells = ["1.00", "1.00", ""]
        if i:
            ratio = comparison.ratio(i)
            enough = len(timed.rounds) >= latency.FEWEST_ROUNDS
            interval = f"{1 / ratio.high:.2f} to {1 / ratio.low:.2f}" if enough else "-"
            cells = [f"{1 / ratio.best:.2f}", f"{1 / ratio.median:.2f}", interval]
        made.add_row(
            timed.label, f"{timed.best:.2f}", f"{timed.median:.2f}", f"{timed.p90:.2f}", *cells
        )
    console().print(made)
    for note in comparison.session_notes:
        click.echo(f"note: {note}")
    if comparison.noisy:
        click.echo("note: the machine was noisy: a model's rounds differ by more than 25 %")


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
