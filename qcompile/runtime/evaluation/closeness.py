"""Measures how close two models' outputs are, per sample and without padding.

The cosine is over each sample's whole output (all real tokens), so that there is a mean and a worst
sample. An output with one value per sample (a regression) counts as one vector over all samples,
since the cosine of single numbers is only their sign. SQNR is over all values. R² is that of the
columns that lose most of their spread (``column_spread.py``): it sees what a cosine over columns of
different scale, or over answers far from zero, does not. Flips are samples (rows of a rank-2
output, tokens of a rank-3 output called logits) whose argmax differs; an embedding decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from qcompile.data.feeds import padding_mask
from qcompile.errors import DataError
from qcompile.ir.pooling import EMBEDDING
from qcompile.quant import Array
from qcompile.runtime.evaluation.column_spread import (
    ColumnGroup,
    ColumnSpread,
    lost_spread,
    worst_group,
)
from qcompile.runtime.notebook_table import html_table
from qcompile.runtime.session import Feed, Session
from qcompile.system.json_values import Record, Unbounded, members

FIGURES = "cosine mean", "worst", "R²", "SQNR dB", "max abs", "flips"  # ``Closeness.figures``
# Samples of at most so many values are compared together: there may be millions of them.
_SHORT = 16
_PART = 1 << 18  # values of short samples at a time


@dataclass(frozen=True)
class Gates:
    """Limits on closeness, latency and size. None switches a gate off.

    ``min_single_r2`` is for outputs with one number per sample, ``min_r2`` for others.
    ``min_metric`` is for the user's own measure, ``Options.metric``.
    """

    min_cosine: float | None = 0.98
    min_worst_cosine: float | None = 0.90
    min_sqnr: float | None = None
    max_flips: float | None = None
    max_abs: float | None = None
    max_latency_ratio: float | None = 1.0
    max_size_ratio: float | None = 1.0
    min_metric: float | None = None
    min_r2: float | None = 0.3
    min_single_r2: float | None = 0.9

    def without_defaults(self, *given: str) -> Gates:
        """Accuracy gates off but those ``given``, for a model that need not be close to float."""
        own = {f.name: None for f in fields(self) if f.name not in _SIZE_AND_SPEED}
        return replace(self, **own | {name: getattr(self, name) for name in given})


_SIZE_AND_SPEED = ("max_latency_ratio", "max_size_ratio")


@dataclass
class Closeness(Record):
    """Closeness of one output. ``cosine``: one value per sample, in order; a single value for all
    where each sample has one number (``is_single``), collected in ``single``."""

    name: str
    exact: bool = False  # integers or text, which should be equal
    cosine: list[float] = field(default_factory=list)
    single: list[tuple[float, float]] = field(default_factory=list)
    signal: float = 0.0
    noise: float = 0.0
    max_abs: Unbounded = 0.0
    decisions: int = 0
    flips: int = 0
    columns: ColumnGroup | None = None
    lost_spread: float = 0.0
    is_single: bool = False
    _spread: ColumnSpread = field(default_factory=ColumnSpread, repr=False)

    JSON = members(
        "output=name mean_cosine worst_cosine worst_sample sqnr_db r2 r2_columns "
        "single_number=is_single max_abs flip_share"
    )

    def figures(self) -> tuple[str, ...]:
        """What tables show of it, under the heads ``FIGURES``."""
        return (
            f"{self.mean_cosine:.5f}",
            f"{self.worst_cosine:.5f}",
            "-" if self.r2 is None else f"{self.r2:.4f}",
            f"{self.sqnr_db:.1f}",
            f"{self.max_abs:.3g}",
            "-" if self.flip_share is None else f"{self.flip_share:.2%}",
        )

    @property
    def mean_cosine(self) -> float:
        return float(np.mean(self.cosine)) if self.cosine else 1.0

    @property
    def worst_cosine(self) -> float:
        return float(np.min(self.cosine)) if self.cosine else 1.0

    @property
    def worst_sample(self) -> int:
        """Its index in the data."""
        return int(np.argmin(self.cosine))

    @property
    def sqnr_db(self) -> Unbounded:
        """10 log10 of signal over noise: infinite for equal outputs, -infinite for NaN in one."""
        if self.noise in (0, np.inf):
            return float("-inf" if self.noise else "inf")
        return 10 * float(np.log10(self.signal / self.noise)) if self.signal else 0.0

    @property
    def r2(self) -> float | None:
        """R² of the columns that lose most; None if nothing varies, or there is too little data."""
        return None if self.columns is None else self.columns.r2

    @property
    def r2_columns(self) -> str | None:
        """Which columns ``r2`` is of, in words; None where it is of all."""
        return None if self.columns is None else str(self.columns) or None

    @property
    def error(self) -> float:
        """1 - cosine, the mean over samples, or half of 1 - R², the mean over columns, if more.

        For small errors of outputs with mean zero the two are equal: 2 (1 - cosine) is the energy
        of the error over that of the output.
        """
        return max(1 - self.mean_cosine, self.lost_spread / 2)

    @property
    def flip_share(self) -> float | None:
        """Share of samples or tokens whose argmax differs, None where the output has no argmax."""
        return self.flips / self.decisions if self.decisions else None

    def update(self, reference: Array, candidate: Array, mask: Array | None) -> None:
        """Add one batch of outputs of equal shapes; ``mask``: bool [batch, tokens], real tokens."""
        x, y = np.asarray(reference), np.asarray(candidate)
        rank = x.ndim
        x, y = np.atleast_1d(x), np.atleast_1d(y)
        if x.size == 0:
            return
        # Only [batch, tokens, …]: a pooled output may have as many features as there are tokens.
        if mask is not None and rank >= 3 and x.shape[:2] == mask.shape:
            self._tokens(x, y, mask)
            return
        is_short = x.size // len(x) <= _SHORT
        step = max(_PART // (x.size // len(x)), 1) if is_short else 1
        for start in range(0, len(x), step):
            a, b = (v[start : start + step].astype(np.float64) for v in (x, y))
            if is_short:
                self._short_samples(a.reshape(len(a), -1), b.reshape(len(b), -1))
            else:
                self._sample(a, b)
            self._decide(a, b, rank)
        if not self.exact:
            self._spread.update(x, y)

    def _tokens(self, x: Array, y: Array, mask: Array) -> None:
        """Samples [batch, tokens, …], without padding."""
        for a, b, real in zip(x, y, mask, strict=True):
            a, b = a[real].astype(np.float64), b[real].astype(np.float64)
            if a.size:
                self._sample(a, b)
                self._decide(a, b, x.ndim)
                if not self.exact:
                    self._spread.update(a[None], b[None], rows=1)

    def close(self) -> None:
        """Finish after the last sample."""
        self.is_single = 0 < len(self.single) == len(self.cosine)
        if self.is_single:
            a, b = np.array(self.single).T
            self.cosine = [cosine(a, b)]
        groups = self._spread.groups()
        self.columns, self.lost_spread = worst_group(groups), lost_spread(groups)

    def _sample(self, a: Array, b: Array) -> None:
        self.cosine.append(cosine(a, b))
        if a.size == 1:
            self.single.append((a.item(), b.item()))
        self.signal += float(np.square(a[np.isfinite(a)]).sum())
        if a.size == 0 or np.array_equal(a, b, equal_nan=True):
            return
        finite = np.isfinite(a).all() and np.isfinite(b).all()
        difference = np.abs(a - b) if finite else np.array(np.inf)
        self.noise += float(np.square(difference).sum())
        self.max_abs = max(self.max_abs, float(difference.max()))

    def _short_samples(self, a: Array, b: Array) -> None:
        """Samples [n, values], the same figures as ``_sample`` of one after the other."""
        self.cosine += cosines(a, b).tolist()
        if a.shape[1] == 1:
            self.single += zip(a[:, 0].tolist(), b[:, 0].tolist(), strict=True)
        self.signal = _summed(self.signal, np.square(np.where(np.isfinite(a), a, 0)).sum(1))
        finite = (np.isfinite(a) & np.isfinite(b)).all(1, keepdims=True)
        with np.errstate(invalid="ignore"):  # inf - inf, which is replaced
            difference = np.where(finite, np.abs(a - b), np.inf)
        difference = np.where(_equal(a, b)[:, None], 0, difference)
        self.noise = _summed(self.noise, np.square(difference).sum(1))
        self.max_abs = max(self.max_abs, float(difference.max()))

    def _decide(self, a: Array, b: Array, rank: int) -> None:
        """Count decisions; ``rank``: of the whole output."""
        decides = (rank == 2 and self.name != EMBEDDING) or (rank == 3 and "logits" in self.name)
        if decides and a.shape[-1] > 1:
            best = np.atleast_1d(a.argmax(-1) != b.argmax(-1))
            self.decisions += best.size
            self.flips += int(best.sum())


def cosine(a: Array, b: Array) -> float:
    """Cosine of two flattened arrays; 1 if both are zero, 0 if one is, or one has NaN."""
    a, b = np.ravel(a).astype(np.float64), np.ravel(b).astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return 1.0 if np.array_equal(a, b, equal_nan=True) else 0.0
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    if norm == 0:
        return 1.0 if not a.any() and not b.any() else 0.0
    return float(np.clip(np.dot(a, b) / norm, -1.0, 1.0))


def cosines(a: Array, b: Array) -> Array:
    """The cosine of each row of [n, values], as ``cosine`` has it."""
    finite = np.isfinite(a).all(1) & np.isfinite(b).all(1)
    with np.errstate(invalid="ignore", over="ignore"):  # of rows that are not finite
        norm = np.sqrt((a * a).sum(1)) * np.sqrt((b * b).sum(1))
        found = np.clip((a * b).sum(1) / np.where(norm == 0, 1, norm), -1.0, 1.0)
    found = np.where(norm == 0, ~a.any(1) & ~b.any(1), found)
    return np.where(finite, found, _equal(a, b))


def _equal(a: Array, b: Array) -> Array:
    """Which rows are equal, NaN to NaN too."""
    equal: Array = ((a == b) | (np.isnan(a) & np.isnan(b))).all(1)
    return equal


def _summed(total: float, values: Array) -> float:
    """The total with values added in their order, so that it does not depend on parts."""
    return float(np.add.accumulate(np.append(total, values))[-1])


class NotEmulated(NamedTuple):
    """A node whose saturation is not emulated in the figures, and why."""

    node: str
    reason: str


class _Figures(NamedTuple):
    reference: float
    compiled: float


class MetricFigures(_Figures):
    """The user's metric, of the float model and of the candidate."""

    JSON = members("float=reference compiled")


