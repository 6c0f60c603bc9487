"""What a report says in passing: a code for machines, a sentence for people."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Note:
    """``code`` is stable and in kebab case, ``text`` is not: match notes by their codes."""

    code: str
    text: str
