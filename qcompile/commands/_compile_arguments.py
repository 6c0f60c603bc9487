"""Options and arguments of the commands that build a model, and the request that they make."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import click

from qcompile.commands._options import (
    ACCURACY_GATES,
    PATH,
    F,
    GateArguments,
    OutputArguments,
    gates_given,
)
from qcompile.commands._recipe_options import COMMAND_LINE, RecipeArguments
from qcompile.commands._report_files import ReportFiles
from qcompile.compiler.config import lockfile
from qcompile.compiler.config.recipe import Recipe
from qcompile.compiler.config.variants import TABLE
from qcompile.compiler.stages.options import Request, SizeLimit
from qcompile.errors import RecipeError

_STATES = "search", "bits"  # files that keep the measurements of an interrupted search
_BUILD_OPTIONS = (
    click.option("--no-verify", is_flag=True, help="Do not compare with the float model."),
    click.option("--no-bench", is_flag=True, help="Do not time the result."),
    click.option("--force", is_flag=True, help="Write even if a gate fails."),
    click.option("--dump-passes", type=PATH, help="Folder for a dump of the graph after each "
                 "pass."),
)  # fmt: skip


def build_options(command: F) -> F:
    """Options for ``BuildArguments``, without those that commands word in their own way."""
    for option in reversed(_BUILD_OPTIONS):
        command = option(command)
    return command


_HUB_OPTIONS = (
    click.option("--variant", "--variants", "variants", multiple=True, metavar="NAME[,NAME...]",
                 help="Variant to make of each model in a folder, under the file name that "
                 f"other libraries look for: {', '.join(TABLE)}. OUT may be MODEL itself; "
                 "then only these files are added to it. Repeatable."),
    click.option("--revision", help="Branch, tag or commit on the Hugging Face hub."),
    click.option("--base-model", metavar="ORG/NAME", help="The float model's name on the hub, for "
                 "the model card of a folder.  [default: MODEL, if it is from the hub]"),
    click.option("--push", metavar="ORG/NAME", help="Upload the folder's new files to this "
                 "repository on the hub."),
)  # fmt: skip


def folder_options(command: F) -> F:
    """Options for folders and models of the Hugging Face hub."""
    for option in reversed(_HUB_OPTIONS):
        command = option(command)
    return command


metric_option = click.option(
    "--metric",
    help="Metric of your own for --min-metric: module:function, which gets feeds and outputs.",
)


@dataclass(frozen=True, kw_only=True)
class BuildArguments(RecipeArguments, GateArguments, OutputArguments):
    """One field per option, so that mypy finds a misspelt name.

    They become a ``Request``: a ``Recipe`` (what to compile), ``CompileOptions`` (how) and
    ``Gates`` (when to reject the result).
    """

    model: Path
    output: Path
    data: str | None
    metric: str | None
    report_files: tuple[Path, ...]
    no_verify: bool
    no_bench: bool
    force: bool
    dump_passes: Path | None
    lock_file: Path | None = None
    variants: tuple[str, ...] = ()
    revision: str | None = None
    base_model: str | None = None
    push: str | None = None

    @property
    def source(self) -> str:
        """The model as it was given, which may be a name on the Hugging Face hub."""
        return self.model.as_posix()

    def check_single_file(self) -> None:
        """Raises RecipeError for an option that is for folders alone."""
        given = {
            "--variant": self.variants,
            "--revision": self.revision,
            "--base-model": self.base_model,
            "--push": self.push,
        }
        for option, value in given.items():
            if value:
                raise RecipeError(
                    f"{option} is for a model folder or a model on the Hugging Face hub, and "
                    f"{self.source!r} is a file"
                )

    def reports(self, out: Path) -> ReportFiles:
        """The report files for the model ``out``. Raises OutputError."""
        return ReportFiles.for_model(out, self.report_files)

    def make_request(self) -> Request:
        """The request of the compilation. Raises RecipeError, and OutputError for --report."""
        recipe = self.make_recipe()
        options = replace(
            self.make_options(),
            verify=not self.no_verify,
            bench=not self.no_bench,
            profile=self.reports(self.output).page is not None,
            force=self.force,
            dump_dir=self.dump_passes,
            metric=self.metric,
            stem=self.output.stem,
            lock=lockfile.requested_lock(self.recipe, recipe, COMMAND_LINE),
            keep_calibration=self.lock_file is not None,
        )
        return Request(
            self.model, self.data, recipe=recipe, gates=self.make_gates(recipe), options=options
        )


@dataclass(frozen=True, kw_only=True)
class CompileArguments(BuildArguments):
    """What only ``compile`` has: searches."""

    search_time: float
    max_size: SizeLimit | None
    tune: bool

    def make_request(self) -> Request:
        """The request with its searches. Raises as the one without."""
        request = super().make_request()
        is_gated = bool(_accuracy_gates(request.recipe))
        is_searched = is_gated or self.max_size is not None
        seconds = self.search_time if is_searched and request.options.lock is None else 0.0
        state, bits = (self.output.with_name(f"{self.output.stem}.{n}.json") for n in _STATES)
        options = replace(
            request.options,
            tune=self.tune,
            search_time=seconds,
            search_state=state if seconds else None,
            max_size=self.max_size,
            fewest_bits=is_gated,
            bits_state=bits if seconds and self.max_size is not None else None,
        )
        return replace(request, options=options)


def _accuracy_gates(recipe: Recipe) -> set[str]:
    """The accuracy gates that the user or the recipe set: default gates do not start a search."""
    of_recipe = (name for name, limit in recipe.gates if limit is not None)
    return {*gates_given(), *of_recipe} & {*ACCURACY_GATES}
