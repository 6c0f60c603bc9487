"""Laws that every calibrator in the package obeys, and proof that the check of them can fail."""

from __future__ import annotations

import importlib
import inspect
import pickle
import pkgutil
import runpy
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qcompile.calibrators
from qcompile.calibrators._extrema import ExtremaObserver
from qcompile.calibrators.minmax import MinMax
from qcompile.calibrators.moving_average import MovingAverage, MovingAverageObserver
from qcompile.calibrators.percentile import Percentile
from qcompile.quant import Array, Calibrator, Floats, Observer, QSpec, Range

SPECS = [
    QSpec("uint8", symmetric=False),
    QSpec("int8", symmetric=True),
    QSpec("int8", symmetric=False, granularity="channel", axis=-1),
]
CHANNELS = 2
BATCHES = [np.array(b, np.float32) for b in ([1, 2, 3], [-4, 8], [0.5], [-6, 1, 7, 2])]
QUIET = settings(deadline=None, derandomize=True, max_examples=50)

# Order matters to these, and they average: grouping shows in the last bits of a float64.
ORDERED = {"moving-average": 1e-6}


def discovered() -> list[type[Calibrator]]:
    """Every calibrator class that a module of the package defines."""
    found: list[type[Calibrator]] = []
    for info in pkgutil.iter_modules(qcompile.calibrators.__path__, "qcompile.calibrators."):
        module = importlib.import_module(info.name)
        for item in vars(module).values():
            local = inspect.isclass(item) and item.__module__ == module.__name__
            if local and issubclass(item, Calibrator) and not inspect.isabstract(item):
                found.append(item)
    return sorted(found, key=lambda c: c.name)


def small(kind: type[Calibrator]) -> Calibrator:
    """The calibrator with default options, but few bins: searches are then fast."""
    options: dict[str, Any] = {"bins": 256} if "bins" in {f.name for f in fields(kind)} else {}  # type: ignore[arg-type]
    return kind(**options)


def observed(calibrator: Calibrator, spec: QSpec, batches: Sequence[Array]) -> Observer:
    observer = calibrator.observer(spec)
    for batch in batches:
        observer.update(batch)
    return observer


def merged(*observers: Observer) -> Observer:
    """All merged in order into a copy of the first, as after a trip between processes."""
    total: Observer = pickle.loads(pickle.dumps(observers[0]))
    for later in observers[1:]:
        total.merge(later)
    return total


def bounds(observer: Observer) -> Array:
    span = observer.range()
    return np.stack([span.lo, span.hi])


def violations(
    calibrator: Calibrator, spec: QSpec, batches: Sequence[Array], cut: int, tolerance: float = 0
) -> list[str]:
    """The laws of Observer that do not hold; ``batches`` hold a value at least.

    ``cut`` splits the batches in two. ``tolerance`` is relative to the largest magnitude seen; 0
    means equal bytes.
    """
    left, right = batches[:cut], batches[cut:]
    seen = np.concatenate(batches)
    whole = bounds(observed(calibrator, spec, batches))
    within = tolerance * float(np.abs(seen).max())
    parts = [observed(calibrator, spec, [b]) for b in batches]
    second = observed(calibrator, spec, right)
    before = pickle.dumps(second)
    nothing = calibrator.observer(spec)

    def same(observer: Observer) -> bool:
        try:
            other = bounds(observer)
        except ValueError:
            return False
        return other.tobytes() == whole.tobytes() or bool((np.abs(other - whole) < within).all())

    halves = merged(observed(calibrator, spec, left), second)
    laws = {
        "merging two parts in order sees what one observer sees": same(halves),
        "grouping to the left makes no difference": same(merged(*parts)),
        "grouping to the right makes no difference": same(
            merged(*parts[:cut], merged(nothing, *parts[cut:]))
        ),
        "an empty observer before changes nothing": same(merged(nothing, *parts)),
        "an empty observer after changes nothing": same(merged(*parts, nothing)),
        "merging keeps the later observer": pickle.dumps(second) == before,
        "the range is one per channel": whole.shape == (2, *seen.shape[1:]),
        "the range lies within the values": bool(
            (seen.min(axis=0) <= whole[0]).all() and (whole[1] <= seen.max(axis=0)).all()
        ),
        "asking for the range changes nothing": _keeps_range(observed(calibrator, spec, batches)),
        "an empty observer has no range": _refuses(nothing),
        "a restored observer goes on where the other was": bounds(
            _restored(calibrator, spec, left, right)
        ).tobytes()
        == whole.tobytes(),
    }
    if calibrator.needs == "extrema":
        extrema = [np.stack([b.min(axis=0), b.max(axis=0)]) if len(b) else b for b in batches]
        laws["extrema suffice"] = same(observed(calibrator, spec, extrema))
    return [law for law, holds in laws.items() if not holds]


