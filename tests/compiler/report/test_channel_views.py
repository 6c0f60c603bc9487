"""What the inputs of integer layers look like before and after the transforms."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import qcompile
from qcompile import Gates, Options, Recipe
from qcompile.compiler.report.channel_views import (
    _BINS,
    _MOST_SITES,
    ChannelSite,
    ChannelWatch,
    _ends,
    _History,
    _Snapshot,
    _view,
)
from qcompile.ir.analysis.transformer_roles import Role
from qcompile.ir.model_io.to_proto import serialize
from qcompile.quant import QSpec, Range
from qcompile.rewriting.testing import encoder
from qcompile.system.json_values import json_value
from tests.compiler.report.html.reports import feeds

UINT8 = QSpec("uint8", symmetric=False)
BY_CHANNEL = QSpec("uint8", symmetric=False, granularity="channel", axis=-1)


def views(transforms: str, target: str = "cpu", **graph: Any) -> list[ChannelSite]:
    recipe = Recipe(target=target, transforms=transforms, attention="float")
    options = Options(bench=False, threads=1, force=True)
    model = serialize(encoder(1, **{"width": 32, "outlier": 40.0, **graph}))
    result = qcompile.compile(model, feeds(), recipe=recipe, gates=Gates(), options=options)
    return result.report.channels


def by_role(found: list[ChannelSite], role: str) -> ChannelSite:
    return next(site for site in found if site.role == role)


def test_steps_of_known_channels() -> None:
    """Range [-2, 2.25] in 255 steps of 1/60: a channel of [0, 1] takes 60 of them."""
    lo, hi = np.array([0.0, -2.0, 0.25]), np.array([1.0, 2.25, 0.5])
    seen = _view(_Snapshot("x", lo, hi, Range(np.array(-2.0), np.array(2.25)), UINT8))
    (group,) = seen.groups
    assert group.channels == 3 and group.step == pytest.approx(1 / 60)
    assert seen.lows == [0, 120, 120] and seen.highs == [255, 180, 150]
    assert (seen.median_steps, seen.steps, seen.clipped) == (60, 255, 0)


def test_groups_come_widest_first_each_in_its_own_steps() -> None:
    lo, hi = np.zeros(4), np.array([1.0, 100.0, 2.0, 50.0])
    span = Range(np.zeros(4), np.array([2.0, 100.0, 2.0, 100.0]), -1)
    seen = _view(_Snapshot("x", lo, hi, span, BY_CHANNEL))
    assert [g.channels for g in seen.groups] == [2, 2]
    assert seen.highs == [255, 127.5, 255, 127.5]


def test_what_lies_outside_of_the_range_is_counted_and_cut() -> None:
    lo, hi = np.zeros(3), np.array([1.0, 9.0, 2.0])
    seen = _view(_Snapshot("x", lo, hi, Range(np.array(0.0), np.array(2.0)), UINT8))
    assert seen.clipped == 1 and seen.highs == [255, 255, 127.5]


@pytest.mark.parametrize("channels", [1, 2, 47, 48, 384, 3072])
def test_bins_cover_all_channels_once_narrow_ones_first(channels: int) -> None:
    ends = _ends(channels)
    assert ends[0] == 1 or channels > _BINS**2
    assert ends[-1] == channels and len(ends) <= _BINS
    assert (np.diff([0, *ends]) > 0).all()


def test_migration_gives_the_median_channel_more_steps() -> None:
    site = by_role(views("migrate-scales"), "ffn-in")
    assert site.passes == ["migrate-scales"] and site.layer == 0
    assert site.after.median_steps > 4 * site.before.median_steps
    assert (site.channels, site.columns) == (32, 32)


def test_split_outliers_adds_columns_and_cuts() -> None:
    site = by_role(views("split-outliers{least_channels=16}"), "ffn-in")
    assert site.columns > site.channels == 32
    assert site.after.clipped >= 1 > site.before.clipped
    assert site.after.high < site.before.high


def test_groups_on_qdq() -> None:
    site = by_role(views("group-scales", "qdq"), "ffn-in")
    groups = site.after.groups
    assert len(groups) > 1 and sum(g.channels for g in groups) == 32
    assert len(site.before.groups) == 1


def test_split_groups_after_permutation_is_one_story() -> None:
    site = by_role(views("permute-channels,split-groups{groups=4,align=8}", "qdq"), "ffn-in")
    assert site.passes == ["permute-channels", "split-groups"]
    assert [g.channels for g in site.after.groups] == [8, 8, 8, 8]


def test_readers_of_one_tensor_are_one_site() -> None:
    site = by_role(views("migrate-scales"), "query, key, value")
    assert site.readers == 3


def test_nothing_is_watched_without_transforms() -> None:
    assert views("none") == []


def test_of_very_many_sites_the_worst_are_kept_in_order() -> None:
    def story(i: int) -> _History:
        top = float(i % 7) / 100  # of 2.55, what the other channel has: 0 to 6 steps
        lo, hi = np.zeros(3), np.array([top, top, 2.55])
        seen = _Snapshot(f"x{i}", lo, hi, Range(np.array(0.0), np.array(2.55)), UINT8)
        return _History(f"n{i}", Role(()), 1, 3, seen, seen, 3)

    kept = ChannelWatch({str(i): story(i) for i in range(_MOST_SITES + 7)}).sites()
    assert len(kept) == _MOST_SITES
    places = [int(s.tensor[1:]) for s in kept]
    assert places == sorted(places)
    assert sum(s.before.median_steps == 6 for s in kept) == _MOST_SITES // 7 - 6


def test_a_site_takes_few_bytes() -> None:
    """Two views of at most 48 bins with two figures of up to 7 letters, and names."""
    for site in views("migrate-scales", width=256):
        assert len(json.dumps(json_value(site))) < 2 * 2 * 48 * 8 + 1500
