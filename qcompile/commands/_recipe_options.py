"""Options that say what to build, for every command that plans and calibrates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from qcompile.commands._names import CALIBRATOR, PIPELINE, RECIPE, TARGET
from qcompile.commands._options import PATH, DataArguments, F, Ranged, Size, custom_ops_option
from qcompile.compiler.cluster.connect import connected, workers_of
from qcompile.compiler.config import lockfile
from qcompile.compiler.config.recipe import POOLINGS, Recipe, merge_settings, recipe_names
from qcompile.compiler.stages.options import CompileOptions
from qcompile.errors import RecipeError
from qcompile.planning.context import MODES
from qcompile.rewriting.registry import targets
from qcompile.runtime.providers import PROVIDERS, Choice
from qcompile.system.resume_cache import Cache, default_folder
from qcompile.targets.instruction_sets import TABLE
from qcompile.targets.target import Mode

COMMAND_LINE = "command line"  # the source of settings, in messages
isa_option = click.option(
    "--isa", metavar="NAME|native",
    help=f"Processors that the model is for: {', '.join(TABLE)}; native: this machine.  "
    "[default: any, the same outputs on all]",
)  # fmt: skip


def pooling_options(text: str, kinds: Sequence[str]) -> Callable[[F], F]:
    """--pooling, with its help, and --normalize."""

    def decorate(command: F) -> F:
        command = click.option("--normalize", is_flag=True, help="Scale embeddings to length 1.")(
            command
        )
        return click.option("--pooling", type=click.Choice(kinds), help=text)(command)

    return decorate


_OPTIONS = (
    click.option("--target", type=TARGET, help=f"Runtime to compile for: {', '.join(targets())}. "
                 "See `qcompile targets`.  [default: cpu]"),
    click.option("--mode", type=click.Choice(MODES),
                 help="How activations are quantized.  [default: static with data, else dynamic]"),
    isa_option,
    click.option("--calibrator", type=CALIBRATOR, help="How ranges are chosen: see `qcompile "
                 "calibrators`.  [default: minmax]"),
    click.option("--recipe", type=RECIPE, help=f"{', '.join(recipe_names())}, or a .yaml "
                 "file (recipe or lock). Other options override it. See `qcompile recipes`."),
    click.option("--pipeline", type=PIPELINE, help='Passes to run, as "name,name{option=value}": '
                 "see `qcompile passes`."),
    click.option("--keep-float", multiple=True, help="Nodes or tensors to leave float: a pattern "
                 "of names, or role:NAME. Repeatable."),
    click.option("--weight-bits", type=click.IntRange(2, 8), help="Bits per weight of linear "
                 "layers in the file, unless the recipe's precision says otherwise.  "
                 "[default: 8]"),
    click.option("--embedding-bits", type=click.IntRange(2, 8), help="The same for embedding "
                 "tables.  [default: 8, small tables float]"),
    click.option("--weight-block", type=click.IntRange(0), metavar="N", help="For weights of 2 "
                 "to 7 bits: how many values share a multiplier. A power of two from 16 up; "
                 "0: one scale per channel.  [default: depends on the bits]"),
    click.option("--dim", "dims", multiple=True, type=Ranged(most=1),
                 help="Fix a symbolic dimension at this size, in all inputs that have it. "
                 "Repeatable."),
    click.option("--float16", is_flag=True, help="Compute in float16 between the integers, with "
                 "scales, tables and biases in float16. For targets tensorrt and qdq; target cuda "
                 "does so without it."),
    pooling_options("Output one embedding per text (sentence_embedding) instead of one vector "
                    "per token; auto: as modules.json in the folder says.", POOLINGS),
    click.option("--outputs", multiple=True, metavar="NAME", help="Model output to keep; all "
                 "others are removed, with the nodes that only they need. Repeatable.  "
                 "[default: all]"),
    click.option("--keep-padding-rows", is_flag=True, help="Compute padded positions as the float "
                 "model does, for users who read their outputs. By default they are skipped where "
                 "that is possible, and repeat the last real token."),
    click.option("--count-padding", is_flag=True, help="Calibrate on padded positions too."),
    click.option("--max-memory", type=Size(), help="Memory limit, in addition to 300 MB for "
                 "libraries; at least the size of the weights. Other arrays go to files in TMPDIR, "
                 "and batches are split.  [default: no limit]"),
    click.option("--seed", type=click.IntRange(0),
                 help="Seed of random inputs, used without data.  [default: 0]"),
    click.option("--threads", type=click.IntRange(0), default=0,
                 help="Threads of ONNX Runtime; 0 uses one per core."),
    click.option("--provider", type=click.Choice([*PROVIDERS]), help="Execution provider that "
                 "runs the float model to calibrate, and what is measured to rank tensors.  "
                 "[default: cpu; to rank, the target's own]"),
    click.option("--workers", type=click.IntRange(1), metavar="N", help="Processes on this "
                 "machine, of one thread each, that calibrate and measure (extra cluster).  "
                 "[default: this process]"),
    click.option("--cluster", metavar="ADDRESS", help="The same by the workers of a running Dask "
                 "cluster, such as tcp://host:8786."),
    custom_ops_option,
    click.option("--cache", type=PATH, help="Folder of calibration and measurements, from which "
                 "an interrupted run resumes.  [default: the user's cache folder]"),
    click.option("--no-cache", is_flag=True, help="Store nothing for a later run, and do not "
                 "resume an earlier one."),
)  # fmt: skip


def recipe_options(command: F) -> F:
    """Options for ``RecipeArguments``: the settings of the recipe, and limits of calibration."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True, kw_only=True)
