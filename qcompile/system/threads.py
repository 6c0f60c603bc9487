"""Threads: one for matrix multiplications that must be reproducible, all cores for other work.

numpy releases Python's lock while it computes, so independent work runs on all cores.
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
    """numpy's BLAS on one thread: the division over threads would change the order of sums."""
    with threadpool_limits(1, "blas"):
        yield


def in_threads(work: Callable[[A], B], items: Iterable[A]) -> list[B]:
    """``work`` of each item, in the order of the items; raises the first error among them."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(work, items))
