"""What an interrupted run leaves is taken over, whole or not at all; the bytes stay the same."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar, Literal

import numpy as np
import pytest

import qcompile
from qcompile import Gates, Options, Recipe
from qcompile.calibration.collector import Collector
from qcompile.compiler.search.sensitivity import Meter, Score
from qcompile.data.feeds import Feed
from qcompile.data.open_data import Data
from qcompile.errors import DataError
from qcompile.ir.model_io.to_proto import serialize
from qcompile.quant import Array, Calibrator, Observer, QSpec, Range
from qcompile.rewriting.testing import encoder
from qcompile.system.resume_cache import Cache, default_folder, key_of

OPEN = Gates(min_cosine=None, min_worst_cosine=None, min_r2=None, max_latency_ratio=None)
CALIBRATORS = ["minmax", "moving-average", "percentile", "entropy", "mse"]


def feeds(count: int = 8, seed: int = 3) -> list[dict[str, Array]]:
    """Batches of two lengths, some with padding."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        mask = np.ones((4, 7 - i % 2), np.int64)
        mask[0, 5:] = i % 3
        made.append({"ids": rng.integers(0, 64, mask.shape), "attention_mask": np.minimum(mask, 1)})
    return made


@pytest.fixture(scope="module")
def model() -> bytes:
    return serialize(encoder(1, width=16, outlier=40.0))


def options(cache: Cache | None, **more: object) -> Options:
    given = {"verify": False, "bench": False, "threads": 1, **more}
    return Options(cache=cache, **given)  # type: ignore[arg-type]


def compiled(
    model: bytes,
    cache: Cache | None,
    recipe: Recipe | None = None,
    data: Data | None = None,
    **more: object,
) -> qcompile.Result:
    given = options(cache, **more)
    found = feeds() if data is None else data
    return qcompile.compile(model, found, recipe=recipe or Recipe(), gates=OPEN, options=given)


