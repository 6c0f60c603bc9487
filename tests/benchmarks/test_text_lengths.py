"""Texts of a length, from sentences in a row."""

from __future__ import annotations

from benchmarks.text_lengths import texts_of


def test_texts_are_long_enough_and_start_at_different_sentences() -> None:
    parts = ["a b", "c", "d e f", "g"]
    assert texts_of(3, 2, parts) == ["a b c", "d e f"]
    assert texts_of(5, 1, parts) == ["a b c d e f"]
    assert texts_of(2, 4, parts) == ["a b", "c d e f", "d e f", "g a b"]
