"""One tree of exceptions, and the exit codes of the contract."""

from __future__ import annotations

import inspect

import pytest

from qcompile import errors
from qcompile.errors import GateError, InvariantError, PassError, QCompileError

ALL = [c for _, c in inspect.getmembers(errors, inspect.isclass)]


@pytest.mark.parametrize("kind", ALL)
def test_everything_derives_from_one_base_and_says_what_it_is_for(kind: type[Exception]) -> None:
    assert issubclass(kind, QCompileError)
    assert kind.__doc__
    assert kind("said").exit_code == (1 if issubclass(kind, GateError) else 2)


def test_broken_invariants_are_faults_of_passes() -> None:
    assert issubclass(InvariantError, PassError)
