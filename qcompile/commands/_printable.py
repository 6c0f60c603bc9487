"""Text of others on the user's terminal: names in a model may hold escapes that steer it."""

from __future__ import annotations

_LONGEST = 1000


def printable(text: str, longest: int = _LONGEST) -> str:
    """The text with every character that does not print as its Python escape, cut in the middle.

    Controls, bidirectional marks and lone surrogates do not print; spaces do, line breaks do not.
    """
    if len(text) > longest:
        half = longest // 2
        text = f"{text[:half]} … {text[-half:]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
