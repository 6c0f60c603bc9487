"""Progress of long work for programs: logged, and reported to a callback or as bars in notebooks.

The logger is ``qcompile``: stages at INFO, details at DEBUG. No handler is installed, so nothing is
printed unless the program configures logging.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeAlias

from qcompile.system.progress import Progress, Silent

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

# Called with the name of a stage, the units done, and their total (None where it is not known).
Callback: TypeAlias = Callable[[str, int, int | None], object]
_LOG = logging.getLogger("qcompile")


class _Logged:
    """Logs each stage, and hands everything on."""

    def __init__(self, inner: Progress) -> None:
        self._inner = inner

    def step(self, name: str, total: int | None = None) -> None:
        _LOG.info("stage: %s", name)
        self._inner.step(name, total)

    def advance(self) -> None:
        self._inner.advance()


class _Called:
    """Calls a function at each step and after each unit."""

    def __init__(self, callback: Callback) -> None:
        self._callback = callback
        self._name, self._done = "", 0
        self._total: int | None = None

    def step(self, name: str, total: int | None = None) -> None:
        self._name, self._done, self._total = name, 0, total
        self._callback(name, 0, total)

    def advance(self) -> None:
        self._done += 1
        self._callback(self._name, self._done, self._total)


class Bars:
    """One bar of rich for each stage; its field ``counted`` says whether the total is known."""

    def __init__(self, bars: RichProgress) -> None:
        self._bars = bars
        self._task: TaskID | None = None

    def step(self, name: str, total: int | None = None) -> None:
        """Finish the current stage and begin another."""
        self.finish()
        self._task = self._bars.add_task(name, total=total, counted=total is not None)

    def advance(self) -> None:
        """One unit done."""
        if self._task is not None:
            self._bars.advance(self._task)

    def finish(self) -> None:
        """Fill the bar of the current stage."""
        if self._task is not None:
            done = max(self._bars.tasks[self._task].completed, 1)
            self._bars.update(self._task, total=done, completed=done)


@contextmanager
def shown_progress(progress: Progress | Callback | None) -> Iterator[Progress]:
    """Where to report progress: to the object or callback that is given; without any, to bars in a
    notebook that can draw them, and else nowhere. Stages are logged in all cases."""
    if progress is None and draws_bars():
        from rich.progress import Progress as RichProgress

        with RichProgress() as bars:
            shown = Bars(bars)
            yield _Logged(shown)
            shown.finish()
    elif progress is None:
        yield _Logged(Silent())
    elif isinstance(progress, Progress):
        yield _Logged(progress)
    else:
        yield _Logged(_Called(progress))


def draws_bars() -> bool:
    """True in a notebook with ipywidgets, by which rich draws there."""
    if find_spec("IPython") is None or find_spec("ipywidgets") is None:
        return False
    from rich.console import Console

    return Console().is_jupyter
