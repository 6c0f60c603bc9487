"""Finds the fewest tensors to raise, so that a model passes the gates that it failed.

Rank the items by the error of each quantized alone; find the shortest prefix of the ranking that
passes, by bisection; drop items that are not needed. All of this runs on the fake-quantized model,
where a raised item is float, without compiling. Then compile with these items raised and verify. If
that fails, compile them with float instead of 16 bits, which are too few for a tensor whose spread
is small next to its offset; if that fails too, raise the next ones and compile again. The best
result is kept. Measurements are stored in a state file, from which the same command resumes after
an interrupt or after the search time ran out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

from qcompile.compiler.config.recipe import Recipe
from qcompile.compiler.report.notes import Note
from qcompile.compiler.report.records import RaisedItem, RankedItem, SearchAccount
from qcompile.compiler.search.measurable import Measurable
from qcompile.compiler.search.measurements import StateFile, bit_mask, open_measurements
from qcompile.compiler.search.precision_candidates import PrecisionCandidate
from qcompile.compiler.search.sensitivity import Score, score, shortest_prefix
from qcompile.compiler.stages.verify import Verified
from qcompile.data.feeds import sample_count
from qcompile.ir import Refusal
from qcompile.planning.context import Precision, Reasons

Raised: TypeAlias = frozenset[int]


class _Build(NamedTuple):
    """Items that are raised; ``to_float``: to float, also where the target has 16 bits."""

    raised: Raised
    to_float: bool = False

    @property
    def key(self) -> str:
        """The key in the file of measurements."""
        return _FLOAT * self.to_float + bit_mask(self.raised)

    @classmethod
    def of(cls, key: str) -> _Build:
        """The inverse of ``key``."""
        mask = int(key.removeprefix(_FLOAT), 16)
        items = frozenset(i for i in range(mask.bit_length()) if mask >> i & 1)
        return cls(items, key.startswith(_FLOAT))


_FLOAT = "float:"
# Shares of the search time after which ranking, and all measuring, stop.
_RANKED, _MEASURED = 0.6, 0.85
_MOST_REPORTED = 400  # items, the most sensitive first
_ADVICE = (
    "a gate that is given as an option, also with its default, makes the same command search for "
    "tensors to raise so that it passes; in Python, Options(search_time=300) does"
)


@dataclass(frozen=True)
class Searched:
    """The build that passes with the fewest items raised, else the best one; ``account`` is for the
    report, None without a search."""

    verified: Verified
    account: SearchAccount | None = None
    notes: tuple[Note, ...] = ()
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tools:
    """How to compile and verify, how to get the fake-quantized model, and the clock (seconds)."""

    build: Callable[[Recipe, Reasons], Verified]
    measure: Callable[[Recipe], Measurable]
    clock: Callable[[], float] = time.monotonic


def search_precision(first: Verified, tools: Tools) -> Searched:
    """Search if it was asked for, is needed and is possible; if not, a note says what to do."""
    prepared, verdict = first.prepared, first.verdict
    if verdict is None or verdict.passed or prepared.mode == "float":
        return Searched(first)
    obstacle = search_obstacle(first)
    if prepared.options.search_time <= 0:
        advised = obstacle is None and prepared.options.lock is None and first.rewritten.quantized
        return Searched(first, notes=(Note("search-advice", _ADVICE),) if advised else ())
    if obstacle is not None:
        note = Note("no-search", obstacle.about("no search for tensors to raise").reason)
        return Searched(first, notes=(note,))
    return _Search(first, tools).run()


def search_obstacle(first: Verified) -> Refusal | None:
    """Why nothing can be measured on this model; None where it can."""
    prepared = first.prepared
    if not first.rewritten.quantized:  # a model that came in quantized, and misses a gate
        return Refusal("nothing was quantized here")
    if not first.held_out:
        return Refusal("it needs data")
    if prepared.reusable_feeds is None:
        return Refusal("the data can be read once only, give a list or a file")
    return prepared.budget.excess_of(prepared.budget.switched, "it")


def drop_search_states(*states: Path | None) -> None:
    """Drop the states of searches that have reached their goal."""
    for state in states:
        if state is not None:
            StateFile(state).drop()


class _Search:
    def __init__(self, first: Verified, tools: Tools) -> None:
        self.first, self.tools = first, tools
        self.options = first.prepared.options
        self.start = tools.clock()
        self.built: dict[_Build, Verified] = {_Build(frozenset()): first}

    def run(self) -> Searched:
        """Search; measurements are stored also when it is interrupted."""
        model = self.tools.measure(self.first.prepared.recipe)
        self.items: list[PrecisionCandidate] = model.items()
        self.meter, self.progress = model.meter, model.prepared.progress
        path = self.options.search_state
        store = None if path is None else StateFile(path)
        self.state = open_measurements(model, (i.name for i in self.items), store)
        self.samples = sum(map(sample_count, self.meter.feeds))
        self.order: list[int] = []
        self.alone: dict[int, float] = {}
        try:
            return self._search()
        except KeyboardInterrupt as e:
            if path is None or not self.state.scores:
                raise
            kept = f"{len(self.state.scores)} measurements are kept in {path.name}"
            raise type(e)(f"{kept}, the same command continues from there") from None
        finally:
            self.state.save()

    def _search(self) -> Searched:
        everything = frozenset(range(len(self.items)))
        self.progress.step("search: measure", len(self.items))
        whole = self._score(everything)
        if whole.failures:
            return self._missed(f"with all raised it would be {whole.failures[0]}")
        self._rank()
        self.progress.step("search: choose")
        chosen = self._drop(self._prefix())
        step = 1
        while builds := self._builds(chosen):
            for build in builds:
                passing = self._passing(build)
                if passing is not None:
                    return self._passed(passing, build)
            rest = [i for i in self.order if i not in chosen]
            if not rest or self._late(1.0):
                break
            chosen |= frozenset(rest[:step])
            step *= 2
        if not self._builds(chosen) and not self._late(_MEASURED):
            return self._missed("all of them are needed, which leaves nothing quantized")
        return self._missed("")

    # ---- measuring
    def _late(self, share: float) -> bool:
        return self.tools.clock() - self.start >= share * self.options.search_time

    def _score(self, raised: Raised) -> Score:
        """Of the model with these items raised, on all samples."""
        off = {s for i in raised for s in self.items[i].switches}
        return self.state(self.state.everything - off)

    def _passes(self, raised: Raised) -> bool:
        return not self._score(raised).failures

    def _rank(self) -> None:
        """Order by the error of each item alone; items that were not measured in time come last."""
        samples = self._ranking_samples()
        sets = [frozenset(item.switches) for item in self.items]
        with closing(self.state.each(sets, samples)) as scores:
            for i in range(len(sets)):
                if self._late(_RANKED):
                    break
                self.alone[i] = next(scores).error
                self.progress.advance()
        self.order = sorted(range(len(self.items)), key=lambda i: -self.alone.get(i, 0.0))

    def _ranking_samples(self) -> int:
        """0 for all, or as many as there is time for: a ranking needs fewer than a verdict."""
        if self._must_choose_samples():
            begun = self.tools.clock()
            self.meter(self.meter.everything)
            # Seconds for all items, from one run over all samples, and seconds that are left.
            needed = (self.tools.clock() - begun) * len(self.items)
            left = _RANKED * self.options.search_time - (self.tools.clock() - self.start)
            fits = needed <= left
            self.state.samples = 0 if fits else max(1, int(self.samples * max(left, 0) / needed))
        return self.state.samples or 0

    def _must_choose_samples(self) -> bool:
        """False if an earlier run ranked on all samples, or at least half of the items on fewer."""
        samples = self.state.samples
        done = sum(key.startswith(f"{samples}:") for key in self.state.scores)
        return samples is None or (samples > 0 and done < len(self.items) / 2)

    # ---- choosing
    def _prefix(self) -> Raised:
        """The shortest prefix of the ranking that passes, as far as there is time to bisect."""
        count = shortest_prefix(
            len(self.order),
            lambda count: self._passes(frozenset(self.order[:count])),
            lambda: self._late(_MEASURED),
        )
        return frozenset(self.order[:count])

    def _drop(self, chosen: Raised) -> Raised:
        """``chosen`` without items that are not needed; the least sensitive is tried first."""
        for i in reversed([i for i in self.order if i in chosen]):
            if self._late(_MEASURED) or len(chosen) == 1:
                break
            if self._passes(chosen - {i}):
                chosen -= {i}
        return chosen

    def _builds(self, raised: Raised) -> list[_Build]:
        """With these raised, to 16 bits and to float; none that leaves nothing quantized."""
        bits = {bits for i in raised for _, bits in self.items[i].raised}
        nothing_left = len(raised) == len(self.items)
        wide = [] if nothing_left and self._all_to_float() else [_Build(raised)]
        return wide if nothing_left or bits <= {"float"} else [*wide, _Build(raised, to_float=True)]

    def _all_to_float(self) -> bool:
        return all(bits == "float" for item in self.items for _, bits in item.raised)

    # ---- compiling
    def _passing(self, build: _Build) -> Verified | None:
        """Compile; None if the gates fail, now or in an earlier run."""
        key = build.key
        if key in self.state.tried and self.state.tried[key].failures:
            return None
        verified = self._compiled(build)
        verdict = verified.verdict
        if verdict is None:
            return None
        self.state.tried[key] = score(verdict)
        return verified if verdict.passed else None

    def _compiled(self, build: _Build) -> Verified:
        if build not in self.built:
            entries = self._entries(build)
            old = self.first.prepared.recipe
            precision = tuple((pattern, bits) for pattern, bits, _ in entries)
            recipe = replace(old, precision=(*precision, *old.precision))
            reasons = {pattern: self._reason(i) for pattern, _, i in entries}
            self.built[build] = self.tools.build(recipe, reasons)
        return self.built[build]

    def _entries(self, build: _Build) -> list[tuple[str, Precision, int]]:
        """Pattern, precision and item of what is raised, the most sensitive first."""
        return [
            (pattern, "float" if build.to_float else bits, i)
            for i in self.order
            if i in build.raised
            for pattern, bits in self.items[i].raised
        ]

    def _reason(self, item: int) -> str:
        error = self.alone.get(item)
        measured = "not measured alone" if error is None else f"error {error:.1e} alone"
        return f"raised by the search: {measured}"

    # ---- reporting
    def _passed(self, verified: Verified, build: _Build) -> Searched:
        hint = "; with more --search-time it may be fewer" if self._late(_MEASURED) else ""
        note = Note("searched", f"by the search {self._count(build)}{hint}")
        return Searched(verified, self._account(verified, build.raised), notes=(note,))

    def _missed(self, why: str) -> Searched:
        """The best build; its failure says what was reached and what to do next."""
        tried = {_Build.of(key): s for key, s in self.state.tried.items()}
        verdict = self.first.verdict
        assert verdict is not None  # else there is no search
        tried[_Build(frozenset())] = score(verdict)
        best = min(tried, key=lambda build: (len(tried[build].failures), tried[build].error))
        verified = self._compiled(best)
        reached = f"the search reached this with {self._count(best)}"
        failure = f"{reached}: {why or self._advice()}"
        if why:
            self.state.drop()
        return Searched(verified, self._account(verified, best.raised), failures=(failure,))

    def _advice(self) -> str:
        if not self._late(_MEASURED):
            return "lower the gate, or try another --calibrator or --recipe"
        again = "the same command continues, " if self.options.search_state else ""
        return f"the search time ran out ({again}--search-time allows more)"

    def _count(self, build: _Build) -> str:
        words = {16: "16 bits", 8: "8 bits", "float": "float"}
        raised, entries = build.raised, self._entries(build)
        bits = sorted({words[bits] for _, bits, _ in entries})
        names = [self.items[i].name for i in self.order if i in raised]
        shown = f" ({', '.join([*names[:3], '…'] if len(names) > 3 else names)})" if names else ""
        to = f" to {' or '.join(bits)}" if bits else ""
        return f"{len(raised)} of {len(self.items)} {self._noun()} raised{to}{shown}"

    def _noun(self) -> str:
        return "tensors" if self.first.prepared.target.quantize_interior else "operators"

    def _account(self, verified: Verified, raised: Raised) -> SearchAccount:
        seconds = round(self.tools.clock() - self.start, 3)
        chosen: Sequence[int] = [i for i in self.order if i in raised]
        verified.prepared.stopwatch.seconds["search"] = seconds
        return SearchAccount(
            items=len(self.items),
            measurements=self.state.measured,
            compilations=len(self.built) - 1,
            ranking=[self._ranked(i) for i in self.order[:_MOST_REPORTED]],
            raised=[RaisedItem(self.items[i].name, self.alone.get(i)) for i in chosen],
        )

    def _ranked(self, index: int) -> RankedItem:
        item = self.items[index]
        return RankedItem(item.name, item.roles, item.layer, self.alone.get(index))
