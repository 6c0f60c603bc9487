from __future__ import annotations

import pytest

from qcompile.commands._printable import printable


@pytest.mark.parametrize("text", ["plain", "größer · 東京", "a [b] \\x", ""])
def test_what_prints_stays(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("\x9b2J\x07", "\\x9b2J\\x07"),
        ("\u202eabc", "\\u202eabc"),
        ("\ud800", "\\ud800"),
    ],
)
def test_what_steers_a_terminal_is_spelled(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_long_text_keeps_both_ends() -> None:
    assert printable("a" * 600 + "b" * 600, 10) == "aaaaa … bbbbb"
