"""The task of calibration: how much was merged, which says what a shard may leave out."""

from __future__ import annotations

import pytest

from qcompile.calibration import shards
from qcompile.calibration.shards import DataSize, ShardCollector
from qcompile.calibrators.minmax import MinMax
from qcompile.compiler.cluster.calibration_task import CalibrationTask
from tests.calibration.test_shards import WHOLE, bits, feeds, make, whole


@pytest.mark.parametrize("seen", [0, 7])
def test_the_size_of_what_was_merged(seen: int) -> None:
    """Also where an earlier run has seen some feeds."""
    client = make(MinMax())
    for feed in feeds()[:seen]:
        client.update(feed)
    task = CalibrationTask(client, False, WHOLE, DataSize.of(feeds()[:seen]))
    worker = ShardCollector.of(client).collector(client.model, 1, spill=False)
    items = [*shards.shards(feeds()[seen:], 2), *shards.shards(feeds(3), 2, background=True)]
    for item in items:
        task.received([item], shards.observe(worker, task.sent(item)))
    same = bits(client) == bits(whole(MinMax()))
    assert same and task.merged == WHOLE
