"""Options that say what to build, for every command that plans and calibrates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from qcompile.commands._options import PATH, DataArguments, F, Ranged, Size
from qcompile.compiler.config import lockfile
from qcompile.compiler.config.recipe import Recipe, merged, names
from qcompile.compiler.stages.options import CompileOptions
from qcompile.errors import RecipeError
from qcompile.planning.context import MODES
from qcompile.system.resume_cache import Cache, default_folder
from qcompile.targets.instruction_sets import TABLE
from qcompile.targets.target import Mode

COMMAND_LINE = "command line"  # where settings come from, in messages
isa_option = click.option(
    "--isa", metavar="NAME|native", help=f"Where the model will run: {', '.join(TABLE)}; native: "
    "this machine.  [default: any, the same answers on all]")  # fmt: skip
_OPTIONS = (
    click.option("--target", help="cpu, qdq: see `qcompile targets`.  [default: cpu]"),
    click.option("--mode", type=click.Choice(MODES),
                 help="Default: static with data, else dynamic."),
    isa_option,
    click.option("--calibrator", help="See `qcompile calibrators`.  [default: minmax]"),
    click.option("--recipe", metavar="NAME|FILE",
                 help=f"{', '.join(names())}, or a .yaml file, also a lock; options override."),
    click.option("--pipeline", help='Passes: "name,name{option=value}"; see `qcompile passes`.'),
    click.option("--keep-float", multiple=True,
                 help="Pattern of node or tensor names to leave alone, or role:NAME."),
    click.option("--dim", "dims", multiple=True, type=Ranged(most=1),
                 help="Size that a symbolic dimension of the inputs gets for good."),
    click.option("--count-padding", is_flag=True, help="Calibrate on padding positions too."),
    click.option("--max-memory", type=Size(), help="Memory to take beside 300 MB for libraries, at "
                 "least the weights: other arrays go to files in TMPDIR, feeds are divided.  "
                 "[default: no limit]"),
    click.option("--seed", type=click.IntRange(0), help="Seed of made-up inputs.  [default: 0]"),
    click.option("--threads", type=click.IntRange(0), default=0, help="0: one a core."),
    click.option("--cache", type=PATH, help="Folder that keeps calibration and measurements for a "
                 "run after an interrupt.  [default: $XDG_CACHE_HOME/qcompile]"),
    click.option("--no-cache", is_flag=True, help="Keep nothing, and take nothing over."),
)  # fmt: skip


def recipe_options(command: F) -> F:
    """For ``RecipeArguments``: the recipe, option by option, and what its calibration may use."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True, kw_only=True)
class RecipeArguments(DataArguments):
    """``recipe`` names a recipe, its file or a lock; None leaves a setting as that says."""

    target: str | None
    mode: Mode | None
    isa: str | None
    calibrator: str | None
    recipe: str | None
    pipeline: str | None
    keep_float: tuple[str, ...]
    dims: tuple[tuple[str, tuple[int, ...]], ...]
    count_padding: bool
    max_memory: int | None
    seed: int | None
    threads: int
    cache: Path | None
    no_cache: bool

    def make_recipe(self) -> Recipe:
        """The recipe, if any, or a lock's, with the command line's options on top."""
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
            "dims": {**dict(base.dims), **fixed} or None,
            "mask_padding": False if self.count_padding else None,
        }
        return merged(base, settings, COMMAND_LINE)

    def make_options(self) -> CompileOptions:
        """What calibration may use. Raises RecipeError where two options contradict each other."""
        return CompileOptions(
            tokenizer=self.tokenizer,
            samples=self.samples,
            batch_size=self.batch_size,
            max_memory=self.max_memory,
            threads=self.threads,
            cache=self._make_cache(),
        )

    def _make_cache(self) -> Cache | None:
        """None where it is switched off."""
        if self.no_cache:
            if self.cache is not None:
                raise RecipeError("--cache and --no-cache contradict each other")
            return None
        return Cache(self.cache or default_folder())