def _restored(
    calibrator: Calibrator, spec: QSpec, left: Sequence[Array], right: Sequence[Array]
) -> Observer:
    """A fresh observer that takes over what another saw of the left, and sees the right."""
    resumed, state = calibrator.observer(spec), observed(calibrator, spec, left).state()
    assert state is not None
    resumed.restore(state)
    for batch in right:
        resumed.update(batch)
    return resumed


def _keeps_range(observer: Observer) -> bool:
    return bounds(observer).tobytes() == bounds(observer).tobytes()


def _refuses(empty: Observer) -> bool:
    try:
        empty.range()
    except ValueError as e:
        return str(e) == "no values seen"
    return False


FLOATS = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-4, 4, width=32),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, 1e-45, -1e-45, 65504.0]),
)


@st.composite
def batched(draw: st.DrawFn, channels: int) -> list[Floats]:
    """Batches of different lengths, some empty, not all; values of all magnitudes."""
    rows = st.lists(FLOATS, min_size=channels, max_size=channels)
    drawn = draw(st.lists(st.lists(rows, max_size=8), min_size=1, max_size=5))
    drawn.append(draw(st.lists(rows, min_size=1, max_size=8)))
    return [np.array(b, np.float32).reshape(-1, channels) for b in drawn]


def test_all_five_are_discovered() -> None:
    names = [kind.name for kind in discovered()]
    assert names == ["entropy", "minmax", "moving-average", "mse", "percentile"]
    for kind in discovered():
        assert kind.__module__ == f"qcompile.calibrators.{kind.name.replace('-', '_')}"


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("kind", discovered(), ids=lambda kind: kind.name)
@given(data=st.data())
@QUIET
def test_laws_hold(kind: type[Calibrator], spec: QSpec, data: st.DataObject) -> None:
    batches = data.draw(batched(CHANNELS if spec.axis else 1))
    if spec.axis is None:
        batches = [b.ravel() for b in batches]
    cut = data.draw(st.integers(0, len(batches) - 1))
    assert violations(small(kind), spec, batches, cut, ORDERED.get(kind.name, 0)) == []


@pytest.mark.parametrize("kind", [k for k in discovered() if k.name not in ORDERED])
@given(data=st.data())
@QUIET
def test_only_the_multiset_of_values_counts(kind: type[Calibrator], data: st.DataObject) -> None:
    values = np.concatenate(data.draw(batched(1))).ravel()
    mixed = np.array(data.draw(st.permutations(values.tolist())), np.float32)
    calibrator, spec = small(kind), SPECS[0]
    one, other = observed(calibrator, spec, [values]), observed(calibrator, spec, list(mixed))
    assert bounds(one).tobytes() == bounds(other).tobytes()


