"""The output error that each item causes: quantized alone, and left when it alone is lifted.

Errors are those of ``closeness.py``, on held-out feeds against the float model as it came in: the
mean over samples and outputs of 1 - cosine, and the SQNR of the worst output in dB. Leave one out
is the table of Bondarenko et al. 2021, section 3; quantizing one alone is its converse, whose
small errors do not drown in the large error of all others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, Protocol

from qcompile.compiler.search.fake_quantized import FakeQuantizedModel
from qcompile.compiler.search.lift_items import PrecisionCandidate
from qcompile.data.feeds import Feed, sample_count
from qcompile.planning.context import Precision
from qcompile.quant import Array
from qcompile.runtime.evaluation import closeness
from qcompile.runtime.evaluation.closeness import Gates, Verdict
from qcompile.runtime.evaluation.user_metric import Metric, measure
from qcompile.runtime.session import Session, SessionOptions
from qcompile.system.json_values import Record, Unbounded, members

Measure = Literal["both", "alone", "lifted"]
MEASURES: tuple[Measure, ...] = ("both", "alone", "lifted")


@dataclass(frozen=True)
class Score:
    """One run over the feeds with some switches on; cosines are those of the worst output."""

    error: Annotated[float, "mean of 1 - cosine"]
    sqnr_db: Unbounded
    mean_cosine: float
    worst_cosine: float
    metric: float | None = None
    failures: tuple[str, ...] = ()


def score(verdict: Verdict) -> Score:
    """The figures of a verdict."""
    outputs = verdict.outputs
    return Score(
        error=verdict.error,
        sqnr_db=verdict.sqnr_db,
        mean_cosine=min((o.mean_cosine for o in outputs), default=1.0),
        worst_cosine=min((o.worst_cosine for o in outputs), default=1.0),
        metric=None if verdict.metric is None else verdict.metric[1],
        failures=tuple(verdict.failures),
    )


@dataclass(frozen=True)
class SensitivityRow(Record):
    """One item's place: errors None where they were not measured."""

    item: PrecisionCandidate
    alone: Score | None
    lifted: Score | None

    JSON = members(
        "item=item.name roles=item.roles layer=item.layer kind=item.kinds tensors lifts alone "
        "lifted"
    )

    @property
    def error(self) -> float:
        """What ranks: the error when quantized alone; else, negative, the one left when lifted."""
        if self.alone is not None:
            return self.alone.error
        return -self.lifted.error if self.lifted is not None else 0.0

    @property
    def tensors(self) -> int:
        """How many quantized tensors the item has."""
        return len(self.item.switches)

    @property
    def lifts(self) -> dict[str, Precision]:
        """What lifting it asks of a recipe: precision by pattern."""
        return dict(self.item.lifts)


@dataclass
class Meter:
    """Measures any set of switches; ``samples`` cuts the feeds, 0 takes all of them."""

    switched: FakeQuantizedModel
    reference: bytes | Path
    feeds: Sequence[Feed]
    gates: Gates
    metric: Metric | str | None = None
    options: SessionOptions = field(default_factory=SessionOptions)
    divisible: bool = True
    _session: Session | None = None
    _old: dict[int, list[dict[str, Array]]] = field(default_factory=dict)

    @property
    def everything(self) -> frozenset[int]:
        """All switches on: the model as planned."""
        return frozenset(range(len(self.switched.switches)))

    def __call__(self, on: Collection[int], samples: int = 0) -> Score:
        """Quantize what is ``on`` and compare with the float model."""
        feeds = list(cut(self.feeds, samples, self.divisible)) if samples else list(self.feeds)
        if samples not in self._old:
            session = Session(self.reference, self.options)
            self._old[samples] = [session.run(feed) for feed in feeds]
        if self._session is None:
            self._session = Session(self.switched.model, self.options)
        old, settings = self._old[samples], self.switched.settings(on)
        new = [self._session.run({**feed, **settings}) for feed in feeds]
        verdict = closeness.judge(zip(old, new, feeds, strict=True), self.gates)
        if self.metric is not None:
            was, now = measure(self.metric, feeds, old), measure(self.metric, feeds, new)
            verdict.measured(was, now, self.gates)
        return score(verdict)


def cut(feeds: Sequence[Feed], samples: int, divisible: bool) -> Iterator[Feed]:
    """The first feeds, the last of them shortened, until there are so many samples."""
    left = samples
    for feed in feeds:
        if left <= 0:
            return
        count = sample_count(feed)
        even = divisible and all(v.ndim and v.shape[0] == count for v in feed.values())
        yield {k: v[:left] for k, v in feed.items()} if even else feed
        left -= count


class Measures(Protocol):
    """A meter, or what stands before one."""

    @property
    def everything(self) -> frozenset[int]:
        """All switches on."""

    def __call__(self, on: Collection[int], samples: int = 0) -> Score:
        """Quantize what is ``on`` and compare with the float model."""


def rank(
    meter: Measures,
    items: Sequence[PrecisionCandidate],
    what: Measure = "both",
    advance: Callable[[], None] = lambda: None,
) -> list[SensitivityRow]:
    """All items, the most sensitive first."""
    rows = []
    for item in items:
        mine = frozenset(item.switches)
        alone = meter(mine) if what != "lifted" else None
        lifted = meter(meter.everything - mine) if what != "alone" else None
        rows.append(SensitivityRow(item, alone, lifted))
        advance()
    return sorted(rows, key=lambda row: -row.error)


def shortest_prefix(
    count: int, passes: Callable[[int], bool], late: Callable[[], bool] = lambda: False
) -> int:
    """The length of the shortest prefix of a ranking that passes, by bisection.

    All ``count`` of them pass. ``late``: true once there is no time to look any further.
    """
    least_passing, most_missing = count, 0
    while least_passing - most_missing > 1 and not late():
        middle = (most_missing + least_passing) // 2
        if passes(middle):
            least_passing = middle
        else:
            most_missing = middle
    return least_passing
