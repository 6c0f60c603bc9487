"""Limits on what a model may make us allocate, checked before anything is allocated.

Entries: two bytes of a file can be an empty message, which takes over a hundred bytes in memory, so
20 MB of them become 2 GB. So the entries of a model are counted in its bytes before parsing:
messages twice, since they are larger in memory, and strings once.
Source: https://protobuf.dev/programming-guides/encoding

Functions: ONNX's inference and ONNX Runtime both inline functions. Ten functions that call the next
one ten times each become 10^10 nodes.

Tensors: a few bytes of a file can make the runtime allocate any amount.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import onnx

from qcompile.errors import ModelError
from qcompile.ir import Graph, has_subgraph, is_constant
from qcompile.ir.subgraph import bodies

_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5  # wire types of protobuf

PROTOBUF_LIMIT = 2**31 - 2**20  # bytes of a message, minus some room
# Bytes of a tensor that depends only on constants: ONNX Runtime computes it when loading.
MOST_FOLDED = 1 << 30
MOST_COMPUTED = 1 << 36  # bytes of any other tensor
MOST_AXES = 64  # of a numpy array
_NARROW = 1  # bytes of an element of a type that numpy lacks


def check_sizes(graph: Graph, types: Mapping[str, onnx.ValueInfoProto]) -> int:
    """Check the inferred types of a graph's tensors; returns the elements of the longest vector.

    Dimensions without a number count as 1. Raises ModelError for a tensor of over 64 axes, over
    64 GiB, or, where it depends only on constants, over 1 GiB and 4 times the largest of these.
    """
    constant_bytes, longest = _constant_bytes(graph), 0
    for name, info in types.items():
        dims = [d.dim_value for d in info.type.tensor_type.shape.dim]
        if len(dims) > MOST_AXES:
            raise ModelError(f"tensor {name!r} has {len(dims)} axes, at most {MOST_AXES} expected")
        size = math.prod((d for d in dims if d > 0), start=_item_bytes(info))
        if len(dims) < 2:
            longest = max(longest, *dims, 0)
        most = (
            max(MOST_FOLDED, 4 * constant_bytes[name]) if name in constant_bytes else MOST_COMPUTED
        )
        if size > most:
            raise ModelError(f"tensor {name!r} of shape {dims} takes {size} bytes, over {most}")
    return longest


def _item_bytes(info: onnx.ValueInfoProto) -> int:
    try:
        kind = onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
    except KeyError:
        return _NARROW
    return int(kind.itemsize)


def _constant_bytes(graph: Graph) -> dict[str, int]:
    """For each tensor that depends only on constants: bytes of the largest, at 8 per element."""
    sizes = {name: 8 * math.prod(t.shape) for name, t in graph.constants().items()}
    for node in graph.nodes:
        inputs = [t.name for t in node.inputs if t.name]
        if inputs and not has_subgraph(node) and all(name in sizes for name in inputs):
            largest = max(sizes[name] for name in inputs)
            sizes.update((t.name, largest) for t in node.outputs if not is_constant(t))
    return sizes


# A node with its tensors and their types counts about 40: these are 100,000 nodes, and at most some
# 400 MB in memory.
MOST_ENTRIES = 1 << 22


_WIDTHS = {_FIXED64: 8, _FIXED32: 4}


def check_entries(data: bytes, what: str, most: int = MOST_ENTRIES) -> None:
    """Raises ModelError where the bytes of a ModelProto hold over ``most`` entries.

    Bytes that are not protobuf pass: the parser reports them.
    """
    if len(data) > most and _count(data, most) > most:  # a byte is one entry at most
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
    """The number at a position and the position after it; ``end`` where there is none."""
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


MOST_NODES = 1 << 20


_Key = tuple[str, str, str]


def check_functions(model: onnx.ModelProto, most: int = MOST_NODES) -> None:
    """Raises ModelError: a function defined twice, calling itself, or too large once expanded."""
    functions: dict[_Key, onnx.FunctionProto] = {}
    for function in model.functions:
        key = (function.domain, function.name, function.overload)
        if functions.setdefault(key, function) is not function:
            raise ModelError(f"function {function.name!r} is defined twice")
    sizes: dict[_Key, int] = {}
    for key in functions:
        _measure(key, functions, sizes)
    size = sum(sizes.get(_key(node), 1) for node in walk(model.graph.node))
    if functions and size > most:
        raise ModelError(f"the model has {size} nodes once its functions are expanded, over {most}")


def walk(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes, and those in their bodies."""
    for node in nodes:
        yield node
        for body in bodies(node):
            yield from walk(body.node)


def _key(node: onnx.NodeProto) -> _Key:
    return (node.domain, node.op_type, node.overload)


def _measure(
    start: _Key, functions: dict[_Key, onnx.FunctionProto], sizes: dict[_Key, int]
) -> None:
    """Enter the number of a function's nodes, once expanded, into ``sizes``.

    With an explicit stack, since chains of calls can be long.
    """
    open_calls: set[_Key] = set()
    stack = [start]
    while stack:
        key = stack[-1]
        called = [_key(node) for node in walk(functions[key].node)]
        waiting = {k for k in called if k in functions and k not in sizes}
        if key in sizes or not waiting:
            sizes.setdefault(key, sum(sizes.get(k, 1) for k in called))
            open_calls.discard(key)
            stack.pop()
            continue
        if waiting & (open_calls | {key}):
            raise ModelError(f"function {key[1]!r} calls itself, directly or through others")
        open_calls.add(key)
        stack.extend(sorted(waiting))
