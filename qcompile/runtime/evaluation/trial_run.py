"""Whether a model takes a feed, found by running it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from qcompile.data.feeds import Feed
from qcompile.data.text import Takes
from qcompile.errors import ModelError
from qcompile.runtime.session import Session, SessionOptions


def trial_run(model: Callable[[], bytes | Path], threads: int = 0) -> Takes:
    """A function that runs a feed; its result is None, or the error that it met.

    The model is read and loaded by the first call, once, and lives as long as the function.
    """

    @cache
    def loaded() -> Session | ModelError:
        try:
            return Session(model(), SessionOptions(threads=threads, optimize=False))
        except ModelError as e:
            return e

    def takes(feed: Feed) -> ModelError | None:
        session = loaded()
        if isinstance(session, ModelError):
            return session
        try:
            session.run(feed)
        except ModelError as e:
            return e
        return None

    return takes
