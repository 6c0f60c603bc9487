"""What a protobuf file would become, before it becomes it.

Two bytes of a file can be an empty message, which takes over a hundred bytes in memory: 20 MB of
them become 2 GB. So the entries of a model are counted in its bytes first, without parsing them:
messages twice, for they weigh more, and strings once.
Source: https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

from functools import cache
from typing import Any

import onnx

from qcompile.errors import ModelError

# A node with its tensors and their types counts about 40: these are 100,000 nodes, and at most some
# 400 MB in memory.
MOST_ENTRIES = 1 << 22
_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5
_WIDTHS = {_FIXED64: 8, _FIXED32: 4}


def check_entries(data: bytes, what: str, most: int = MOST_ENTRIES) -> None:
    """Raises ModelError where the bytes of a ModelProto hold over ``most`` entries.

    Bytes that are no protobuf pass: the parser will say so.
    """
    if len(data) > most and _count(data, most) > most:  # a byte counts once at most
        raise ModelError(
            f"{what} holds over {most // 2} nodes, tensors, attributes and other entries: "
            "no model needs so many"
        )


@cache
def _messages(kind: str) -> dict[int, str]:
    """By number, the fields of a message that are messages themselves, and of what kind."""
    found: dict[int, str] = {}
    for field in _descriptor(kind).fields:
        if field.message_type is not None:
            found[field.number] = field.message_type.full_name
    return found


def _descriptor(kind: str) -> Any:
    return onnx.ModelProto.DESCRIPTOR.file.pool.FindMessageTypeByName(kind)


def _count(data: bytes, most: int) -> int:
    """Entries inside, as far as ``most`` and few more."""
    count = 0
    stack = [(0, len(data), onnx.ModelProto.DESCRIPTOR.full_name)]
    while stack and count <= most:
        at, end, kind = stack.pop()
        inner = _messages(kind)
        while at < end and count <= most:
            tag, at = _varint(data, at, end)
            wire = tag & 7
            if wire == _DELIMITED:
                size, at = _varint(data, at, end)
                child = inner.get(tag >> 3)
                count += 1 if child is None else 2
                if child is not None and size:
                    stack.append((at, min(at + size, end), child))
                at += size
            elif wire == _VARINT:
                _, at = _varint(data, at, end)
            else:
                at += _WIDTHS.get(wire, end)
    return count


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """The number at a place, and the place behind it; behind the end where there is none."""
    if at < end and data[at] < 128:  # nearly all of them
        return data[at], at + 1
    value = shift = 0
    while at < end and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    return 0, end
