"""What may help where a gate failed, from what the report knows; no more than three lines.

Each line begins with the option to try, and gives what was measured, or is known from the plan, as
the reason. Whether an option is enough is known after trying it only, and no line says more.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace

from qcompile.compiler.config.recipe import Recipe
from qcompile.compiler.report.report import Report
from qcompile.rewriting import registry
from qcompile.runtime.evaluation.closeness import Closeness, Verdict
from qcompile.targets import instruction_sets

MOST = 3
_OPTION = re.compile(r"\((--[a-z0-9-]+)\)")
_NOT_A_NUMBER = "the float model's own output"  # how the failure begins that no option changes
_FEW_FEEDS = 16  # batches; 128 samples, half of what text data has by default
_VNNI = "avx512-vnni"
# Settings that no option of the command line has, so that another named recipe would replace them.
_ONLY_IN_RECIPES = ("transforms", "precision", "attention", "general_text", "forms", "gates")


def next_steps(report: Report) -> list[str]:
    """Options that may make a failed gate pass, the best founded first; none where all passed."""
    if any(f.startswith(_NOT_A_NUMBER) for f in report.failures):
        return []
    steps: list[str] = []
    verdict = report.verdict
    if verdict is not None and not verdict.passed:
        steps += _AccuracySteps(report, verdict).lines()
    if any("(--max-latency-ratio)" in f for f in report.failures):
        steps += _latency(report)
    return steps[:MOST]


@dataclass(frozen=True)
class _AccuracySteps:
    """What may bring outputs closer."""

    report: Report
    verdict: Verdict

    def lines(self) -> list[str]:
        """All that apply, in order."""
        return [
            *self._data(),
            *self._bits(),
            *self._search(),
            *self._exact_sums(),
            *self._measured_tensor(),
            *self._attention(),
            *self._noisy_tensor(),
            *self._more_data(),
            *self._accept(),
        ]

    def _data(self) -> Iterator[str]:
        if any(note.code == "made-up-inputs" for note in self.report.notes):
            yield "--data DATA: outputs were compared on random inputs, not on yours"

    def _bits(self) -> Iterator[str]:
        recipe = self.report.recipe
        for option, bits in (
            ("--weight-bits", recipe.weight_bits),
            ("--embedding-bits", recipe.embedding_bits),
        ):
            if bits is not None and bits < 8:
                yield f"{option} {bits + 1} or more: now {bits}; 8 are the default"

    def _search(self) -> Iterator[str]:
        """A gate that is given starts a search, which default gates do not."""
        if not any(note.code == "search-advice" for note in self.report.notes):
            return
        for option, limit in _failed_gates(self.report, self.verdict):
            yield (
                f"{option} {limit:g}: given as an option, the gate starts a search for the fewest "
                "tensors that need more bits"
            )
            return

    def _exact_sums(self) -> Iterator[str]:
        """Processors that add in int32: measured where both sums were, else by the bound's cost."""
        report, exact = self.report, self.verdict.by_sums.get("exact")
        here = instruction_sets.of_machine(report.environment.isa)
        name = _VNNI if here is None or here.saturates else here.name
        only = "for a model that runs only where sums are exact"
        if exact is not None and exact.passed:
            yield f"--isa {name}: with exact int8 sums the gates passed; {only}"
            return
        cost = None if report.saturation is None else report.saturation.cost
        if cost is not None and not report.recipe.isa and cost.mean_db > 0:
            yield (
                f"--isa {name}: the bound on int8 sums adds {cost.mean_db:.1f} dB of rounding "
                f"noise to {cost.tensors} tensors, by prediction; {only}"
            )

    def _measured_tensor(self) -> Iterator[str]:
        """What the search measured to cause the largest error, if it is not raised."""
        search = self.report.search
        if search is None:
            return
        raised = {item.item for item in search.raised}
        for item in search.ranking:
            if item.error_alone is not None and item.item not in raised:
                yield (
                    f"--keep-float {shlex.quote(item.item)}: of what is still quantized, it causes "
                    f"the largest error alone ({item.error_alone:.1e}, measured)"
                )
                return

    def _attention(self) -> Iterator[str]:
        """The named recipe with attention in float, or its only key in a recipe of the user's."""
        report = self.report
        if not report.int8_products or report.recipe.attention == "float":
            return
        count = report.int8_products
        which = f"{count} matrix multiplication{'s' * (count > 1)} of attention in int8"
        option = "attention: float in the recipe" if _is_own(report.recipe) else "--recipe accurate"
        yield f"{option}: now {which}, then in float"

    def _noisy_tensor(self) -> Iterator[str]:
        """The quantized tensor with the lowest SQNR, which need not matter most for the outputs."""
        rows = [
            row
            for row in self.report.ledger
            if row.kind in ("weight", "activation")
            and row.tensor
            and not row.dtype.startswith("float")
            and row.sqnr_db is not None
            and math.isfinite(row.sqnr_db)
        ]
        if self.report.search is not None or not rows:
            return
        worst = min(rows, key=lambda row: row.sqnr_db or 0.0)
        yield (
            f"--keep-float {shlex.quote(worst.tensor)}: it has the lowest SQNR, "
            f"{worst.sqnr_db:.1f} dB; qcompile sensitivity measures which tensors matter"
        )

    def _more_data(self) -> Iterator[str]:
        account = self.report.calibration
        if account is None:
            return
        feeds = account.feeds + account.held_out
        if feeds < _FEW_FEEDS:
            yield f"--data with more samples: ranges come from {account.feeds} batches only"

    def _accept(self) -> Iterator[str]:
        """Gates that accept the outputs as they are."""
        found = [f"{o} {x:g}" for o, x in accepting_limits(self.report, self.verdict)]
        if found:
            yield f"{' '.join(found)}: accepts the outputs as measured"


