"""Tests of what the installed onnxruntime is too old for are skipped, with the version they need.

No test says so itself: the compiler refuses what a runtime lacks (``targets/runtime_versions.py``),
and a test that fails by such a refusal is skipped by its message. A test may also set a version of
its own to see the refusal, which says nothing about the installed one. Only where an older runtime
computes something else (docs/platforms.md) does a test compare with ``INSTALLED``.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import pytest

from qcompile.targets.runtime_versions import OldRuntimeError, release

INSTALLED = release(version("onnxruntime"))


@contextmanager
def skips() -> Iterator[None]:
    """Skips the test if what runs inside raises such a refusal, or something that follows it."""
    try:
        yield
    except Exception as error:
        skip_after(error)
        raise


def skip_after(error: BaseException | None) -> None:
    """Skips the test if the error, or one that it follows, is such a refusal."""
    while error is not None:
        if isinstance(error, OldRuntimeError) and error.feature.since > INSTALLED:
            pytest.skip(str(error))
        error = error.__cause__ or error.__context__


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Generator[None, Any, Any]:
    with skips():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup() -> Generator[None, Any, Any]:
    with skips():
        return (yield)
