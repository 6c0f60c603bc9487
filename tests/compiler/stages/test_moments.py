"""Second moments in a whole compilation: what is counted, and that they survive what ranges do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qcompile
from qcompile import Gates, Options, Recipe
from qcompile.calibration import calibration_file
from qcompile.calibration.collector import Collector
from qcompile.compiler.stages.result import Result
from qcompile.data.feeds import Feed
from qcompile.data.open_data import SENTENCES
from qcompile.ir import Graph
from qcompile.passes.transform.round_weights import RoundWeights
from qcompile.planning import Context, linear_groups
from qcompile.quant import ChannelStats
from qcompile.system.resume_cache import Cache
from tests.compiler.model_folder.written_folder import write_folder, write_text

OPEN = Gates(None, None, min_r2=None, max_latency_ratio=None, max_size_ratio=None)
PLAIN = Recipe(transforms="round-weights")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "in")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments are all that passes ask for, as if all weights had few bits."""

    def wants(self: RoundWeights, graph: Graph, ctx: Context) -> Iterable[str]:
        return (site.data for site in linear_groups(graph, ctx))

    monkeypatch.setattr(RoundWeights, "wants", lambda *_: ())
    monkeypatch.setattr(RoundWeights, "wants_moments", wants)


def compiled(folder: Path, text: Path | None, recipe: Recipe | Path = PLAIN, **more: Any) -> Result:
    given = {"bench": False, "verify": False, "threads": 1, "keep_calibration": True, **more}
    options = Options(tokenizer=folder, **given)
    source, data = folder / "model.onnx", None if text is None else str(text)
    return qcompile.compile(source, data, recipe=recipe, gates=OPEN, options=options)


def channels(result: Result, folder: Path) -> dict[str, ChannelStats]:
    """As a lock keeps them."""
    file = folder.with_name("m.lock.yaml")
    result.save_lock(file)
    return calibration_file.read_calibration(file.with_suffix(".npz")).channels


def test_nothing_is_added_up_where_weights_have_8_bits(folder: Path, text: Path) -> None:
    found = channels(compiled(folder, text), folder)
    assert len(found) == 2 and all(s.moments is None for s in found.values())


@pytest.mark.usefixtures("asked")
def test_general_text_is_run_for_moments_alone_and_can_be_left_out(
    folder: Path, text: Path
) -> None:
    """A row is a token: those of the data, and those of the text that comes with qcompile."""
    own, all_text = (
        channels(compiled(folder, text, replace(PLAIN, general_text=general)), folder)
        for general in (False, True)
    )
    assert len(own) == 2
    general = sum(len(line.split()) for line in SENTENCES.read_text().splitlines())
    for name, stats in all_text.items():
        assert stats.moments is not None and stats.background_extrema is not None
        assert own[name].moments is not None and own[name].background_extrema is None
        assert stats.moments.shape == (len(stats.lo), len(stats.lo))
        assert stats.count >= own[name].count + general
        np.testing.assert_array_equal(stats.rows, own[name].rows)
        assert len(own[name].rows) == own[name].count  # few enough to be sampled completely


@pytest.mark.usefixtures("asked")
def test_moments_change_the_weights(folder: Path, text: Path) -> None:
    both = [
        compiled(folder, text, replace(PLAIN, general_text=general)).model
        for general in (False, True)
    ]
    assert both[0] != both[1]


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("light", [False, True])
def test_a_lock_gives_the_same_bytes(folder: Path, text: Path, light: bool) -> None:
    first, file = compiled(folder, text), folder.with_name("m.lock.yaml")
    first.save_lock(file, light=light)
    assert file.with_suffix(".npz").exists() != light
    assert compiled(folder, text if light else None, file).model == first.model


@pytest.mark.usefixtures("asked")
def test_an_interrupted_calibration_gives_the_same_bytes(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compiled(folder, text, batch_size=4)
    original, seen = Collector.update, list[int]()

    def update(self: Collector, feed: Feed) -> None:
        seen.append(1)
        if len(seen) == 5:
            raise KeyboardInterrupt
        original(self, feed)

    with monkeypatch.context() as patched:
        patched.setattr(Collector, "update", update)
        with pytest.raises(KeyboardInterrupt):
            compiled(folder, text, cache=Cache(tmp_path / "cache", every=0), batch_size=4)
    made = compiled(folder, text, cache=Cache(tmp_path / "cache", every=0), batch_size=4)
    assert any("continued after 4 feeds" in note for note in made.report.note_texts)
    assert made.model == whole.model
    again = compiled(folder, text, cache=Cache(tmp_path / "cache", every=0), batch_size=4)
    assert any("taken from an earlier run" in note for note in again.report.note_texts)
    assert again.model == whole.model


def test_a_cached_calibration_without_moments_is_another(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled(folder, text, cache=Cache(tmp_path / "cache"))
    monkeypatch.setattr(RoundWeights, "wants_moments", RoundWeights.wants)
    made = compiled(folder, text, cache=Cache(tmp_path / "cache"))
    assert not any("earlier run" in note for note in made.report.note_texts)
    assert all(s.moments is not None for s in channels(made, folder).values())


@pytest.mark.usefixtures("asked")
def test_a_memory_limit_changes_no_byte(folder: Path, text: Path) -> None:
    """Feeds are divided, and sums are kept in files."""
    limit = 4 * (folder / "model.onnx").stat().st_size
    made = [compiled(folder, text, max_memory=m, batch_size=16) for m in (None, limit)]
    assert made[0].model == made[1].model


def test_without_ranges_data_helps_and_a_lock_keeps_what_it_gave(folder: Path, text: Path) -> None:
    """Modes that ask for no range calibrate moments from data, and need none."""
    recipe = replace(PLAIN, mode="weight-only", weight_bits=4)
    made = compiled(folder, text, recipe)
    alone = compiled(folder, None, recipe)
    assert made.model != alone.model
    assert {s.count > 0 for s in channels(made, folder).values()} == {True}
    file = folder.with_name("m.lock.yaml")
    assert compiled(folder, None, file).model == made.model
    alone.save_lock(file)
    assert compiled(folder, text, file).model == alone.model
