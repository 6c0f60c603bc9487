"""Which items have one answer."""

from __future__ import annotations

from typing import Any

import pytest

from qcompile.compiler.cluster.groups import FAN_IN, group_size, grouped
from qcompile.compiler.cluster.workers import Kit, Task


class OfOneSign(Task[int, int]):
    """Merges neighbours of one sign."""

    def here(self, item: int) -> int:
        return item

    def kit(self) -> Kit:
        return Kit({}, lambda _: self.here)

    def label(self, item: int) -> str:
        return str(item)

    def merges(self, one: int, later: int) -> bool:
        return (one < 0) == (later < 0)


@pytest.mark.parametrize(
    ("workers", "size"), [(0, 1), (1, 1), (7, 1), (8, 2), (64, 16), (1000, 250), (9999, FAN_IN**2)]
)
def test_only_many_workers_merge(workers: int, size: int) -> None:
    assert group_size(workers) == size


@pytest.mark.parametrize(
    ("items", "size", "expected"),
    [
        ([], 3, []),
        ([1, 2, 3, 4], 3, [[1, 2, 3], [4]]),
        ([1, 2, -3, -4], 3, [[1, 2], [-3, -4]]),
        ([1, 2], 1, [[1], [2]]),
    ],
)
def test_groups(items: list[int], size: int, expected: Any) -> None:
    assert list(grouped(OfOneSign(), items, size)) == expected


def test_items_are_read_as_they_are_needed() -> None:
    read = []

    def source() -> Any:
        for item in range(9):
            read.append(item)
            yield item

    next(grouped(OfOneSign(), source(), 2))
    assert read == [0, 1, 2]
