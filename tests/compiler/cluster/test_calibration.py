"""Calibration by the workers of a real local cluster: the same bits as without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qcompile
from qcompile.calibration.shards import DataSize
from qcompile.compiler.cluster import groups
from qcompile.compiler.cluster.account import ClusterAccount
from qcompile.compiler.cluster.connect import workers_of
from qcompile.compiler.stages import calibrate
from qcompile.compiler.stages.options import CompileOptions
from qcompile.compiler.stages.result import Result
from qcompile.quant import Array
from tests.encoder_files import token_feeds

# tests/calibration/test_shards.py has all of them.
CALIBRATORS = "minmax", "moving-average", "percentile"


def feeds(count: int = 40) -> list[dict[str, Array]]:
    return token_feeds(count, batch=8, length=9, padded=(1, 4))


def compiled(model: Path, client: Any, **settings: Any) -> Result:
    limits = {"max_memory": settings.pop("max_memory", None)}
    options = CompileOptions(
        client=client, verify=False, bench=False, threads=1, keep_calibration=True, **limits
    )
    return qcompile.compile(model, feeds(), options=options, **settings)


def bits(result: Result) -> Any:
    """All arrays of a calibration, as bytes."""
    found = result.calibration
    assert found is not None
    ranges = {n: (r.lo.tobytes(), r.hi.tobytes()) for n, r in found.ranges.found.items()}
    channels = {
        n: [None if a is None else np.asarray(a).tobytes() for a in vars(c).values()]
        for n, c in found.channels.items()
    }
    return ranges, dict(found.ranges.missing), channels, result.report.model_sha256


@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_the_same_calibration_and_model(client: Any, encoder: Path, calibrator: str) -> None:
    alone, shared = (compiled(encoder, c, calibrator=calibrator) for c in (None, client))
    assert bits(shared) == bits(alone)
    assert shared.report.cluster is not None and alone.report.cluster is None


@pytest.mark.parametrize("settings", [{}, {"weight_bits": 4, "calibrator": "moving-average"}])
def test_the_same_through_a_tree_of_merges(
    client: Any, encoder: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "group_size", lambda _: 3)
    monkeypatch.setattr(groups, "FAN_IN", 2)
    before = workers_of(client).account()
    alone, shared = (compiled(encoder, c, **settings) for c in (None, client))
    assert bits(shared) == bits(alone)
    done = workers_of(client).account(before)
    assert done is not None and done.tasks == 9


def test_the_same_with_few_bits_and_a_memory_limit(client: Any, encoder: Path) -> None:
    """Second moments, whose mean is rounded, and samples that are kept in files."""
    settings: dict[str, Any] = {"weight_bits": 4, "max_memory": 1 << 20}
    alone, shared = (compiled(encoder, c, **settings) for c in (None, client))
    assert bits(shared) == bits(alone)


def test_rows_that_were_left_out_are_collected_by_a_second_calibration(
    client: Any, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a shard has far more of the rows than of the data."""
    alone = compiled(encoder, None)
    monkeypatch.setattr(calibrate, "_size", lambda _: DataSize(10**6, 10**9))
    shared = compiled(encoder, client)
    assert bits(shared) == bits(alone)
    notes = [[note.code for note in found.report.notes] for found in (alone, shared)]
    assert notes[1] == ["calibration-repeated", *notes[0]]


def test_workers_did_the_work(client: Any, encoder: Path) -> None:
    before = workers_of(client).account()
    found = compiled(encoder, client)
    done = workers_of(client).account(before)
    assert isinstance(done, ClusterAccount)
    assert (done.tasks, done.workers, done.retries) == (9, 2, 0)
    assert done.sent_bytes > 0 and done.received_bytes > 0 and done.busy_seconds > 0
    reported = found.report.to_dict()["cluster"]
    assert reported["tasks"] == 9 and reported["dashboard"].startswith("http://")
    assert "Workers" in found.report.to_html()