def interrupt_after(monkeypatch: pytest.MonkeyPatch, updates: int) -> None:
    """The collector is interrupted in the middle of a feed, once."""
    original, seen = Collector.update, list[int]()

    def update(self: Collector, feed: Feed) -> None:
        seen.append(1)
        if len(seen) == updates + 1:
            self._observe(self.taps[0], [np.zeros((1, 1), np.float32)])  # half a feed
            raise KeyboardInterrupt
        original(self, feed)

    monkeypatch.setattr(Collector, "update", update)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each feed that calibration ran."""
    original, seen = Collector.update, list[int]()

    def update(self: Collector, feed: Feed) -> None:
        seen.append(1)
        original(self, feed)

    monkeypatch.setattr(Collector, "update", update)
    return seen


def kinds(cache: Cache) -> list[str]:
    return sorted(p.name.partition("-")[0] for p in cache.folder.iterdir())


# ---- calibration


@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_calibration_goes_on_at_the_checkpoint(
    model: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibrator: str
) -> None:
    recipe = Recipe(calibrator=calibrator)
    whole = compiled(model, None, recipe).model
    cache = Cache(tmp_path, every=0)
    with monkeypatch.context() as patched:
        interrupt_after(patched, 3)
        with pytest.raises(KeyboardInterrupt):
            compiled(model, cache, recipe)
    assert kinds(cache) == ["partial"]
    later = Cache(tmp_path, every=0)
    made = compiled(model, later, recipe)
    assert made.model == whole
    assert any("continued after 3 feeds" in note for note in made.report.note_texts)
    assert made.report.to_dict()["calibration"]["feeds"] == 7 and kinds(later) == ["calibration"]


def test_finished_calibration_is_taken_over(model: bytes, tmp_path: Path, runs: list[int]) -> None:
    whole = compiled(model, Cache(tmp_path))
    assert len(runs) == 7 and not any("earlier run" in n for n in whole.report.note_texts)
    again = compiled(model, Cache(tmp_path), keep_calibration=True)
    assert len(runs) == 7 and again.model == whole.model
    assert any("taken from an earlier run" in note for note in again.report.note_texts)
    assert again.report.calibration == whole.report.calibration
    assert again.lock is not None and again.lock.data is not None


def test_forget_removes_what_the_run_touched_and_no_more(model: bytes, tmp_path: Path) -> None:
    other = Cache(tmp_path)
    compiled(model, other, Recipe(calibrator="mse"))
    cache = Cache(tmp_path)
    compiled(model, cache)
    assert len(kinds(cache)) == 2
    halves = {path: path.with_name(f".{path.name}.x1y2") for path in tmp_path.iterdir()}
    for half in halves.values():  # as SIGKILL leaves them
        half.write_bytes(b"x")
    cache.forget()
    left = {path for path in halves if path.exists()}
    assert len(left) == 1
    assert {path for path, half in halves.items() if half.exists()} == left


def test_what_calibration_depends_on_is_in_the_key(
    model: bytes, tmp_path: Path, runs: list[int]
) -> None:
    other = feeds(seed=9)
    changes: dict[str, Callable[[Cache], object]] = {
        "model": lambda c: compiled(serialize(encoder(1, width=16, outlier=41.0)), c),
        "calibration data": lambda c: compiled(model, c, data=[*feeds()[:7], other[0]]),
        "held-back data": lambda c: compiled(model, c, data=[feeds()[0], other[0], *feeds()[2:]]),
        "calibrator": lambda c: compiled(model, c, Recipe(calibrator="moving-average")),
        "padding": lambda c: compiled(model, c, Recipe(mask_padding=False)),
        "plan": lambda c: compiled(model, c, Recipe(keep_float=("wh0",))),
        "watched": lambda c: compiled(model, c, Recipe(transforms="none")),
        "threads": lambda c: compiled(model, c, threads=2),
        "memory": lambda c: compiled(model, c, max_memory=1 << 20),
    }
    compiled(model, Cache(tmp_path))
    for name, change in changes.items():
        before = len(runs)
        change(Cache(tmp_path))
        assert len(runs) == before + 7, name


def test_versions_are_in_the_key(
    model: bytes, tmp_path: Path, runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled(model, Cache(tmp_path))
    monkeypatch.setattr(
        "qcompile.compiler.stages.calibrate.environment", lambda: {"onnxruntime": "0"}
    )
    compiled(model, Cache(tmp_path))
    assert len(runs) == 14


@pytest.mark.parametrize("damage", [b"", b"no zip", None])
def test_damaged_entries_are_ignored_with_a_note(
    model: bytes, tmp_path: Path, runs: list[int], damage: bytes | None
) -> None:
    whole = compiled(model, Cache(tmp_path)).model
    (entry,) = tmp_path.iterdir()
    data = entry.read_bytes()
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    entry.write_bytes(flipped if damage is None else damage)
    made = compiled(model, Cache(tmp_path))
    assert made.model == whole and len(runs) == 14
    assert any("damaged entry of the cache is ignored" in note for note in made.report.note_texts)
    assert compiled(model, Cache(tmp_path)).model == whole and len(runs) == 14  # it was replaced


def test_a_checkpoint_that_does_not_fit_is_ignored(
    model: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def foreign(*_: object) -> None:
        raise DataError("a checkpoint of calibration does not fit: it is of other tensors")

    whole = compiled(model, None).model
    with monkeypatch.context() as patched:
        interrupt_after(patched, 3)
        with pytest.raises(KeyboardInterrupt):
            compiled(model, Cache(tmp_path, every=0))
    monkeypatch.setattr("qcompile.calibration.resume.restore", foreign)
    made = compiled(model, Cache(tmp_path))
    assert made.model == whole and made.report.to_dict()["calibration"]["feeds"] == 7
    assert any("ignored: a checkpoint" in note for note in made.report.note_texts)


def test_data_that_can_be_read_once_is_not_kept(model: bytes, tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert compiled(model, cache, data=iter(feeds())).model == compiled(model, None).model
    assert not list(tmp_path.iterdir())


class Sum(Observer):
    """Keeps no state."""

    def __init__(self) -> None:
        self.seen = 0.0

    def update(self, values: Array) -> None:
        self.seen = max(self.seen, float(np.abs(values).max()))

    def merge(self, later: Observer) -> None:
        assert isinstance(later, Sum)
        self.seen = max(self.seen, later.seen)

    def range(self) -> Range:
        return Range(np.array(-self.seen), np.array(self.seen))


@dataclass(frozen=True)
class Foreign(Calibrator):
    name: ClassVar[str] = "foreign"
    needs: ClassVar[Literal["extrema", "values"]] = "extrema"

    def observer(self, spec: QSpec) -> Observer:
        return Sum()


def test_observers_without_state_are_kept_when_finished_only(
    model: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recipe, "make_calibrator", lambda self: Foreign())
    whole = compiled(model, None).model
    with monkeypatch.context() as patched:
        interrupt_after(patched, 3)
        with pytest.raises(KeyboardInterrupt):
            compiled(model, Cache(tmp_path, every=0))
    assert not list(tmp_path.iterdir())
    assert compiled(model, Cache(tmp_path, every=0)).model == whole
    assert compiled(model, Cache(tmp_path, every=0)).model == whole
    with pytest.raises(ValueError, match="Sum keeps no state"):
        Sum().restore({})


# ---- sensitivity


def test_measurements_are_taken_over(
    model: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ranked(cache: Cache | None, data: list[dict[str, Array]] | None = None) -> object:
        recipe = Recipe(target="qdq", transforms="none")
        return qcompile.sensitivity(
            model, data or feeds(), recipe=recipe, gates=OPEN, options=options(cache)
        ).to_dict()

    original, seen = Meter.__call__, list[int]()

    def measured(self: Meter, on: Collection[int], samples: int = 0) -> Score:
        if len(seen) == 9:
            raise KeyboardInterrupt
        seen.append(1)
        return original(self, on, samples)

    whole = ranked(None)
    with monkeypatch.context() as patched:
        patched.setattr(Meter, "__call__", measured)
        with pytest.raises(KeyboardInterrupt):
            ranked(Cache(tmp_path))
    assert kinds(Cache(tmp_path)) == ["calibration", "search"]
    counted = list[int]()

    def count(self: Meter, on: Collection[int], samples: int = 0) -> Score:
        counted.append(1)
        return original(self, on, samples)

    monkeypatch.setattr(Meter, "__call__", count)
    assert ranked(Cache(tmp_path)) == whole
    first = len(counted)
    other = [*feeds()[:7], feeds(seed=9)[0]]  # calibrates: a measurement depends on it
    ranked(Cache(tmp_path), other)
    assert len(counted) - first == first + 9


# ---- the folder


def test_the_oldest_entries_go_first(tmp_path: Path) -> None:
    def store(cache: Cache, kind: str, key: str, size: int) -> None:
        def write(file: IO[bytes]) -> None:
            file.write(b"x" * size)

        cache.store(kind, key * 32, write)

    for i in range(4):
        cache = Cache(tmp_path)
        store(cache, "calibration", str(i), 100)
        os.utime(cache.path("calibration", str(i) * 32), (i, i))
    half = tmp_path / ".calibration-half.npz.abc"  # of a run that was killed while it wrote
    half.write_bytes(b"x" * 100)
    os.utime(half, (0, 0))
    (tmp_path / "precious").write_bytes(b"x" * 1000)
    store(Cache(tmp_path, limit=250), "search", "5", 50)
    left = {p.name[:13] for p in tmp_path.iterdir()}
    assert left == {"calibration-2", "calibration-3", "search-555555", "precious"}


def test_a_folder_that_cannot_be_written_is_a_note(model: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "cache")
    made = compiled(model, cache)
    assert any("nothing is kept for a run after" in note for note in made.report.note_texts)
    assert len(cache.notes) == 1


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "qcompile"


def test_keys() -> None:
    assert key_of([1, {"a": 2, "b": 3}]) == key_of([1, {"b": 3, "a": 2}])
    assert len({key_of([1]), key_of(["1"]), key_of([1, 1]), key_of([None])}) == 4
