"""Sizes are read as people write them."""

from __future__ import annotations

import pytest

from qcompile.system.byte_sizes import parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [("17", 17), ("16MB", 16_000_000), ("12.5MiB", 13_107_200), (" 2 gib ", 2**31), ("1k", 1000)],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "MB", "12XB", "-3MB", "1.2.3MB", "18%", "nan", "1e3"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(text)
