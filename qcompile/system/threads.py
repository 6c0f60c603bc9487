"""Matrix products that round alike whatever the number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from threadpoolctl import threadpool_limits


@contextmanager
def one_thread() -> Iterator[None]:
    """numpy's BLAS on one thread: how it divides a product decides in which order it adds."""
    with threadpool_limits(1, "blas"):
        yield
