"""The output error that each item causes: if it alone is quantized, and if it alone is raised.

Errors are those of ``closeness.py``, on held-out feeds against the float model as it came in: the
mean over samples and outputs of 1 - cosine, and the SQNR of the worst output in dB. Raising one
item alone is the leave-one-out table of Bondarenko et al. 2021, section 3; quantizing one alone is
its converse, whose small errors are not hidden by the large error of all others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Protocol

from qcompile.compiler.search.fake_quantized import FakeQuantizedModel, FakeQuantSwitch
from qcompile.compiler.search.precision_candidates import PrecisionCandidate
from qcompile.data.feeds import Feed, sample_count
from qcompile.planning.context import Precision
from qcompile.quant import Array
from qcompile.runtime.evaluation import closeness
from qcompile.runtime.evaluation.closeness import Gates, Verdict
from qcompile.runtime.evaluation.compared_outputs import (
    ComparedModels,
    Selection,
    compared_models,
)
from qcompile.runtime.evaluation.user_metric import Metric, measure
from qcompile.runtime.session import Session, SessionOptions
from qcompile.system.json_values import Record, Unbounded, members

Measure = Literal["both", "alone", "lifted"]
MEASURES: tuple[Measure, ...] = ("both", "alone", "lifted")


@dataclass(frozen=True)
class Score:
    """One run over the feeds with some switches on; cosines are those of the worst output."""

    error: Annotated[float, "1 - cosine, or half of 1 - R² if that is more"]
    sqnr_db: Unbounded
    mean_cosine: float
    worst_cosine: float
    metric: float | None = None
    failures: tuple[str, ...] = ()
    r2: Annotated[float | None, "of the columns that lose most of their spread"] = None


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
        r2=verdict.r2,
    )


@dataclass(frozen=True)
class SensitivityRow(Record):
    """One item of a ranking; scores are None where they were not measured.

    ``alone``: only this item quantized. ``raised``: everything quantized except this item.
    """

    item: PrecisionCandidate
    alone: Score | None
    raised: Score | None

    JSON = members(
        "item=item.name roles=item.roles layer=item.layer kind=item.kinds tensors "
        "lifts=raised_precision alone lifted=raised"
    )

    @property
    def error(self) -> float:
        """The sort key: the error quantized alone, or minus the error left when raised alone."""
        if self.alone is not None:
            return self.alone.error
        return -self.raised.error if self.raised is not None else 0.0

    @property
    def tensors(self) -> int:
        """How many quantized tensors the item has."""
        return len(self.item.switches)

    @property
    def raised_precision(self) -> dict[str, Precision]:
        """What a recipe needs to raise the item: precision by pattern."""
        return dict(self.item.raised)


@dataclass
class Meter:
    """Measures any set of switches; ``samples`` limits the feeds, 0 uses all of them.

    ``padding``: padded positions are compared too. ``external``: files of ``reference`` with its
    weights, where it is a file.
    """

    model: FakeQuantizedModel
    reference: bytes | Path
    feeds: Sequence[Feed]
    gates: Gates
    metric: Metric | str | None = None
    options: SessionOptions = field(default_factory=SessionOptions)
    divisible: bool = True
    selection: Selection | None = None
    padding: bool = False
    external: Sequence[Path] = ()
    _session: Session | None = None
    _old: dict[int, list[dict[str, Array]]] = field(default_factory=dict)

    @cached_property
    def _models(self) -> ComparedModels:
        return compared_models(self.selection, self.reference, self.model.proto)

    @property
    def everything(self) -> frozenset[int]:
        """All switches on: the model as planned."""
        return frozenset(range(len(self.model.switches)))

    def without_models(self) -> Meter:
        """The same settings and feeds; as many switches, without what they stand for."""
        switches = tuple(FakeQuantSwitch(()) for _ in self.model.switches)
        model = FakeQuantizedModel(switches, flags=self.model.flags)
        return replace(self, model=model, reference=b"", external=(), _session=None, _old={})

    def __call__(self, on: Collection[int], samples: int = 0) -> Score:
        """Quantize what is ``on`` and compare with the float model."""
        feeds = list(self.feeds)
        if samples:
            feeds = list(first_samples(feeds, samples, self.divisible))
        models = self._models
        if samples not in self._old:
            session = Session(models.reference, self.options)
            self._old[samples] = [session.run(feed) for feed in feeds]
        if self._session is None:
            self._session = Session(models.candidate, self.options)
        old, settings = self._old[samples], self.model.settings(on)
        pairs = zip(feeds, old, strict=True)
        fed = [{**models.feed(*pair), **settings} for pair in pairs]
        new = [models.named(self._session.run(feed)) for feed in fed]
        compared = zip(old, new, feeds, strict=True)
        verdict = closeness.judge(compared, self.gates, padding=self.padding)
        if self.metric is not None:
            before, after = measure(self.metric, feeds, old), measure(self.metric, feeds, new)
            verdict.measured(before, after, self.gates)
        return score(verdict)


def first_samples(feeds: Sequence[Feed], samples: int, divisible: bool) -> Iterator[Feed]:
    """The first feeds that hold ``samples`` samples; the last one is sliced if its batch allows."""
    remaining = samples
    for feed in feeds:
        if remaining <= 0:
            return
        count = sample_count(feed)
        can_slice = divisible and all(v.ndim and v.shape[0] == count for v in feed.values())
        yield {k: v[:remaining] for k, v in feed.items()} if can_slice else feed
        remaining -= count


class Measures(Protocol):
    """A meter, or the store of measurements that wraps one."""

    @property
    def everything(self) -> frozenset[int]:
        """All switches on."""

    def __call__(self, on: Collection[int], samples: int = 0) -> Score:
        """Quantize what is ``on`` and compare with the float model."""

    def each(self, sets: Sequence[Collection[int]], samples: int = 0) -> Generator[Score]:
        """The score of each set of switches, in their order; all workers measure."""


def rank_candidates(
    meter: Measures,
    items: Sequence[PrecisionCandidate],
    what: Measure = "both",
    advance: Callable[[], None] = lambda: None,
) -> list[SensitivityRow]:
    """All items, the most sensitive first."""
    sets: list[frozenset[int]] = []
    for item in items:
        mine = frozenset(item.switches)
        sets += [mine] if what != "lifted" else []
        sets += [meter.everything - mine] if what != "alone" else []
    rows = []
    with closing(meter.each(sets)) as scores:
        for item in items:
            alone = next(scores) if what != "lifted" else None
            raised = next(scores) if what != "alone" else None
            rows.append(SensitivityRow(item, alone, raised))
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
