"""A ranking of items as a recipe: the most sensitive lifted, so that the gates are passed.

The file is a plain recipe for ``compile --recipe``; beside each pattern stands the error that was
measured. How many are lifted is found by bisection over the ranking, on the switched model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from qcompile.compiler.config.recipe import Recipe, to_yaml
from qcompile.compiler.report.notes import Note
from qcompile.compiler.search.lift_items import By
from qcompile.compiler.search.measurable import Measurable
from qcompile.compiler.search.measurements import measurements
from qcompile.compiler.search.sensitivity import (
    Measure,
    Measures,
    Score,
    SensitivityRow,
    rank,
    shortest_prefix,
)
from qcompile.errors import GateError
from qcompile.planning.context import Precision
from qcompile.system.json_values import Record, members


@dataclass(frozen=True)
class Policy(Record):
    """A recipe that lifts these rows, and what the switched model says of it."""

    recipe: Recipe
    lifted: tuple[SensitivityRow, ...]
    predicted: Score

    JSON = members("precision lifted=names predicted")

    @property
    def precision(self) -> dict[str, Precision]:
        """That of the recipe by pattern."""
        return dict(self.recipe.precision)

    @property
    def names(self) -> list[str]:
        """The items that are lifted."""
        return [row.item.name for row in self.lifted]

    def to_yaml(self, heading: str) -> str:
        """The recipe as a file, with what was measured beside each pattern."""
        found = self.predicted
        cosine = f"cosine mean {found.mean_cosine:.4f}, worst {found.worst_cosine:.4f}"
        notes = {pattern: _note(row) for row in self.lifted for pattern, _ in row.item.lifts}
        return to_yaml(self.recipe, (heading, f"predicted: {cosine}"), notes)


def _note(row: SensitivityRow) -> str:
    where = row.item.roles if row.item.layer is None else f"{row.item.roles}@{row.item.layer}"
    said = []
    if row.alone is not None:
        said.append(f"error {row.alone.error:.1e} alone")
    if row.lifted is not None:
        said.append(f"{row.lifted.error:.1e} left when it alone is lifted")
    return f"{where}: {', '.join(said)}"


@dataclass(frozen=True)
class Sensitivity(Record):
    """Rows between ``quantized``, all on, and ``plain``, all off."""

    source: str
    found: Measurable
    meter: Measures
    by: By
    rows: Annotated[tuple[SensitivityRow, ...], "the most sensitive first"]
    quantized: Annotated[Score, "all quantized"]
    plain: Annotated[Score, "all lifted"]
    notes: tuple[Note, ...] = ()

    JSON = members(
        "source target=found.prepared.target.name mode=found.prepared.mode "
        "recipe=found.prepared.recipe by "
        "quantized float=plain rows"
    )

    def policy(self, lift: int | None = None) -> Policy:
        """Lift the first ``lift`` rows, or as many as the gates need.

        Raises GateError where even all of them are not enough.
        """
        count = self._needed() if lift is None else min(lift, len(self.rows))
        chosen = self.rows[:count]
        old = self.found.prepared.recipe
        lifts = dict(lift for row in chosen for lift in row.item.lifts)
        recipe = replace(old, precision=(*lifts.items(), *old.precision))
        return Policy(recipe, chosen, self._with(count))

    def _with(self, count: int) -> Score:
        off = {s for row in self.rows[:count] for s in row.item.switches}
        return self.meter(self.meter.everything - off)

    def _needed(self) -> int:
        if not self.quantized.failures:
            return 0
        if self.plain.failures:
            raise GateError(f"no policy is enough: with all raised {self.plain.failures[0]}")
        return shortest_prefix(len(self.rows), lambda count: not self._with(count).failures)


@dataclass(frozen=True)
class Ranking(Record):
    """What ``sensitivity`` reports; the policy where one was asked for."""

    found: Sensitivity
    policy: Policy | None

    JSON = members("**found policy")


def sensitivity(found: Measurable, by: By, what: Measure) -> Sensitivity:
    """Measure all items of a model that is ready for it."""
    items, progress, notes = found.items(by), found.prepared.progress, list(found.notes)
    progress.step("measure", len(items))
    meter = measurements(found, (i.name for i in items), found.prepared.options.cache)
    if meter.scores:
        kept = f"{len(meter.scores)} measurements were taken from an earlier run"
        notes.append(Note("measurements-resumed", f"{kept} (--no-cache repeats them)"))
    try:
        quantized, plain = meter(meter.everything), meter(())
        rows = rank(meter, items, what, progress.advance)
    finally:
        meter.save()
    source = found.prepared.request.source
    return Sensitivity(source, found, meter, by, tuple(rows), quantized, plain, tuple(notes))
