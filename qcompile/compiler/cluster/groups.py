"""Consecutive items with one answer, which workers merge in a tree before the client gets it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from qcompile.compiler.cluster.workers import Item, Result, Task

FAN_IN = 16  # answers that a worker merges at a time
_GROUPS = 4  # of one item for each worker in them: twice as many are at the workers at any time


def group_size(workers: int) -> int:
    """How many items have one answer. Only many workers are faster than the client can merge."""
    return min(max(1, workers // _GROUPS), FAN_IN**2)


def grouped(task: Task[Item, Result], items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Consecutive items whose answers are merged, at most ``size``."""
    group: list[Item] = []
    for item in items:
        if group and (len(group) >= size or not task.merges(group[-1], item)):
            yield group
            group = []
        group.append(item)
    if group:
        yield group