class RecipeArguments(DataArguments):
    """``recipe``: name or file of a recipe, or a lock; settings that are None do not change it."""

    target: str | None
    mode: Mode | None
    isa: str | None
    calibrator: str | None
    recipe: str | None
    pipeline: str | None
    keep_float: tuple[str, ...]
    weight_bits: int | None
    embedding_bits: int | None
    weight_block: int | None
    dims: tuple[tuple[str, tuple[int, ...]], ...]
    float16: bool
    pooling: str | None
    normalize: bool
    outputs: tuple[str, ...]
    count_padding: bool
    keep_padding_rows: bool
    max_memory: int | None
    seed: int | None
    threads: int
    provider: Choice | None
    cache: Path | None
    no_cache: bool
    workers: int | None
    cluster: str | None

    def make_recipe(self) -> Recipe:
        """The recipe, or a lock's, with the command line's options merged in."""
        base = lockfile.recipe_of(self.recipe)
        fixed = {name: size for name, (size,) in self.dims}
        settings = {
            "target": self.target,
            "mode": self.mode,
            "isa": self.isa,
            "calibrator": self.calibrator,
            "pipeline": self.pipeline,
            "seed": self.seed,
            "keep_float": self.keep_float or None,
            "weight_bits": self.weight_bits,
            "embedding_bits": self.embedding_bits,
            "weight_block": self.weight_block,
            "dims": {**dict(base.dims), **fixed} or None,
            "float16": self.float16 or None,
            "pooling": self.pooling,
            "normalize": self.normalize or None,
            "outputs": self.outputs or None,
            "mask_padding": False if self.count_padding else None,
            "keep_padding_rows": self.keep_padding_rows or None,
        }
        return merge_settings(base, settings, COMMAND_LINE)

    def make_options(self) -> CompileOptions:
        """Data and limits of calibration. Raises RecipeError for contradicting options."""
        return CompileOptions(
            tokenizer=self.tokenizer,
            samples=self.samples,
            batch_size=self.batch_size,
            max_length=self.max_length,
            text_columns=self.text_columns,
            max_memory=self.max_memory,
            threads=self.threads,
            provider=self.provider,
            cache=self._make_cache(),
            client=self._connect(),
        )

    def _connect(self) -> object | None:
        """The client of the cluster that was asked for, until the command ends."""
        context = click.get_current_context()
        client = context.with_resource(connected(self.workers, self.cluster))
        found = workers_of(client).account()
        if found is not None and not context.params.get("quiet"):
            count = f"{found.workers} with {found.threads} threads"
            click.echo(f"workers: {count}, dashboard {found.dashboard}", err=True)
        return client

    def _make_cache(self) -> Cache | None:
        """The cache, None if it is switched off."""
        if self.no_cache:
            if self.cache is not None:
                raise RecipeError("--cache and --no-cache contradict each other")
            return None
        return Cache(self.cache or default_folder())