@dataclass
class Verdict(Record):
    """Closeness per output, and messages of the gates that failed.

    ``metric``: the user's metric, of the float model and of the candidate. ``alone`` and
    ``padded``: worst cosine of the candidate's samples alone against in a batch, and with more
    padding against without; None where not tested. ``sums``: whether the candidate's int8 sums were
    exact, or saturated as on x86 without VNNI; ``by_sums``: both verdicts where they differ, of
    which this is the worse. ``not_emulated``: nodes whose saturation is not included, and why.
    ``session_options``: those of ONNX Runtime for these figures.
    """

    outputs: list[Closeness]
    failures: Annotated[list[str], "gates that were missed"]
    samples: int
    metric: MetricFigures | None = None
    alone: Annotated[float | None, "a sample alone against in its batch"] = None
    padded: Annotated[float | None, "a sample padded further against as it was"] = None
    sums: Annotated[
        str, Literal["exact", "saturating"], "of the integer matrix multiplications measured"
    ] = "exact"
    by_sums: Annotated[
        dict[str, Verdict],
        "both, where outputs differ on x86 without VNNI; the other keys hold the worse",
    ] = field(default_factory=dict)
    not_emulated: Annotated[
        tuple[NotEmulated, ...], "whose saturation is not in the figures, and why"
    ] = ()
    session_options: Annotated[
        dict[str, str], "of ONNX Runtime, set for these figures; docs/processors.md"
    ] = field(default_factory=dict)

    selection: Annotated[str | None, "how outputs behind a selection by values were compared"] = (
        None
    )

    JSON = members(
        "passed samples outputs failures alone_cosine=alone padded_cosine=padded sums "
        "session_options not_emulated by_sums metric? selection?"
    )

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def error(self) -> float:
        """The mean of the outputs' errors."""
        return float(np.mean([o.error for o in self.outputs])) if self.outputs else 0.0

    @property
    def r2(self) -> float | None:
        """The smallest R² of any output, None where none has one."""
        return min((o.r2 for o in self.outputs if o.r2 is not None), default=None)

    @property
    def worst_cosine(self) -> float:
        """The cosine of the worst sample of any output."""
        return min((o.worst_cosine for o in self.outputs), default=1.0)

    @property
    def sqnr_db(self) -> float:
        """The SQNR of the worst output; infinite where all are equal."""
        return min((o.sqnr_db for o in self.outputs), default=float("inf"))

    @property
    def headline(self) -> str:
        """The closeness of the worst output in one line."""
        if not self.outputs:
            return f"equal outputs ({self.samples} samples)"
        mean = min(o.mean_cosine for o in self.outputs)
        return f"cosine {mean:.4f}, worst {self.worst_cosine:.4f} ({self.samples} samples)"

    def __repr__(self) -> str:
        failed = f"{len(self.failures)} gates failed"
        return f"<Verdict {'passed' if self.passed else failed}: {self.headline}>"

    def _repr_html_(self) -> str:
        """One row per output, for notebooks."""
        columns = "output", *FIGURES
        rows = [(o.name, *o.figures()) for o in self.outputs]
        notes = [f"gate failed: {failure}" for failure in self.failures]
        return html_table(f"{self.samples} samples", columns, rows, notes)

    def measured(self, old: float, new: float, gates: Gates) -> None:
        """Add the user's metric of the float model and of the candidate, and check its gate."""
        self.metric = MetricFigures(old, new)
        if gates.min_metric is not None and not new >= gates.min_metric:
            shown = _digits(new, gates.min_metric)
            limit = f"{gates.min_metric:.15g} (--min-metric)"
            self.failures.append(f"metric {shown} is below {limit}, float has {old:.5g}")


