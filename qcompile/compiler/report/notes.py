"""What a report says in passing: a code for machines, a sentence for people."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

NOTHING_QUANTIZED, RANDOM_MODEL = "nothing-quantized", "float-model-random"
# How notes begin that programs look for in a report's JSON, which holds their texts alone.
_OPENINGS = {
    NOTHING_QUANTIZED: "nothing was quantized: ",
    RANDOM_MODEL: "not verified: the float model's own answers differ from run to run",
}


@dataclass(frozen=True)
class Note:
    """``code`` is stable and in kebab case, ``text`` is not: match notes by their codes."""

    code: str
    text: str


def coded_note(code: str, detail: str = "") -> Note:
    """A note that ``detail_of`` finds. Raises KeyError for another code."""
    return Note(code, _OPENINGS[code] + detail)


def detail_of(code: str, texts: Iterable[str]) -> str | None:
    """What the note of a code adds to its opening, in a report's JSON; None: there is none."""
    opening = _OPENINGS[code]
    return next((t.removeprefix(opening) for t in texts if t.startswith(opening)), None)
