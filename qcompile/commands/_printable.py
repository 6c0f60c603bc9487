"""Untrusted text on the user's terminal: names in a model may hold terminal escape sequences."""

from __future__ import annotations

_LONGEST = 1000


def printable(text: str, longest: int = _LONGEST) -> str:
    """The text with Python escapes for unprintable characters, truncated in the middle.

    Control characters, bidirectional marks, lone surrogates and line breaks are unprintable.
    """
    if len(text) > longest:
        half = longest // 2
        text = f"{text[:half]} … {text[-half:]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