def compare_outputs(
    reference: Session, candidate: Session, feeds: Iterable[Feed], gates: Gates
) -> Verdict:
    """Run both models on all feeds. Raises DataError without feeds, or where outputs mismatch."""
    pairs = ((reference.run(feed), candidate.run(feed), feed) for feed in feeds)
    return judge(pairs, gates)


def judge(
    pairs: Iterable[tuple[Mapping[str, Array], Mapping[str, Array], Feed]],
    gates: Gates,
    *,
    padding: bool = False,
) -> Verdict:
    """Verdict over (reference outputs, candidate outputs, feed); ``padding``: padded positions are
    compared too."""
    found: dict[str, Closeness] = {}
    samples = 0
    for old, new, feed in pairs:
        mask = None if padding else padding_mask(dict(feed))
        samples += max((v.shape[0] for v in feed.values() if v.ndim), default=1)
        old, new = tensors(old), tensors(new)
        for name, a in old.items():
            _check_match(name, a, new)
            b = new[name]
            if a.dtype.kind in "OUS":  # text is equal or not
                a, b = np.ones(a.shape), np.equal(a, b)
            found.setdefault(name, Closeness(name, exact=a.dtype.kind != "f")).update(a, b, mask)
    for output in found.values():
        output.close()
    if not any(o.cosine for o in found.values()):
        why = "the data holds no feed or nothing but padding, or the outputs hold no values"
        raise DataError(f"nothing to compare: {why}")
    # Integers and text that are all equal have nothing to report.
    outputs = [o for o in found.values() if o.cosine and not (o.exact and o.noise == 0)]
    return Verdict(outputs, [f for o in outputs for f in _failures(o, gates)], samples)


