"""Damages files, at random and reproducibly: bytes, and fields of protobuf messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError, Message

Rng = np.random.Generator
_NUMBERS = (0, 1, -1, 2, 7, 255, 1 << 31, -(1 << 31), (1 << 62) + 1, -(1 << 63))
_WORDS = (
    "",
    "x",
    "y",
    "MatMul",
    "Gather",
    "If",
    "com.microsoft",
    "axis",
    "perm",
    "\x1b[31m",
    "é" * 300,
)


def flip(data: bytes, rng: Rng, _other: bytes) -> bytes:
    """A few bits."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 9))):
        changed[int(rng.integers(len(changed)))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def truncate(data: bytes, rng: Rng, _other: bytes) -> bytes:
    return data[: int(rng.integers(len(data)))]


def splice(data: bytes, rng: Rng, other: bytes) -> bytes:
    """A piece of another file in place of one of this."""
    start, end = _span(data, rng)
    first, last = _span(other, rng)
    return data[:start] + other[first:last] + data[end:]


def repeat(data: bytes, rng: Rng, _other: bytes) -> bytes:
    start, end = _span(data, rng)
    return data[:end] + data[start:end] * int(rng.integers(1, 4)) + data[end:]


def drop(data: bytes, rng: Rng, _other: bytes) -> bytes:
    start, end = _span(data, rng)
    return data[:start] + data[end:]


def noise(data: bytes, rng: Rng, _other: bytes) -> bytes:
    start, end = _span(data, rng)
    return data[:start] + rng.bytes(end - start) + data[end:]


def _span(data: bytes, rng: Rng) -> tuple[int, int]:
    start = int(rng.integers(len(data) + 1))
    return start, min(len(data), start + int(2 ** rng.uniform(0, 9)))


BYTES: tuple[Callable[[bytes, Rng, bytes], bytes], ...] = (
    flip,
    truncate,
    splice,
    repeat,
    drop,
    noise,
)


def damage(data: bytes, seed: int, other: bytes, *, fields: bool) -> bytes:
    """The file of a seed. ``fields``: mostly fields of a ModelProto are changed, not bytes."""
    rng = np.random.default_rng([seed, 2])
    if fields and rng.random() < 0.7:
        try:
            return _damage_fields(data, rng)
        except DecodeError:
            pass  # was no model to begin with
    for _ in range(int(rng.integers(1, 3))):
        if data:
            data = BYTES[int(rng.integers(len(BYTES)))](data, rng, other)
    return data


def _damage_fields(data: bytes, rng: Rng) -> bytes:
    model = onnx.ModelProto.FromString(data)
    for _ in range(int(rng.integers(1, 4))):
        message = _descend(model, rng)
        if message is not None:
            _change(message, rng)
    changed: bytes = model.SerializeToString()
    return changed


def _descend(message: Message, rng: Rng) -> Message | None:
    """A message somewhere below, or this one."""
    while True:
        inner = [
            value
            for field, value in message.ListFields()
            if field.message_type is not None and (not field.is_repeated or len(value))
        ]
        if not inner or rng.random() < 0.15:
            return message
        chosen = inner[int(rng.integers(len(inner)))]
        message = chosen if isinstance(chosen, Message) else chosen[int(rng.integers(len(chosen)))]


def _change(message: Message, rng: Rng) -> None:
    """One field set, emptied, doubled, or its entries exchanged."""
    fields: list[Any] = list(message.DESCRIPTOR.fields)
    held = [field for field, _ in message.ListFields()]
    field = (held or fields)[int(rng.integers(len(held or fields)))]
    if rng.random() < 0.1:
        field = fields[int(rng.integers(len(fields)))]
    if rng.random() < 0.2:
        message.ClearField(field.name)
    elif field.is_repeated:
        _change_entries(getattr(message, field.name), field, rng)
    elif field.message_type is None:
        setattr(message, field.name, _scalar(field, getattr(message, field.name), rng))


def _change_entries(values: Any, field: Any, rng: Rng) -> None:
    entries = list(values)
    kind = int(rng.integers(4))
    if kind == 0 and entries:
        del values[int(rng.integers(len(entries)))]
    elif kind == 1 and entries:
        values.extend([entries[int(rng.integers(len(entries)))]])
    elif kind == 2 and len(entries) > 1:
        order = rng.permutation(len(entries))
        del values[:]
        values.extend([entries[i] for i in order])
    elif field.message_type is None:
        values.append(_scalar(field, entries[0] if entries else None, rng))
    else:
        values.add()


def _scalar(field: Any, old: Any, rng: Rng) -> Any:
    """Another value of the field's type."""
    if field.cpp_type == field.CPPTYPE_STRING:
        if field.type == field.TYPE_BYTES:
            return flip(old, rng, b"") if old else rng.bytes(3)
        return _WORDS[int(rng.integers(len(_WORDS)))]
    if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return float(rng.choice([0.0, -1.0, np.inf, np.nan, 1e30, 1e-40]))
    value = _NUMBERS[int(rng.integers(len(_NUMBERS)))]
    if field.cpp_type == field.CPPTYPE_ENUM:
        known = [v.number for v in field.enum_type.values]
        return known[int(rng.integers(len(known)))]
    if field.cpp_type == field.CPPTYPE_INT32:
        return int(rng.integers(0, 24))
    return value % 2**64 if field.cpp_type == field.CPPTYPE_UINT64 else value