@pytest.mark.parametrize("kind", discovered(), ids=lambda kind: kind.name)
@given(data=st.data())
@QUIET
def test_a_channel_is_a_tensor_of_its_own(kind: type[Calibrator], data: st.DataObject) -> None:
    batches = data.draw(batched(CHANNELS))
    per_tensor, per_channel = QSpec("int8", False), SPECS[2]
    together = bounds(observed(small(kind), per_channel, batches))
    for c in range(CHANNELS):
        alone = bounds(observed(small(kind), per_tensor, [b[:, c] for b in batches]))
        assert alone.tobytes() == together[:, c].tobytes()


@pytest.mark.parametrize("spec", SPECS[:2], ids=str)
@pytest.mark.parametrize("kind", discovered(), ids=lambda kind: kind.name)
def test_zero_has_one_sign(kind: type[Calibrator], spec: QSpec) -> None:
    for drawn in ([-0.0], [0.0], [-0.0, 0.0]):
        found = bounds(observed(kind(), spec, [np.array(drawn, np.float32)]))
        assert found.tobytes() == np.zeros(2).tobytes()


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("kind", discovered(), ids=lambda kind: kind.name)
def test_memory_does_not_grow(kind: type[Calibrator], spec: QSpec) -> None:
    rng = np.random.default_rng(0)
    observer = kind().observer(spec)
    sizes = []
    for scale in (1, 1e-3, 1e9, 1, 1):
        values = rng.standard_normal((500, CHANNELS)) * scale
        observer.update(values if spec.axis else values.ravel())
        sizes.append(len(pickle.dumps(observer)))
    assert max(sizes) <= sizes[0] + 64  # integers get longer
    assert sizes[0] < 80_000


