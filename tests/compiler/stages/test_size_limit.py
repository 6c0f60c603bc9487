"""Limits of size are read, and nonsense is refused."""

from __future__ import annotations

import pytest

from qcompile.compiler.stages.options import SizeLimit


@pytest.mark.parametrize(
    ("text", "expected", "shown"),
    [("18%", 180, "18%"), ("12.5 %", 125, "12.5%"), ("16MB", 16_000_000, "16000000"),
     ("12.5MiB", 13_107_200, "13107200"), ("100%", 1000, "100%"), ("700", 700, "700")],
)  # fmt: skip
def test_limits(text: str, expected: int, shown: str) -> None:
    limit = SizeLimit.parse(text)
    assert limit.of(1000) == expected and str(limit) == shown


@pytest.mark.parametrize(
    "text",
    ["", "%", "0%", "-3%", "101%", "nan%", "inf%", "18%%", "18%MB", "0", "0.2B", "big", "-1"],
)
def test_what_is_no_limit(text: str) -> None:
    with pytest.raises(ValueError, match="not a size limit"):
        SizeLimit.parse(text)


def test_either_bytes_or_a_share() -> None:
    for size, share in ((None, None), (1, 0.5), (0, None), (None, 0.0), (None, 1.5)):
        with pytest.raises(ValueError, match=r"limit|share"):
            SizeLimit(size, share)
