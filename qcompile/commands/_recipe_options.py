"""Options that say what to build, for every command that plans and calibrates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qcompile.commands._options import PATH, F, Ranged, Size
from qcompile.compiler.config import lockfile
from qcompile.compiler.config.lockfile import Lock
from qcompile.compiler.config.recipe import Recipe, merged, names
from qcompile.errors import RecipeError
from qcompile.planning.context import MODES
from qcompile.system.resume_cache import Cache, default_folder
from qcompile.targets.instruction_sets import TABLE

_SETTINGS = ("target", "mode", "isa", "calibrator", "pipeline", "seed")
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
    """The recipe, option by option, and what its calibration may use."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def recipe_from(given: dict[str, Any]) -> Recipe:
    """The recipe, if any, or a lock's, with the command line's options on top."""
    source = given["recipe"]
    recipe = Recipe() if source is None else lockfile.recipe_of(source)
    settings = {name: given[name] for name in _SETTINGS}
    settings["keep_float"] = given["keep_float"] or None
    fixed = {name: size for name, (size,) in given["dims"]}
    settings["dims"] = {**dict(recipe.dims), **fixed} or None
    settings["mask_padding"] = False if given["count_padding"] else None
    return merged(recipe, settings, "command line")


def cache_from(given: dict[str, Any]) -> Cache | None:
    """The cache, None where it is switched off. Raises RecipeError where both options are given."""
    if given["no_cache"]:
        if given["cache"] is not None:
            raise RecipeError("--cache and --no-cache contradict each other")
        return None
    return Cache(given["cache"] or default_folder())


def lock_from(given: dict[str, Any], recipe: Recipe) -> Lock | None:
    """The lock that --recipe names, None where it names a recipe.

    Raises RecipeError where options of the command line ask for another build than the lock's.
    """
    source = given["recipe"]
    if source is None or not lockfile.is_lock(source):
        return None
    found = lockfile.read_lockfile(Path(source))
    lockfile.check_recipe(found, recipe, "command line")
    return found
