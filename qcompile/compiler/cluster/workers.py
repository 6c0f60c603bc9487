"""What stages know of workers: work items go in, results come back in the order of the items.

A ``Task`` can do an item in this process, as today's loops do, or say what a worker needs to do it
(``Kit``). ``Local`` does all items here, one by one; ``dask_workers`` has the other implementation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from qcompile.compiler.cluster.account import ClusterAccount

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Site:
    """Where a kit is opened: its files by name, and how many threads an item may use."""

    files: Mapping[str, Path]
    threads: int


@dataclass(frozen=True)
class Kit:
    """What a worker needs, once for all items.

    files: by a relative path, which is kept where a worker cannot open the file itself. open:
    called once by each worker, must be picklable and small; it returns the function of an item, as
    ``Task.sent`` gives it. merge: makes one answer of those to consecutive items; picklable.
    """

    files: Mapping[str, Path]
    open: Callable[[Site], Callable[[Any], Any]]
    merge: Callable[[Sequence[Any]], Any] | None = None


class Task(ABC, Generic[Item, Result]):
    """One kind of work; results must not depend on who does an item."""

    @abstractmethod
    def here(self, item: Item) -> Result:
        """Do an item in this process."""

    @abstractmethod
    def kit(self) -> Kit:
        """What a worker needs."""

    @abstractmethod
    def label(self, item: Item) -> str:
        """The item in an error message."""

    def sent(self, item: Item) -> Any:
        """What a worker gets of an item, called as it is sent; must be picklable."""
        return item

    def received(self, items: Sequence[Item], answer: Any) -> Sequence[Result]:
        """The results, of what a worker returned; called in the order of the items.

        items: one, or those whose answers ``Kit.merge`` made one of.
        """
        return [answer]

    def merges(self, one: Item, later: Item) -> bool:
        """True where the answers to two neighbouring items can be merged."""
        return True


@runtime_checkable
class Workers(Protocol):
    """Does work items."""

    @property
    def shard(self) -> int:
        """The most feeds in an item of calibration."""

    def map(self, task: Task[Item, Result], items: Iterable[Item]) -> Generator[Result]:
        """Results in the order of the items, which are read as they are needed.

        Closing the iterator cancels what is not done.
        """

    def account(self, since: ClusterAccount | None = None) -> ClusterAccount | None:
        """What was done so far, or after ``since``; None where there are no other processes."""


@dataclass(frozen=True)
class Local:
    """This process, one item after the other."""

    shard: int = field(default=1, init=False)

    def map(self, task: Task[Item, Result], items: Iterable[Item]) -> Generator[Result]:
        """Results, each as it is asked for."""
        for item in items:
            yield task.here(item)

    def account(self, since: ClusterAccount | None = None) -> None:
        """There is nothing to account for."""


LOCAL = Local()
