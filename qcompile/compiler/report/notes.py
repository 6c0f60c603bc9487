"""Notes of a report: a code for programs, a sentence for people."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

NOTHING_QUANTIZED, RANDOM_MODEL = "nothing-quantized", "float-model-random"
# The first words of notes that programs look for in a report's JSON, which holds only the texts.
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
    """The text after the opening of a code's note, in a report's JSON; None if there is no note."""
    opening = _OPENINGS[code]
    return next((t.removeprefix(opening) for t in texts if t.startswith(opening)), None)
