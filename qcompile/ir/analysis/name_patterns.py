"""Patterns over names of nodes and tensors, and over roles."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

_PREFIX = "role:"


def matches(pattern: str, names: Iterable[str]) -> bool:
    """True where a glob matches a name; globs that start with ``role:`` match only role labels."""
    asks_role = is_role(pattern)
    return any(fnmatchcase(n, pattern) for n in names if is_role(n) == asks_role)


def is_role(text: str) -> bool:
    """True for labels, and for patterns of labels."""
    return text.startswith(_PREFIX)
