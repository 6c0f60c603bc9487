"""Work on several threads: in order, and its errors are raised."""

from __future__ import annotations

import threading

import pytest

from qcompile.system.parallel import in_threads


def test_results_come_in_order() -> None:
    gate = threading.Event()

    def work(i: int) -> int:
        if i == 1:
            gate.set()
        return i * i

    assert in_threads(work, range(5)) == [0, 1, 4, 9, 16]
    assert gate.is_set() and in_threads(work, []) == []


def test_errors_are_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda i: 1 // i, [1, 0])
