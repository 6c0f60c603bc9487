"""Threads of this machine: one for matrix products that must round alike, all for other work.

numpy leaves Python's lock while it computes, so independent work runs on all cores.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from threadpoolctl import threadpool_limits

A = TypeVar("A")
B = TypeVar("B")


@contextmanager
def one_thread() -> Iterator[None]:
    """numpy's BLAS on one thread: how it divides a product decides in which order it adds."""
    with threadpool_limits(1, "blas"):
        yield


def in_threads(work: Callable[[A], B], items: Iterable[A]) -> list[B]:
    """Results in the order of the items, whoever finishes first; the first error is raised."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(work, items))
