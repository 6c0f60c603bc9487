"""A ranking of items as a recipe that raises the most sensitive ones, so that the gates pass.

The file is a normal recipe for ``compile --recipe``; a comment after each pattern gives the error
that was measured. How many items are raised is found by bisection over the ranking, on the
fake-quantized model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

from qcompile.compiler.cluster.account import ClusterAccount
from qcompile.compiler.config.recipe import Recipe, recipe_yaml
from qcompile.compiler.report.notes import Note
from qcompile.compiler.report.records import WeightDrops
from qcompile.compiler.search.measurable import Measurable
from qcompile.compiler.search.measurements import open_measurements
from qcompile.compiler.search.precision_candidates import By
from qcompile.compiler.search.sensitivity import (
    Measure,
    Measures,
    Score,
    SensitivityRow,
    rank_candidates,
    shortest_prefix,
)
from qcompile.compiler.search.weight_widths import WidthMeter, measured_widths, weight_items
from qcompile.errors import GateError
from qcompile.planning.context import Precision
from qcompile.runtime.notebook_table import html_table
from qcompile.system.json_values import Record, members

_SHOWN = 20  # rows of a ranking in a notebook


@dataclass(frozen=True)
class Policy(Record):
    """A recipe that raises these rows, and what the fake-quantized model predicts for it."""

    recipe: Recipe
    raised: tuple[SensitivityRow, ...]
    predicted: Score

    JSON = members("precision lifted=names predicted")

    @property
    def precision(self) -> dict[str, Precision]:
        """The precision entries of the recipe by pattern."""
        return dict(self.recipe.precision)

    @property
    def names(self) -> list[str]:
        """The items that are raised."""
        return [row.item.name for row in self.raised]

    def to_yaml(self, heading: str) -> str:
        """The recipe as YAML, with the measured errors in a comment after each pattern."""
        score = self.predicted
        cosine = f"cosine mean {score.mean_cosine:.4f}, worst {score.worst_cosine:.4f}"
        notes = {pattern: _note(row) for row in self.raised for pattern, _ in row.item.raised}
        return recipe_yaml(self.recipe, (heading, f"predicted: {cosine}"), notes)


def _note(row: SensitivityRow) -> str:
    where = row.item.roles if row.item.layer is None else f"{row.item.roles}@{row.item.layer}"
    errors = []
    if row.alone is not None:
        errors.append(f"error {row.alone.error:.1e} alone")
    if row.raised is not None:
        errors.append(f"{row.raised.error:.1e} left when it alone is raised")
    return f"{where}: {', '.join(errors)}"


@dataclass(frozen=True)
class Sensitivity(Record):
    """The ranking, with the scores of ``quantized``, all on, and ``unquantized``, all off."""

    source: str
    found: Measurable
    meter: Measures
    by: By
    rows: Annotated[tuple[SensitivityRow, ...], "the most sensitive first"]
    quantized: Annotated[Score, "all quantized"]
    unquantized: Annotated[Score, "all raised"]
    notes: tuple[Note, ...] = ()
    widths: Annotated[list[WeightDrops], "each weight at few bits, if that was asked for"] = field(
        default_factory=list
    )
    cluster: Annotated[ClusterAccount | None, "empty without --workers and --cluster"] = None

    JSON = members(
        "source target=found.prepared.target.name mode=found.prepared.mode "
        "recipe=found.prepared.recipe by "
        "quantized float=unquantized rows widths cluster{}"
    )

    def __repr__(self) -> str:
        first = f", first {self.rows[0].item.name}" if self.rows else ""
        error = f"error {self.quantized.error:.2e}"
        return f"<Sensitivity {self.source}: {len(self.rows)} by {self.by}, {error}{first}>"

    def _repr_html_(self) -> str:
        """The most sensitive items, for notebooks."""
        columns = "item", "role", "layer", "kind", "alone: error", "raised: error left"
        rows = [
            (row.item.name, row.item.roles, "-" if row.item.layer is None else str(row.item.layer),
             row.item.kinds, _error(row.alone), _error(row.raised))
            for row in self.rows[:_SHOWN]
        ]  # fmt: skip
        title = f"{self.source}: error with all quantized {self.quantized.error:.2e}"
        more = len(self.rows) - _SHOWN
        notes = [note.text for note in self.notes] + ([f"{more} more in rows"] if more > 0 else [])
        return html_table(title, columns, rows, notes)

    def policy(self, lift: int | None = None) -> Policy:
        """Raise the first ``lift`` rows, or as many as the gates need.

        Raises GateError where even all of them are not enough.
        """
        count = self._needed() if lift is None else min(lift, len(self.rows))
        chosen = self.rows[:count]
        old = self.found.prepared.recipe
        raised = dict(entry for row in chosen for entry in row.item.raised)
        recipe = replace(old, precision=(*raised.items(), *old.precision))
        return Policy(recipe, chosen, self._with(count))

    def _with(self, count: int) -> Score:
        off = {s for row in self.rows[:count] for s in row.item.switches}
        return self.meter(self.meter.everything - off)

    def _needed(self) -> int:
        if not self.quantized.failures:
            return 0
        if self.unquantized.failures:
            raise GateError(
                f"no policy passes the gates: even with all items raised, "
                f"{self.unquantized.failures[0]}"
            )
        return shortest_prefix(len(self.rows), lambda count: not self._with(count).failures)


def _error(score: Score | None) -> str:
    return "-" if score is None else f"{score.error:.2e}"


@dataclass(frozen=True)
class Ranking(Record):
    """What ``sensitivity`` reports; the policy where one was asked for."""

    found: Sensitivity
    policy: Policy | None

    JSON = members("**found policy")


def sensitivity(
    found: Measurable,
    by: By,
    what: Measure,
    bits: Sequence[int] = (),
    measure: Callable[[Recipe], Measurable] | None = None,
) -> Sensitivity:
    """Measure all items of a model, and rank them.

    ``bits``: widths, 2 to 7, at which each weight alone is measured too; ``measure`` makes the
    model of a recipe for that. Raises RecipeError where ``by`` is no way to group.
    """
    items, progress, notes = found.items(by), found.prepared.progress, list(found.notes)
    progress.step("measure", len(items))
    meter = open_measurements(found, (i.name for i in items), found.prepared.options.cache)
    if meter.scores:
        resumed = f"{len(meter.scores)} measurements were taken from an earlier run"
        notes.append(Note("measurements-resumed", f"{resumed} (--no-cache takes them again)"))
    drops: list[WeightDrops] = []
    try:
        quantized, unquantized = meter.each([meter.everything, ()])
        rows = rank_candidates(meter, items, what, progress.advance)
        if bits and measure is not None:
            weights = WidthMeter(found, weight_items(found), meter, measure)
            progress.step("measure bits", len(weights.items) * (1 + len(bits)))
            drops = measured_widths(weights, bits, progress.advance)
    finally:
        meter.save()
    source = found.prepared.request.source
    scores = quantized, unquantized
    return Sensitivity(source, found, meter, by, tuple(rows), *scores, tuple(notes), drops)