@pytest.mark.parametrize("kind", discovered(), ids=lambda kind: kind.name)
def test_wrong_values_are_refused_and_leave_no_trace(kind: type[Calibrator]) -> None:
    observer = kind().observer(SPECS[2])
    observer.update(np.ones((3, CHANNELS)))
    before = pickle.dumps(observer)
    for values, message in [
        (np.array([[1.0, np.nan]]), "NaN or infinity"),
        (np.array([[1.0, -np.inf]]), "NaN or infinity"),
        (np.array([[1.0, 1e300]]), "NaN or infinity"),
        (np.ones(4), r"found values of shape \(4,\), expected \(n, channels\)"),
        (np.ones((2, CHANNELS + 1)), "found 3 channels, expected 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            observer.update(values)
    with pytest.raises(ValueError, match="found 3 channels"):
        observer.merge(observed(kind(), SPECS[2], [np.ones((1, 3))]))
    assert pickle.dumps(observer) == before


def test_merge_refuses_other_kinds_options_and_specs() -> None:
    percentile = Percentile(99.0).observer(SPECS[0])
    for later, message in [
        (MinMax().observer(SPECS[0]), "found ExtremaObserver, expected HistogramObserver"),
        (Percentile(99.5).observer(SPECS[0]), r"found Percentile\(percentile=99.5.*99.0"),
        (Percentile(99.0, bins=512).observer(SPECS[0]), "bins=512.*bins=8192"),
        (Percentile(99.0).observer(SPECS[1]), "int8:sym:tensor.*uint8:asym:tensor"),
    ]:
        with pytest.raises(ValueError, match=message):
            percentile.merge(later)
    with pytest.raises(ValueError, match="found Percentile"):
        MinMax().observer(SPECS[0]).merge(percentile)


@pytest.mark.parametrize("kind", discovered(), ids=lambda k: k.name)
def test_a_state_of_another_kind_is_refused(kind: type[Calibrator]) -> None:
    observer = small(kind).observer(SPECS[0])
    state = observed(small(kind), SPECS[0], BATCHES).state()
    assert state is not None
    for name, values in state.items():
        with pytest.raises(ValueError, match=f"{name} is"):
            observer.restore({**state, name: values[None]})
        with pytest.raises(KeyError):
            observer.restore({k: v for k, v in state.items() if k != name})


def test_the_folder_cannot_be_imported_as_a_package_of_its_own() -> None:
    init = Path(qcompile.calibrators.__path__[0]) / "__init__.py"
    with pytest.raises(ImportError, match="not as 'calibrators'"):
        runpy.run_path(str(init), run_name="calibrators")


NOTHING: Floats = np.empty(0, np.float32)


class Forgetful(ExtremaObserver):
    """Broken: takes nothing from a later observer."""

    def merge(self, later: Observer) -> None:
        self._same_kind(later)


class Draining(ExtremaObserver):
    """Broken: empties what it merges."""

    def merge(self, later: Observer) -> None:
        super().merge(later)
        other = self._same_kind(later)
        other.lo = other.hi = NOTHING


class Inventive(ExtremaObserver):
    """Broken: has a range without having seen anything."""

    def range(self) -> Range:
        return Range(np.zeros(()), np.zeros(())) if self.empty else super().range()


class Generous(ExtremaObserver):
    """Broken: widens the range beyond the values."""

    def _bounds(self) -> tuple[Array, Array]:
        return self.lo - 1, self.hi + 1


class Counting(ExtremaObserver):
    """Broken: its result depends on how many values there were, so extrema do not suffice."""

    def _record(self, columns: Floats, lo: Floats, hi: Floats) -> None:
        self.count = getattr(self, "count", 0) + len(columns)

    def _absorb(self, later: Counting) -> None:
        self.count = getattr(self, "count", 0) + later.count

    def _bounds(self) -> tuple[Array, Array]:
        return self.lo, self.lo + (self.hi - self.lo) / self.count


class Impatient(ExtremaObserver):
    """Broken: the range shrinks each time it is asked for."""

    def _bounds(self) -> tuple[Array, Array]:
        self.hi = (self.lo + self.hi) / np.float32(2)
        return self.lo, self.hi


class Backwards(MovingAverageObserver):
    """Broken: merges the later part as if it had come before."""

    def _absorb(self, later: Backwards) -> None:
        mine = (self.batches, self.total, self.first)
        self.batches, self.total, self.first = later.batches, later.total, later.first
        self._append(*mine)


class Unweighted(MovingAverageObserver):
    """Broken: merges averages as if the later part were one batch."""

    def _append(self, batches: int, total: Array, first: Array) -> None:
        super()._append(min(batches, 1), total, first)


class Amnesiac(MovingAverageObserver):
    """Broken: its state lacks what averages are made of."""

    state_fields = ExtremaObserver.state_fields


@dataclass(frozen=True)
class Broken(Calibrator):
    """Hands out a broken observer."""

    kind: type[ExtremaObserver]

    name: ClassVar[str] = "broken"
    needs: ClassVar[Literal["extrema", "values"]] = "extrema"
    momentum: ClassVar[float] = 0.9

    def observer(self, spec: QSpec) -> Observer:
        return self.kind(self, spec)


@pytest.mark.parametrize(
    ("kind", "law"),
    [
        (Forgetful, "merging two parts in order sees what one observer sees"),
        (Draining, "merging keeps the later observer"),
        (Inventive, "an empty observer has no range"),
        (Generous, "the range lies within the values"),
        (Counting, "extrema suffice"),
        (Impatient, "asking for the range changes nothing"),
        (Backwards, "merging two parts in order sees what one observer sees"),
        (Amnesiac, "a restored observer goes on where the other was"),
        (Unweighted, "merging two parts in order sees what one observer sees"),
    ],
)
def test_broken_observers_are_caught(kind: type[ExtremaObserver], law: str) -> None:
    assert law in violations(Broken(kind), SPECS[0], BATCHES, 2, tolerance=1e-6)


@pytest.mark.parametrize("calibrator", [Broken(ExtremaObserver), MovingAverage()])
def test_sound_observers_pass_the_same_check(calibrator: Calibrator) -> None:
    assert violations(calibrator, SPECS[0], BATCHES, 2, tolerance=1e-6) == []
