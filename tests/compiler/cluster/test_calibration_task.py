"""The task of calibration where a shard was observed with a wrong guess."""

from __future__ import annotations

from typing import Any

import pytest

from qcompile.calibration import shards
from qcompile.calibration.shards import ShardCollector
from qcompile.calibrators.minmax import MinMax
from qcompile.compiler.cluster.calibration_task import CalibrationTask
from tests.calibration.test_shards import bits, feeds, make, whole


@pytest.mark.parametrize("ahead", [0, 1000])
def test_a_shard_that_lacks_rows_is_observed_again(
    ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make(MinMax())
    task = CalibrationTask(client, spill=False)
    worker = ShardCollector.of(client).collector(client.model, 1, spill=False)
    sent, again = shards.sent, []

    def counted(collector: Any, shard: Any, count: int = 0) -> Any:
        again.append(count == 0)
        return sent(collector, shard, count and count + ahead)

    monkeypatch.setattr(shards, "sent", counted)
    items = [*shards.shards(feeds(), 1), *shards.shards(feeds(3), 1, background=True)]
    for item in items:
        task.received([item], shards.observe(worker, task.sent(item)))
    assert len(again) > len(items) if ahead else len(again) == len(items)
    same = bits(client) == bits(whole(MinMax()))
    assert same