def tensors(outputs: Mapping[str, Any]) -> dict[str, Array]:
    """Outputs by name, with sequences and maps split: ``y[0]``, ``y[0].values`` by sorted keys.

    Empty optionals and other values without a tensor are left out.
    """
    found: dict[str, Array] = {}
    for name, value in outputs.items():
        if isinstance(value, list):
            found |= tensors({f"{name}[{i}]": v for i, v in enumerate(value)})
        elif isinstance(value, dict):
            keys = sorted(value)
            found[f"{name}.keys"] = np.array([keys])
            found[f"{name}.values"] = np.array([[value[k] for k in keys]])  # one sample
        elif isinstance(value, np.ndarray):
            found[name] = value
    return found


def _check_match(name: str, a: Array, candidate: Mapping[str, Array]) -> None:
    b = candidate.get(name)
    if b is None:
        pooled = f"; --pooling pools the reference too, for {EMBEDDING!r}"
        raise DataError(
            f"output {name!r} of the reference is missing in the candidate, which returns "
            f"{', '.join(map(repr, candidate))}{pooled if EMBEDDING in candidate else ''}"
        )
    if a.shape != b.shape or a.dtype.kind != b.dtype.kind:
        raise DataError(
            f"output {name!r} is {b.dtype}{list(b.shape)}, expected {a.dtype}{list(a.shape)}"
        )


def _failures(output: Closeness, gates: Gates) -> list[str]:
    lower: tuple[tuple[str, float, float | None, str], ...] = (
        ("mean cosine", output.mean_cosine, gates.min_cosine, "--min-cosine"),
        ("worst cosine", output.worst_cosine, gates.min_worst_cosine, "--min-worst-cosine"),
        ("SQNR in dB", output.sqnr_db, gates.min_sqnr, "--min-sqnr"),
    )
    upper = (
        ("share of argmax flips", output.flip_share or 0.0, gates.max_flips, "--max-flips"),
        ("largest difference", output.max_abs, gates.max_abs, "--max-abs"),
    )
    columns = output.columns
    if columns is not None and not columns.is_fine:
        what = "R²" if output.r2_columns is None else f"R² of {output.r2_columns}"
        single = (gates.min_single_r2, "--min-single-r2")
        gate = single if output.is_single else (gates.min_r2, "--min-r2")
        lower = (*lower, (what, columns.r2, *gate))
    found = [
        f"output {output.name!r}: {what} {_digits(value, limit)} is below {limit:.15g} ({flag})"
        for what, value, limit, flag in lower
        if limit is not None and not value >= limit
    ]
    found += [
        f"output {output.name!r}: {what} {_digits(value, limit)} is above {limit:.15g} ({flag})"
        for what, value, limit, flag in upper
        if limit is not None and not value <= limit
    ]
    return found


def _digits(value: float, limit: float) -> str:
    """Five significant digits, or more if needed to show on which side of the limit it is."""

    def side(number: float) -> tuple[bool, bool]:
        return number < limit, number > limit

    texts = (f"{value:.{digits}g}" for digits in range(5, 17))
    return next((text for text in texts if side(float(text)) == side(value)), repr(value))
