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
    "--isa", metavar="NAME|native",
    help=f"Processors that the model is for: {', '.join(TABLE)}; native: this machine.  "
    "[default: any, the same outputs on all]",
)  # fmt: skip
_OPTIONS = (
    click.option("--target", help="Runtime to compile for: see `qcompile targets`.  "
                 "[default: cpu]"),
    click.option("--mode", type=click.Choice(MODES),
                 help="How data is quantized.  [default: static with data, else dynamic]"),
    isa_option,
    click.option("--calibrator", help="How ranges are chosen: see `qcompile calibrators`.  "
                 "[default: minmax]"),
    click.option("--recipe", metavar="NAME|FILE", help=f"{', '.join(names())}, or a .yaml file "
                 "(recipe or lock). Other options override it."),
    click.option("--pipeline", help='Passes to run, as "name,name{option=value}": see '
                 "`qcompile passes`."),
    click.option("--keep-float", multiple=True, help="Nodes or tensors to leave float: a pattern "
                 "of names, or role:NAME. Repeatable."),
    click.option("--dim", "dims", multiple=True, type=Ranged(most=1),
                 help="Fix a symbolic dimension of the inputs at this size. Repeatable."),
    click.option("--count-padding", is_flag=True, help="Calibrate on padding positions too."),
    click.option("--max-memory", type=Size(), help="Memory limit, in addition to 300 MB for "
                 "libraries; at least the size of the weights. Other arrays go to files in TMPDIR, "
                 "and batches are split.  [default: no limit]"),
    click.option("--seed", type=click.IntRange(0),
                 help="Seed of random inputs, used without data.  [default: 0]"),
    click.option("--threads", type=click.IntRange(0), default=0,
                 help="Threads of ONNX Runtime; 0 uses one per core."),
    click.option("--cache", type=PATH, help="Folder of calibration and measurements, from which "
                 "an interrupted run resumes.  [default: $XDG_CACHE_HOME/qcompile]"),
    click.option("--no-cache", is_flag=True, help="Keep nothing, and do not resume."),
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
