"""Numbers of bytes, as people write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_SIZE = re.compile(r"(\d+\.?\d*|\.\d+)\s*([KMG]I?|)B?")


def parse_bytes(text: str) -> int:
    """Bytes of ``800MB``, ``2GiB`` or a number. Raises ValueError."""
    match = _SIZE.fullmatch(text.strip().upper())
    if match is None:
        raise ValueError(f"{text!r} is not a size, expected for example 800MB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2]])
