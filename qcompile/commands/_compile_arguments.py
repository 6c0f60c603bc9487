"""The arguments of ``qcompile compile``, and the request that they make."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import click
from click.core import ParameterSource

from qcompile.commands._options import ACCURACY_GATES, GateArguments, OutputArguments
from qcompile.commands._recipe_options import COMMAND_LINE, RecipeArguments
from qcompile.commands._report_files import ReportFiles
from qcompile.compiler.config import lockfile
from qcompile.compiler.stages.options import Request, SizeLimit

_STATES = "search", "bits"  # files that keep the measurements of an interrupted search


@dataclass(frozen=True, kw_only=True)
class CompileArguments(RecipeArguments, GateArguments, OutputArguments):
    """One field per option, so that mypy finds a misspelt name.

    They become a ``Request``: a ``Recipe`` (what to compile), ``CompileOptions`` (how) and
    ``Gates`` (when to reject the result).
    """

    model: Path
    output: Path
    data: str | None
    metric: str | None
    search_time: float
    max_size: SizeLimit | None
    tune: bool
    report_files: tuple[Path, ...]
    lock_file: Path | None
    no_verify: bool
    no_bench: bool
    force: bool
    dump_passes: Path | None

    def reports(self, out: Path) -> ReportFiles:
        """The report files for the model ``out``. Raises OutputError."""
        return ReportFiles.for_model(out, self.report_files)

    def make_request(self) -> Request:
        """The request of the compilation. Raises RecipeError, and OutputError for --report."""
        recipe = self.make_recipe()
        lock = lockfile.requested_lock(self.recipe, recipe, COMMAND_LINE)
        is_searched = _is_searched() or self.max_size is not None
        seconds = self.search_time if is_searched and lock is None else 0.0
        state, bits = (self.output.with_name(f"{self.output.stem}.{n}.json") for n in _STATES)
        options = replace(
            self.make_options(),
            verify=not self.no_verify,
            bench=not self.no_bench,
            profile=self.reports(self.output).page is not None,
            tune=self.tune,
            force=self.force,
            dump_dir=self.dump_passes,
            metric=self.metric,
            search_time=seconds,
            search_state=state if seconds else None,
            max_size=self.max_size,
            fewest_bits=_is_searched(),
            bits_state=bits if seconds and self.max_size is not None else None,
            stem=self.output.stem,
            lock=lock,
            keep_calibration=self.lock_file is not None,
        )
        return Request(
            self.model, self.data, recipe=recipe, gates=self.make_gates(), options=options
        )


def _is_searched() -> bool:
    """True if the user set an accuracy gate: default gates do not start a search."""
    source = click.get_current_context().get_parameter_source
    return any(source(name) is not ParameterSource.DEFAULT for name in ACCURACY_GATES)
