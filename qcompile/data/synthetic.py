"""Made-up feeds: for benchmarks, and for compiling without data.

What an input holds follows from what the graph does with it, then from its name:

| input | values |
|---|---|
| ``token_type`` or ``segment`` in its name | 0 |
| integer, an index into a constant table (Gather) | random rows of that table |
| ``mask`` in its name | 1 |
| another integer | 0 or 1, random |
| float | standard normal |
| bool | True |

How large it is: a symbolic dimension's size is given by name, or read off a given shape; else a
name with ``batch`` is 1, with ``seq`` or ``len`` 128, with ``height`` or ``width`` 224; the second
axis of a rank-2 integer input (tokens) is 128, and anything else 1. ``a + b`` is the sum of both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from qcompile.data.feeds import Feed, InputSpec, input_specs, is_floating
from qcompile.errors import DataError
from qcompile.ir import Graph, Node, Tensor, is_constant, is_op
from qcompile.ir.analysis.dimension_names import base_name
from qcompile.ir.operators import MOVERS
from qcompile.quant import Array

DEFAULT_LENGTH = 128
_MOST = 1 << 30
# None: ``length``.
_BY_NAME = (("batch", 1), ("seq", None), ("len", None), ("height", 224), ("width", 224))
_PASS_INDICES = (*MOVERS, "Cast", "Identity")
_PASS_TABLE = ("Cast", "DequantizeLinear", "Identity", "QuantizeLinear")
# Operators that look up rows: the input slots of (indices, table).
_LOOKUPS = {
    "Gather": ((1, 0),),
    "com.microsoft.GatherBlockQuantized": ((1, 0),),
    "com.microsoft.EmbedLayerNormalization": ((0, 2), (1, 4)),
}


def synthetic_feeds(
    graph: Graph,
    dims: Mapping[str, int],
    count: int,
    seed: int,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    length: int = DEFAULT_LENGTH,
) -> list[Feed]:
    """``count`` feeds of the model's inputs, in their declared types.

    ``dims`` sizes symbolic dimensions by name, all of the name (``batch#0`` is ``batch`` too);
    ``shapes`` whole inputs by name (and with them the symbolic dimensions they have, where the
    sizes of a name agree). ``length``: tokens where nothing says how many. Raises DataError: an
    unknown name, a shape that does not fit its declaration or ``dims``, an input of strings or of
    unknown rank without a shape, over 1 GiB altogether.
    """
    inputs = input_specs(graph)
    sizes = feed_shapes(inputs, dims, shapes or {}, length)
    total = count * sum(spec.dtype.itemsize * math.prod(sizes[spec.name]) for spec in inputs)
    if total > _MOST:
        raise DataError(f"random inputs would take {total} bytes, over {_MOST}")
    rows = {t.name: table_rows(graph, t) for t in graph.inputs}
    rng = np.random.default_rng(seed)
    return [
        {spec.name: _values(spec, sizes[spec.name], rows[spec.name], rng) for spec in inputs}
        for _ in range(count)
    ]


def guessed_lengths(
    inputs: Sequence[InputSpec], dims: Mapping[str, int], shapes: Mapping[str, Sequence[int]]
) -> list[tuple[str, str]]:
    """Input and name of each dimension whose size is ``length``, as nothing says another; an
    unnamed one is ``?``. Raises DataError."""
    one, two = (feed_shapes(inputs, dims, shapes, length) for length in (1, 2))
    return [
        (spec.name, str(spec.dim(axis) or "?"))
        for spec in inputs
        for axis in range(len(one[spec.name]))
        if one[spec.name][axis] != two[spec.name][axis]
    ]


def feed_shapes(
    inputs: Sequence[InputSpec],
    dims: Mapping[str, int],
    shapes: Mapping[str, Sequence[int]],
    length: int = DEFAULT_LENGTH,
) -> dict[str, tuple[int, ...]]:
    """The shape of each input once every symbolic dimension has a size. Raises DataError."""
    bound = _bound(inputs, dims, shapes)
    return {
        spec.name: tuple(shapes[spec.name])
        if spec.name in shapes
        else tuple(_size(spec, axis, bound, inputs, length) for axis in range(_rank(spec)))
        for spec in inputs
    }


def _rank(spec: InputSpec) -> int:
    if spec.shape is None:
        raise DataError(f"input {spec.name!r} has no declared rank, expected a shape for it")
    return len(spec.shape)


def _bound(
    inputs: Sequence[InputSpec], dims: Mapping[str, int], shapes: Mapping[str, Sequence[int]]
) -> dict[str, int]:
    """Sizes of symbolic dimensions, from ``dims`` and from ``shapes``, where those agree."""
    _check_known("dimension", dims, _symbols(inputs))
    _check_known("input", shapes, [spec.name for spec in inputs])
    for name, size in dims.items():
        if size < 0:
            raise DataError(f"dimension {name!r}: found {size}, expected 0 or more")
    found: dict[str, set[int]] = {name: {size} for name, size in dims.items()}
    for spec in inputs:
        if spec.name in shapes:
            _bind(spec, shapes[spec.name], dims, found)
    return {name: sizes.pop() for name, sizes in found.items() if len(sizes) == 1}


def _symbols(inputs: Iterable[InputSpec]) -> list[str]:
    """Names of symbolic dimensions, those of a sum too, in the model's order."""
    named = [d for spec in inputs for d in spec.shape or () if isinstance(d, str)]
    return list(dict.fromkeys(part for d in named for part in (d, base_name(d), *_parts(d))))


def _parts(dim: str) -> list[str]:
    parts = [part.strip() for part in dim.split("+")]
    return parts if len(parts) > 1 and all(parts) else []


def _check_known(what: str, given: Iterable[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            had = ", ".join(known) or "none"
            raise DataError(f"no {what} of the model's inputs is named {name!r}; there are: {had}")


def _bind(
    spec: InputSpec, given: Sequence[int], dims: Mapping[str, int], found: dict[str, set[int]]
) -> None:
    """Enter the sizes in a given shape; raises DataError where it does not fit the declared one."""
    where = f"shape {'x'.join(map(str, given))} for input {spec.name!r}"
    if any(size < 0 for size in given):
        raise DataError(f"{where}: found a negative size, expected 0 or more")
    if spec.shape is None:
        return
    if len(given) != len(spec.shape):
        raise DataError(f"{where}: found rank {len(given)}, expected {len(spec.shape)}")
    for axis, (declared, size) in enumerate(zip(spec.shape, given, strict=True)):
        expected = declared
        if isinstance(declared, str):
            expected = dims.get(declared, dims.get(base_name(declared)))
        if isinstance(declared, str):
            found.setdefault(declared, set()).add(size)
        if expected not in (None, size):
            what = f" ({declared})" if isinstance(declared, str) else ""
            raise DataError(f"{where}: found {size} on axis {axis}{what}, expected {expected}")


def _size(
    spec: InputSpec,
    axis: int,
    bound: Mapping[str, int],
    inputs: Sequence[InputSpec],
    length: int,
) -> int:
    declared = spec.dim(axis)
    if isinstance(declared, int):
        return declared
    if declared is None:
        return length if _is_token_axis(spec, axis) else 1
    return _symbol_size(declared, bound, inputs, length)


def _symbol_size(
    name: str, bound: Mapping[str, int], inputs: Sequence[InputSpec], length: int
) -> int:
    if (known := bound.get(name, bound.get(base_name(name)))) is not None:
        return known
    if parts := _parts(name):
        return sum(_symbol_size(part, bound, inputs, length) for part in parts)
    for word, size in _BY_NAME:
        if word in name.lower():
            return length if size is None else size
    is_token = any(
        _is_token_axis(s, a) for s in inputs for a, d in enumerate(s.shape or ()) if d == name
    )
    return length if is_token else 1


def _is_token_axis(spec: InputSpec, axis: int) -> bool:
    """Axis 1 of an integer [batch, sequence] input: ids, a mask, segments."""
    return axis == 1 and len(spec.shape or ()) == 2 and spec.dtype.kind in "iu"


def table_rows(graph: Graph, tensor: Tensor) -> int | None:
    """Rows of the smallest constant table that a tensor indexes, None where it indexes none.

    Follows the indices through casts and reshapes, and the table through its dequantization.
    """
    found: list[int] = []
    stack, seen = [tensor], {id(tensor)}
    while stack:
        current = stack.pop()
        for node in graph.consumers(current):
            found += _looked_up(graph, node, current)
            if is_op(node, *_PASS_INDICES) and node.inputs[0] is current:
                fresh = [t for t in node.outputs if id(t) not in seen]
                seen |= {id(t) for t in fresh}
                stack += fresh
    return min(found, default=None)


def _looked_up(graph: Graph, node: Node, indices: Tensor) -> list[int]:
    """Row counts of the constant tables that this node reads at ``indices``."""
    slots = next((slots for op, slots in _LOOKUPS.items() if is_op(node, op)), ())
    axis = int(node.attrs.get("axis", node.attrs.get("gather_axis", 0)))
    counts = []
    for index_slot, table_slot in slots:
        if len(node.inputs) <= max(table_slot, index_slot):
            continue  # a damaged node
        if node.inputs[index_slot] is not indices:
            continue
        shape = _table_shape(graph, node.inputs[table_slot])
        if shape and -len(shape) <= axis < len(shape):
            counts.append(shape[axis])
    return counts


def _table_shape(graph: Graph, tensor: Tensor) -> tuple[int, ...]:
    """Shape of a constant, seen through what dequantizes it; empty where it is computed."""
    while not is_constant(tensor):
        maker = graph.producer(tensor)
        if maker is None or not is_op(maker, *_PASS_TABLE):
            return ()
        tensor = maker.inputs[0]
    return tuple(int(d) for d in tensor.shape)


def _values(
    spec: InputSpec, shape: tuple[int, ...], rows: int | None, rng: np.random.Generator
) -> Array:
    name, dtype = spec.name.lower(), spec.dtype
    if dtype.kind == "O":
        raise DataError(f"input {spec.name!r} holds strings, which cannot be made up: give data")
    if dtype.kind == "b":
        return np.ones(shape, dtype)
    if "token_type" in name or "segment" in name:
        return np.zeros(shape, dtype)
    if rows and dtype.kind in "iu":
        return rng.integers(0, rows, shape).astype(dtype)
    if "mask" in name:
        return np.ones(shape, dtype)
    if is_floating(dtype):
        return rng.standard_normal(shape, np.float32).astype(dtype)
    return rng.integers(0, 2, shape).astype(dtype)
