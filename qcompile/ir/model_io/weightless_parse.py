"""Extracts a model's protobuf without its weights, which is small however large the file is.

The wire format is walked down to the raw data of initializers and of nodes' tensors. Large data is
left out, and its position recorded. Anything unusual ends the walk; the caller then parses the
whole file, and the parser reports damage.
Source: https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

Buffer: TypeAlias = bytes | mmap.mmap
# Returns the new bytes of an inner message, given its start, its end and its index in its field.
_Edit: TypeAlias = Callable[[int, int, int], bytes]

# Field numbers of onnx.proto.
_GRAPH, _NODE, _INITIALIZER, _ATTRIBUTE, _T = 7, 1, 5, 5, 5
_RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION = 9, 13, 14
_LEAST = 1 << 12  # bytes of data that are worth leaving out
_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5
_WIDTHS = {_FIXED64: 8, _FIXED32: 4}
_LONGEST_VARINT = 10
_MOST_FIELDS = 1 << 20  # a model with more is counted faster than it is walked


class UnusualError(ValueError):
    """The bytes are not protobuf, or not in the simple form that exporters write."""


@dataclass(frozen=True)
class Span:
    """Position of a tensor's data in the file, in bytes."""

    offset: int
    size: int


@dataclass
class Thin:
    """A ModelProto's bytes without large data, and the positions of that data.

    initializers: by index in the graph. attributes: by index of node and attribute.
    """

    model: bytes = b""
    initializers: dict[int, Span] = field(default_factory=dict)
    attributes: dict[tuple[int, int], Span] = field(default_factory=dict)


def thin(data: Buffer) -> Thin:
    """A ModelProto's bytes without large data. Raises UnusualError."""
    result = Thin()
    walk = _Walk(data, result)
    result.model = walk.edited(0, len(data), {_GRAPH: walk.graph})
    return result


@dataclass(frozen=True)
class _Field:
    """One field of a message. ``value``: where its payload begins; for a varint its value."""

    number: int
    wire: int
    start: int
    value: int
    end: int


@dataclass
class _Walk:
    data: Buffer
    result: Thin
    fields: int = 0

    def edited(self, at: int, end: int, edits: Mapping[int, _Edit]) -> bytes:
        """A message in which ``edits`` replace the large fields with these numbers."""
        pieces: list[bytes] = []
        counts = dict.fromkeys(edits, 0)
        for found in self._fields(at, end):
            if found.number not in edits or found.wire != _DELIMITED:
                continue
            index = counts[found.number]
            counts[found.number] += 1
            if found.end - found.value >= _LEAST:
                new = edits[found.number](found.value, found.end, index)
                head = varint(found.number << 3 | _DELIMITED) + varint(len(new))
                pieces += [self.data[at : found.start], head, new]
                at = found.end
        return b"".join([*pieces, self.data[at:end]])

    def graph(self, at: int, end: int, index: int) -> bytes:
        _only(index)
        return self.edited(at, end, {_NODE: self._node, _INITIALIZER: self._initializer})

    def _initializer(self, at: int, end: int, index: int) -> bytes:
        span = self._raw_data(at, end)
        if span is None:
            return self.data[at:end]
        self.result.initializers[index] = span
        return self._without(at, end, span)

    def _node(self, at: int, end: int, index: int) -> bytes:
        return self.edited(at, end, {_ATTRIBUTE: partial(self._attribute, index)})

    def _attribute(self, node: int, at: int, end: int, index: int) -> bytes:
        return self.edited(at, end, {_T: partial(self._value, (node, index))})

    def _value(self, key: tuple[int, int], at: int, end: int, index: int) -> bytes:
        _only(index)
        span = self._raw_data(at, end)
        if span is None:
            return self.data[at:end]
        self.result.attributes[key] = span
        return self._without(at, end, span)

    def _raw_data(self, at: int, end: int) -> Span | None:
        """Position of a tensor's data; None where it is small, or not in this file."""
        spans = []
        for found in self._fields(at, end):
            external = found.number == _DATA_LOCATION and found.value != 0
            if external or found.number == _EXTERNAL_DATA:
                return None
            if found.number == _RAW_DATA and found.wire == _DELIMITED:
                spans.append(Span(found.value, found.end - found.value))
        _only(len(spans) - 1)
        return spans[0] if spans and spans[0].size >= _LEAST else None

    def _without(self, at: int, end: int, span: Span) -> bytes:
        """A tensor without its data."""
        field = next(f for f in self._fields(at, end) if f.number == _RAW_DATA)
        return self.data[at : field.start] + self.data[field.end : end]

    def _fields(self, at: int, end: int) -> Iterator[_Field]:
        while at < end:
            self.fields += 1
            if self.fields > _MOST_FIELDS:
                raise UnusualError("more fields than a model has")
            start = at
            tag, at = self._number(at, end)
            wire, value = tag & 7, at
            if wire == _VARINT:
                value, at = self._number(at, end)
            elif wire == _DELIMITED:
                size, value = self._number(at, end)
                at = value + size
            elif wire in _WIDTHS:
                at += _WIDTHS[wire]
            else:
                raise UnusualError(f"wire type {wire}")
            if at > end:
                raise UnusualError("truncated")
            yield _Field(tag >> 3, wire, start, value, at)

    def _number(self, at: int, end: int) -> tuple[int, int]:
        """A varint, and the position after it."""
        value = 0
        for i in range(_LONGEST_VARINT):
            if at + i >= end:
                break
            byte = self.data[at + i]
            value |= (byte & 127) << 7 * i
            if byte < 128:
                return value, at + i + 1
        raise UnusualError("no number")


def _only(index: int) -> None:
    """Raise on a repeated entry of a singular field, which only the parser merges."""
    if index > 0:
        raise UnusualError("a field that should be there once")


def varint(value: int) -> bytes:
    """A number in protobuf's variable-length encoding."""
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])
