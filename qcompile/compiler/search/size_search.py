"""Finds the bits of each weight with which the compiled model has at most so many bytes.

What each weight costs is measured on the fake-quantized model (``weight_widths.py``), bits are
allocated by it (``bit_allocation.py``), and the model is compiled and verified with them. Errors of
the worst sample count as much as the mean's, since they come from few places. If the file turns out
larger than the arithmetic says, bits are allocated again; if a gate fails, also by the mean alone
and by the worst sample alone. With a gate that the user gave, smaller sizes are tried by bisection
for as long as the gate holds. The best result is kept, and measurements are stored in a file, from
which the same command resumes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import pairwise

from qcompile.compiler.config.recipe import Recipe
from qcompile.compiler.report.notes import Note
from qcompile.compiler.report.records import SizeAccount, SizePoint, WeightBits
from qcompile.compiler.search.bit_allocation import (
    Choice,
    allocate,
    interpolated_drops,
)
from qcompile.compiler.search.measurable import Measurable, PlannedWeight
from qcompile.compiler.search.measurements import StateFile, open_measurements
from qcompile.compiler.search.mixed_precision import search_obstacle
from qcompile.compiler.search.sensitivity import Score, score
from qcompile.compiler.search.weight_widths import (
    WIDTHS,
    WeightItem,
    WidthMeter,
    weight_items,
    width_drop,
    with_widths,
)
from qcompile.compiler.stages.verify import Verified
from qcompile.data.feeds import sample_count
from qcompile.planning.context import Reasons
from qcompile.quant import LEAST_SAVED, QSpec

# Widths that are measured, each only if a weight would get it or less; others are interpolated.
_MEASURED = (4, 3, 2)
# Shares of the search time: of measuring at one width, and after which nothing smaller is tried.
_AT_A_WIDTH, _SHRUNK = 0.2, 0.85
_FITTINGS = 6  # allocations until the file has the size that the arithmetic says
_SHRINKINGS = 6  # bisections between the fewest bytes and the limit
_CLOSE = 0.01  # share of a size at which bisection ends
# How much the mean of the error and its worst sample count; the first is tried first.
_GOALS = ((1.0, 1.0), (0.0, 1.0), (1.0, 0.0))


@dataclass(frozen=True)
class SizeTools:
    """How to compile and verify, how to get the fake-quantized model and the plan of a recipe, how
    to time a model (compiled over float), and the clock (seconds)."""

    build: Callable[[Recipe, Reasons], Verified]
    measure: Callable[[Recipe], Measurable]
    plan: Callable[[Recipe], Mapping[str, PlannedWeight]]
    latency: Callable[[Verified], float | None]
    clock: Callable[[], float] = time.monotonic


@dataclass(frozen=True)
class Sized:
    """The closest model within the limit; ``account`` is for the report, None without a search."""

    verified: Verified
    account: SizeAccount | None = None
    notes: tuple[Note, ...] = ()
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Build:
    """A model that was compiled, now or in an earlier run. ``score``: None if not verified.

    ``stored``: bytes of each item's integers in the file, 0 where they are not found by name.
    """

    choices: tuple[Choice, ...]
    bytes: int
    latency: float | None
    score: Score | None
    stored: tuple[int, ...] = ()

    @property
    def passed(self) -> bool:
        return self.score is None or not self.score.failures

    @property
    def rank(self) -> tuple[int, float]:
        """Sorts the better one first."""
        return (0, 0.0) if self.score is None else (len(self.score.failures), self.score.error)


def search_size(first: Verified, tools: SizeTools) -> Sized:
    """Search if there is a limit that asks for it, and if it is possible."""
    options = first.prepared.options
    if options.max_size is None:
        return Sized(first)
    limit = options.max_size.of(first.prepared.float_model.size)
    compiled = first.rewritten.compiled.size
    shrinks = options.fewest_bits and first.verdict is not None and first.verdict.passed
    if options.lock is not None or (compiled <= limit and not shrinks):
        return Sized(first, failures=_over(first, limit, ""))
    obstacle = search_obstacle(first)
    if obstacle is None and options.search_time <= 0:
        return Sized(first, failures=_over(first, limit, "--search-time chooses bits by the data"))
    if obstacle is not None:
        why = f"bits cannot be chosen: {obstacle.reason}"
        return Sized(first, failures=_over(first, limit, why))
    return _SizeSearch(_with_small_tables(first, tools), limit, tools).run()


def _with_small_tables(first: Verified, tools: SizeTools) -> Verified:
    """The same model with tables in 8 bits that targets leave float for speed, if there are any.

    Unless a gate holds only without.
    """
    recipe = first.prepared.recipe
    if recipe.embedding_bits is not None:
        return first
    asked = replace(recipe, embedding_bits=8)
    more = tools.plan(asked).keys() - tools.plan(recipe).keys()
    built = tools.build(asked, {}) if more else first
    return built if _passes(built) or not _passes(first) else first


def _passes(verified: Verified) -> bool:
    return verified.verdict is None or verified.verdict.passed


def _over(verified: Verified, limit: int, why: str) -> tuple[str, ...]:
    """The failed gate on size, if it fails; ``why`` nothing smaller was found."""
    prepared, size = verified.prepared, verified.rewritten.compiled.size
    if size <= limit:
        return ()
    share = size / max(prepared.float_model.size, 1)
    given = prepared.options.max_size
    text = f"compiled has {size:,} bytes ({share:.1%} of float), over {limit:,}"
    return (f"{text} (--max-size {given}){f'; {why}' if why else ''}",)


class _SizeSearch:
    def __init__(self, first: Verified, limit: int, tools: SizeTools) -> None:
        self.first, self.limit, self.tools = first, limit, tools
        self.prepared, self.options = first.prepared, first.prepared.options
        self.start = tools.clock()
        self.compiled: dict[str, Verified] = {}
        self.builds: dict[str, _Build] = {}
        self.scores: dict[int, dict[int, Score]] = {}  # item, bits

    def run(self) -> Sized:
        """Search; measurements are stored also when it is interrupted."""
        recipe, path = self.prepared.recipe, self.options.bits_state
        base = self.tools.measure(recipe)
        self.items, self.progress = weight_items(base), base.prepared.progress
        self.samples = sum(map(sample_count, base.meter.feeds))
        store = None if path is None else StateFile(path)
        self.state = open_measurements(base, (i.name for i in self.items), store)
        self.meter = WidthMeter(base, self.items, self.state, self.tools.measure)
        try:
            self._plan(base)
            return self._search()
        except KeyboardInterrupt as e:
            if path is None or not self.state.scores:
                raise
            kept = f"{len(self.state.scores)} measurements are kept in {path.name}"
            raise type(e)(f"{kept}, the same command continues from there") from None
        finally:
            self.state.save()

    def _plan(self, base: Measurable) -> None:
        """Bytes of each item at each width that it can have, and of everything else."""
        own = {weight.name: weight for weight in base.weights.values()}
        self.sizes = [{item.bits: item.bytes_in(own)} for item in self.items]
        self.specs: list[dict[int, QSpec]] = [{} for _ in self.items]
        self.progress.step("bits: plan", len(WIDTHS))
        for bits in WIDTHS:
            recipe = with_widths(self.prepared.recipe, ((item, bits) for item in self.items))
            plan = self.tools.plan(recipe)
            for item, sizes, specs in zip(self.items, self.sizes, self.specs, strict=True):
                size = item.bytes_in(plan) if item.has_width(bits, plan) else 0
                if 0 < size < min(sizes[item.bits] - LEAST_SAVED, *sizes.values()):
                    sizes[bits], specs[bits] = size, plan[item.name].spec
            self.progress.advance()
        own_choices = [
            Choice(item.bits, sizes[item.bits], 0.0)
            for item, sizes in zip(self.items, self.sizes, strict=True)
        ]
        known = sum(choice.bytes for choice in own_choices)
        self.other = self.first.rewritten.compiled.size - known
        self.first_build = self._record(own_choices, self.first)

    def _search(self) -> Sized:
        if all(len(sizes) == 1 for sizes in self.sizes):
            return self._missed("no weight can have fewer bits here")
        fewest = self.other + sum(min(sizes.values()) for sizes in self.sizes)
        if fewest > self.limit:
            return self._missed(self._smallest(fewest))
        self._measure(_MEASURED[0])
        best = self._best_fit()
        if best is None:
            return self._missed(self._smallest(self._fewest()))
        if self.options.fewest_bits and best.passed:
            best = self._shrunk(best)
        return self._found(best)

    def _late(self, share: float) -> bool:
        return self.tools.clock() - self.start >= share * self.options.search_time

    # ---- measuring
    def _measure(self, bits: int) -> None:
        """Score each item at ``bits`` and at its own bits, as far as there is time."""
        begun = self.tools.clock()
        samples = self._samples()
        chosen = [i for i, sizes in enumerate(self.sizes) if bits in sizes]
        items = [self.items[i] for i in chosen]
        narrowed = [item for item in items if item.bits != bits]
        self.progress.step(f"bits: measure at {bits}", len(items))
        with (
            closing(self.meter.each(items, None, samples)) as own,
            closing(self.meter.each(narrowed, bits, samples)) as fewer,
        ):
            for i in chosen:
                if self.tools.clock() - begun >= 2 * _AT_A_WIDTH * self.options.search_time:
                    break
                found = self.scores.setdefault(i, {})
                found[self.items[i].bits] = next(own)
                if self.items[i].bits != bits:
                    found[bits] = next(fewer)
                self.progress.advance()

    def _samples(self) -> int:
        """0 for all, or as many as there is time for."""
        if self.state.samples is None:
            begun = self.tools.clock()
            self.meter.base.meter(self.state.everything)
            needed = (self.tools.clock() - begun) * 2 * len(self.items)
            allowed = _AT_A_WIDTH * self.options.search_time
            fits = needed <= allowed
            self.state.samples = 0 if fits else max(1, int(self.samples * allowed / needed))
        return self.state.samples

    def _drops(self, goal: tuple[float, float]) -> list[dict[int, float]]:
        """For each item and width, what it costs: shares of what all items cost at first."""
        errors = [self._costs(i, lambda s: s.error) for i in range(len(self.items))]
        worst = [self._costs(i, lambda s: 1 - s.worst_cosine) for i in range(len(self.items))]
        totals = [_total(costs) for costs in (errors, worst)]
        return [
            {
                bits: sum(
                    share * costs[bits] / total
                    for share, costs, total in zip(goal, pair, totals, strict=True)
                    if total > 0
                )
                for bits in self.sizes[i]
            }
            for i, pair in enumerate(zip(errors, worst, strict=True))
        ]

    def _costs(self, index: int, figure: Callable[[Score], float]) -> dict[int, float]:
        """By width; an item that was not measured is taken for the most sensitive one."""
        own, widths = self.items[index].bits, list(self.sizes[index])
        measured = self.scores.get(index)
        if measured is None:
            others = [self._costs(i, figure) for i in self.scores]
            return {b: max((o.get(b, 0.0) for o in others), default=0.0) for b in widths}
        few = {b: figure(s) - figure(measured[own]) for b, s in measured.items() if b != own}
        if not few:
            return dict.fromkeys(widths, 0.0)
        return interpolated_drops(few, [b for b in widths if b != own]) | {own: 0.0}

    # ---- choosing
    def _allocated(self, limit: int, goal: tuple[float, float]) -> list[Choice] | None:
        """Bits within ``limit`` bytes of the file; lower widths are measured where they matter."""
        for bits, lower in pairwise((*_MEASURED, 0)):
            drops = self._drops(goal)
            weights = [
                [Choice(b, size, cost[b]) for b, size in sizes.items()]
                for sizes, cost in zip(self.sizes, drops, strict=True)
            ]
            found = allocate(weights, limit - self.other)
            if found is None or not lower or all(c.bits >= bits for c in found):
                return found
            self._measure(lower)
        raise AssertionError("the last width has no lower one")

    def _fitted(self, limit: int, goal: tuple[float, float] = _GOALS[0]) -> _Build | None:
        """Compile what is allocated; again with less where the file is over ``limit``."""
        for _ in range(_FITTINGS):
            choices = self._allocated(limit, goal)
            if choices is None:
                break
            build = self._built(choices)
            if build.bytes <= limit:
                return build
            if not self._unstored(build):
                # Nodes that unpack take bytes too.
                self.other = build.bytes - sum(c.bytes for c in choices)
        return None

    def _unstored(self, build: _Build) -> bool:
        """Drop widths that were planned and are not stored so: a mode may have no form for them.

        What holds for one weight holds for all that are quantized in the same way. Returns whether
        there are any.
        """
        unstored = set()
        for item, choice, sizes, specs, stored in zip(
            self.items, build.choices, self.sizes, self.specs, build.stored, strict=True
        ):
            saves_nothing = stored >= sizes[item.bits]
            if choice.bits != item.bits and saves_nothing and choice.bits in specs:
                unstored.add(specs[choice.bits])
        for sizes, specs in zip(self.sizes, self.specs, strict=True):
            for bits in [b for b, spec in specs.items() if spec in unstored]:
                del sizes[bits], specs[bits]
        return bool(unstored)

    def _best_fit(self) -> _Build | None:
        """The best build within the limit; other goals are tried where a gate fails."""
        best = self._fitted(self.limit)
        for goal in _GOALS[1:]:
            if best is None or best.passed or self._late(_SHRUNK):
                break
            other = self._fitted(self.limit, goal)
            best = best if other is None else min(best, other, key=lambda b: b.rank)
        return best

    def _shrunk(self, best: _Build) -> _Build:
        """The smallest build that passes, as far as there is time to bisect."""
        low = self._fewest()
        for _ in range(_SHRINKINGS):
            if self._late(_SHRUNK) or best.bytes - low <= _CLOSE * best.bytes:
                break
            middle = (low + best.bytes) // 2
            build = self._fitted(middle)
            if build is not None and build.passed:
                best = build
            else:
                low = middle
        return best

    def _fewest(self) -> int:
        return self.other + sum(min(sizes.values()) for sizes in self.sizes)

    # ---- compiling
    def _built(self, choices: Sequence[Choice]) -> _Build:
        """The build with these bits; from the state if an earlier run made it."""
        key = _key(choices)
        if key in self.builds:
            return self.builds[key]
        if len(self.state.figures.get(key, ())) == 2 + len(self.items):
            size, latency, *stored = self.state.figures[key]
            self.builds[key] = _Build(
                tuple(choices),
                int(size or 0),
                latency,
                self.state.tried.get(key),
                tuple(int(count or 0) for count in stored),
            )
            return self.builds[key]
        return self._record(choices, self._compiled(choices))

    def _compiled(self, choices: Sequence[Choice]) -> Verified:
        key = _key(choices)
        if key not in self.compiled:
            changed = [
                (item, choice.bits)
                for item, choice in zip(self.items, choices, strict=True)
                if choice.bits != item.bits
            ]
            recipe = with_widths(self.prepared.recipe, changed)
            added = recipe.precision[len(self.prepared.recipe.precision) :]
            reasons = {pattern: "by the search, --max-size" for pattern, _ in added}
            self.compiled[key] = self.tools.build(recipe, reasons)
        return self.compiled[key]

    def _record(self, choices: Sequence[Choice], verified: Verified) -> _Build:
        key, size = _key(choices), verified.rewritten.compiled.size
        verdict, latency = verified.verdict, self.tools.latency(verified)
        found = None if verdict is None else score(verdict)
        if found is not None:
            self.state.tried[key] = found
        self.compiled[key] = verified
        stored = tuple(_stored_bytes(verified, item) for item in self.items)
        self.state.figures[key] = [size, latency, *stored]
        self.builds[key] = _Build(tuple(choices), size, latency, found, stored)
        self.state.save()  # a build takes long, and a process that is killed writes nothing more
        return self.builds[key]

    # ---- reporting
    def _found(self, best: _Build) -> Sized:
        verified = self._compiled(best.choices)
        counts = Counter(c.bits for c in best.choices)
        listed = ", ".join(f"{n} at {bits} bits" for bits, n in sorted(counts.items()))
        share = best.bytes / max(self.prepared.float_model.size, 1)
        hint = "; with more --search-time it may be smaller" if self._ran_out() else ""
        text = f"bits by measured sensitivity, {share:.1%} of float: weights {listed}{hint}"
        account, note = self._account(best), Note("bits-chosen", text)
        failures = () if best.passed else (self._closest(),)
        return Sized(verified, account, (note,), failures)

    def _closest(self) -> str:
        again = "the same command continues, " if self.options.bits_state else ""
        advice = (
            f"the search time ran out ({again}--search-time allows more)"
            if self._late(_SHRUNK)
            else "allow more bytes, or lower the gate"
        )
        return f"this is the closest found with --max-size {self.options.max_size}: {advice}"

    def _ran_out(self) -> bool:
        return self.options.fewest_bits and self._late(_SHRUNK)

    def _missed(self, why: str) -> Sized:
        """Nothing is within the limit: the smallest build of those that pass, else the first."""
        best = min(
            (b for b in self.builds.values() if b.passed),
            key=lambda b: b.bytes,
            default=self.first_build,
        )
        verified = self._compiled(best.choices)
        return Sized(verified, self._account(best), failures=_over(verified, self.limit, why))

    def _smallest(self, size: int) -> str:
        share = size / max(self.prepared.float_model.size, 1)
        bits = sorted({min(sizes) for sizes in self.sizes})
        widths = " and ".join(map(str, bits))
        return (
            f"the smallest possible is about {size:,} bytes ({share:.1%}), with all weights at "
            f"{widths} bits"
        )

    def _account(self, best: _Build) -> SizeAccount:
        self.prepared.stopwatch.seconds["bits"] = round(self.tools.clock() - self.start, 3)
        order = sorted(range(len(self.items)), key=lambda i: -self._error(i))
        return SizeAccount(
            limit=self.limit,
            measurements=self.state.measured,
            compilations=len(self.compiled) - 1,
            weights=[self._weight(i, best.choices[i]) for i in order],
            points=[_point(b, best) for b in sorted(self.builds.values(), key=lambda b: b.bytes)],
        )

    def _error(self, index: int) -> float:
        return max((s.error for s in self.scores.get(index, {}).values()), default=0.0)

    def _weight(self, index: int, choice: Choice) -> WeightBits:
        item: WeightItem = self.items[index]
        found = sorted(self.scores.get(index, {}).items(), reverse=True)
        drops = [width_drop(bits, s) for bits, s in found]
        return WeightBits(item.name, item.role, item.layer, choice.bits, choice.bytes, drops)


def _key(choices: Sequence[Choice]) -> str:
    return "bits:" + ",".join(str(choice.bits) for choice in choices)


def _stored_bytes(verified: Verified, item: WeightItem) -> int:
    """Bytes of its integers in the file; passes name what they derive after what it comes from."""
    derived = tuple(f"{tensor}/" for tensor in item.tensors)
    return sum(
        row.bytes
        for row in verified.rewritten.ledger
        if row.kind == "weight" and f"{row.tensor}/".startswith(derived)
    )


def _total(costs: Sequence[Mapping[int, float]]) -> float:
    """What all items cost at the width that is measured first."""
    return sum(cost.get(_MEASURED[0], 0.0) for cost in costs)


def _point(build: _Build, best: _Build) -> SizePoint:
    found = build.score
    return SizePoint(
        build.bytes,
        None if found is None else found.mean_cosine,
        None if found is None else found.worst_cosine,
        build.latency,
        build.passed,
        build is best,
    )