def _is_own(recipe: Recipe) -> bool:
    """True for a recipe with settings of its own that ``--recipe NAME`` would drop."""
    default = Recipe()
    same = {key: getattr(default, key) for key in _ONLY_IN_RECIPES}
    return recipe != replace(recipe, **same)


def _failed_gates(report: Report, verdict: Verdict) -> Iterator[tuple[str, float]]:
    """Option and limit of each accuracy gate that failed, once."""
    options = (o for failure in verdict.failures for o in _OPTION.findall(failure))
    for option in dict.fromkeys(options):
        limit = getattr(report.gates, option[2:].replace("-", "_"), None)
        if limit is not None:
            yield option, limit


def accepting_limits(report: Report, verdict: Verdict) -> Iterator[tuple[str, float]]:
    """Option and a limit that passes, in three digits, of each accuracy gate that failed."""
    every = (verdict, *verdict.by_sums.values())
    outputs = [output for one in every for output in one.outputs]
    for option, _ in _failed_gates(report, verdict):
        worst = _worst(option, outputs)
        if worst is not None and math.isfinite(worst):
            yield option, _rounded(worst, up=option.startswith("--max"))


def _worst(option: str, outputs: list[Closeness]) -> float | None:
    """The figure of the worst output that a gate is about."""
    several = [o for o in outputs if not o.is_single]
    figures: dict[str, list[float | None]] = {
        "--min-cosine": [o.mean_cosine for o in outputs],
        "--min-worst-cosine": [o.worst_cosine for o in outputs],
        "--min-sqnr": [o.sqnr_db for o in outputs],
        "--min-r2": [o.r2 for o in several],
        "--min-single-r2": [o.r2 for o in outputs if o.is_single],
        "--max-flips": [o.flip_share for o in outputs],
        "--max-abs": [o.max_abs for o in outputs],
    }
    known = [value for value in figures.get(option, ()) if value is not None]
    pick = max if option.startswith("--max") else min
    return pick(known) if known else None


def _rounded(value: float, *, up: bool) -> float:
    """Three significant digits, of 1 - value where it is close to 1, to the side that passes."""
    if value == 0:
        return 0.0
    distance = 1 - value if 0.5 < value < 1 else abs(value)
    step = 10.0 ** (math.floor(math.log10(distance)) - 2)
    steps = math.ceil(value / step) if up else math.floor(value / step)
    return float(f"{steps * step:.12g}")


def _latency(report: Report) -> Iterator[str]:
    """What may make the model faster, or the verdict steadier."""
    speed = report.speed
    if speed is not None and speed.noisy:
        yield "the same command on an idle machine: rounds of the timing differ by more than 25 %"
    target = registry.targets().get(report.target)
    if target is not None and target.forms and report.tuning is None:
        yield f"--tune: times {len(target.forms)} lowering options here and keeps the fastest"
    if speed is not None:
        limit = math.ceil(speed.ratio(1).low * 100) / 100
        yield f"--max-latency-ratio {limit:g}: accepts the latency as measured"
