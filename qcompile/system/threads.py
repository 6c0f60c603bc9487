"""Threads: one for matrix multiplications that must be reproducible, all cores for other work.

numpy releases Python's lock while it computes, so independent work runs on all cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import psutil
from threadpoolctl import threadpool_limits

A = TypeVar("A")
B = TypeVar("B")


def available_cores() -> int:
    """Cores that this process may use: all on macOS, which binds no process to some of them."""
    allowed = getattr(psutil.Process(), "cpu_affinity", None)
    return len(allowed()) if allowed is not None else psutil.cpu_count() or 1


@contextmanager
def one_thread() -> Iterator[None]:
    """numpy's BLAS on one thread: the division over threads would change the order of sums."""
    with threadpool_limits(1, "blas"):
        yield


def in_threads(work: Callable[[A], B], items: Iterable[A]) -> list[B]:
    """``work`` of each item, in the order of the items; raises the first error among them."""
    with ThreadPoolExecutor(available_cores()) as pool:
        return list(pool.map(work, items))
