"""Shapes for several assignments of numbers to the inputs' symbolic dimensions.

With numbers, slices, ranges and broadcasts have known sizes, unlike with symbols. Shape arithmetic
is evaluated alternately with ONNX inference until nothing new is found. Dimensions that depend on
the data stay symbolic.

Shape functions of exported models are sums, products, quotients rounded down, minima and maxima of
dimensions. A quotient is constant over a range of small sizes: a convolution of 16 x 16 patches
makes one row of any image of 16 to 31 rows. So dimensions are probed at several magnitudes, and a
size of one, which small quotients, products and minima share, proves nothing: ``equal_in`` and
``fixed_in``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from qcompile.errors import ModelError
from qcompile.ir import Graph, Node, Shape, is_op, shape_of
from qcompile.ir.analysis.constant_evaluation import Evaluator, evaluable, fold_shape, put_values
from qcompile.ir.analysis.shape_inference import infer
from qcompile.ir.model_io.from_proto import from_proto
from qcompile.ir.model_io.to_proto import skeleton

_PRIMES = tuple(n for n in range(2, 2000) if all(n % d for d in range(2, 45) if d < n))
# Primes, so that no product of other dimensions equals one of them by chance, and a probe of ones,
# which shows broadcasting. Small, so that position tables are long enough; and enough of them that
# no two dimensions get the same.
_MORE = tuple(n for n in _PRIMES if n > 30)
_PROBES = ((7, 11, 3, 17, 5, 13, *_MORE), (13, 5, 19, 2, 29, 23, *_MORE), (1,))
# Larger primes, in three probes of different magnitudes, so that quotients differ too. The first
# row that the model takes counts: a position table ends, and so does memory.
_MAGNITUDES = tuple((m, 3 * m // 5, 2 * m // 5) for m in (900, 450, 200, 60, 35))
# Multiples of strides and windows, for models that take no primes: n times one of these.
_STRIDES = (32, 96, 160)
_ROUNDS = 12
_SMALL = 4096


def probed_shapes(graph: Graph, evaluate: Evaluator) -> list[dict[str, Shape]]:
    """Shapes by tensor name, one dictionary for each probe whose sizes the model takes.

    Where it takes none, those of small sizes, as far as they can be inferred: no evidence, since
    operands do not fit each other.
    """
    return consistent_probes(graph, evaluate) or [_probe(graph, p, evaluate) for p in _PROBES]


def consistent_probes(
    graph: Graph, evaluate: Evaluator, *, complete: bool = True
) -> list[dict[str, Shape]]:
    """The probes whose sizes the model takes, of several magnitudes: their shapes are evidence.

    complete: only those in which as many shapes are known as in any.
    """
    probes = [p for sizes in _PROBES if (p := _consistent(graph, sizes, evaluate)) is not None]
    known = max(map(_known, probes), default=0) if complete else 0
    rows = [[[n for n in _PRIMES if n > m] for m in magnitudes] for magnitudes in _MAGNITUDES]
    for row in (*rows, [[stride * n for n in _PRIMES] for stride in _STRIDES]):
        large: list[dict[str, Shape]] = []
        for sizes in row:
            probe = _consistent(graph, tuple(sizes), evaluate)
            if probe is None or _known(probe) < known:
                break
            large.append(probe)
        else:
            return [*probes, *large]
    return []


def _consistent(
    graph: Graph, sizes: tuple[int, ...], evaluate: Evaluator
) -> dict[str, Shape] | None:
    try:
        return _probe(graph, sizes, evaluate, strict=True)
    except ModelError:
        return None


def _known(shapes: Mapping[str, Shape]) -> int:
    """How many shapes have no symbol."""
    return sum(all(isinstance(d, int) for d in shape) for shape in shapes.values())


def equal_in(pairs: Sequence[tuple[int | str | None, int | str | None]]) -> bool:
    """True where two dimensions are equal in every probe, at two sizes over one at least."""
    sizes = {a for a, _ in pairs if isinstance(a, int) and a > 1}
    return all(a == b for a, b in pairs) and len(sizes) > 1


def fixed_in(sizes: Sequence[int | str | None]) -> int | None:
    """The size over one that a dimension has in every probe, None where it varies."""
    first = sizes[0] if sizes else None
    return first if isinstance(first, int) and first > 1 and {*sizes} == {first} else None


def shapes_for(
    graph: Graph, inputs: Mapping[str, tuple[int, ...]], evaluate: Evaluator
) -> dict[str, Shape]:
    """Shapes by tensor name for inputs of these shapes, as far as they do not depend on data."""
    model = skeleton(graph)
    for info in model.graph.input:
        if info.name in inputs:
            dims = info.type.tensor_type.shape.dim
            del dims[:]
            for size in inputs[info.name]:
                dims.add(dim_value=size)
    return shapes_of(model, evaluate)


def shapes_at(
    graph: Graph, numbers: Mapping[str, int], others: tuple[int, ...], evaluate: Evaluator
) -> dict[str, Shape]:
    """Shapes by tensor name for these sizes of symbolic dimensions; others get ``others`` in order.

    Raises ModelError where the model does not take them.
    """
    model = skeleton(graph)
    _fix_inputs(model, others, numbers)
    return shapes_of(model, evaluate, strict=True)


def _probe(
    graph: Graph, sizes: tuple[int, ...], evaluate: Evaluator, *, strict: bool = False
) -> dict[str, Shape]:
    model = skeleton(graph)
    _fix_inputs(model, sizes)
    return shapes_of(model, evaluate, strict=strict)


def shapes_of(
    model: onnx.ModelProto, evaluate: Evaluator, *, strict: bool = False
) -> dict[str, Shape]:
    """Shapes by tensor name, as far as they follow from those of the model's inputs.

    Raises ModelError where a tensor would be too large, or, if ``strict``, where operands do not
    fit each other.
    """
    small = from_proto(model)
    seen: dict[str, Shape] = {}
    for _ in range(_ROUNDS):
        for tensor in small.outputs:
            tensor.shape = None
        infer(small)
        found = {n: s for n, t in small.tensors().items() if (s := shape_of(t)) is not None}
        seen.update(found)
        if not _fold(small, evaluate):
            break
        small.sort()
    if strict:
        _check_operands(small)
    return seen


def _check_operands(graph: Graph) -> None:
    """Raises ModelError where operands do not fit, as behind the end of a position table, or a
    Reshape makes more or fewer values, as of windows that do not divide an image."""
    try:
        onnx.shape_inference.infer_shapes(skeleton(graph), strict_mode=True, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as e:
        raise ModelError(f"the shapes of the operands do not match: {e}") from e
    for node in graph.nodes:
        sizes = [_size(shape_of(t)) for t in (*node.inputs[:1], *node.outputs[:1])]
        if is_op(node, "Reshape") and None not in sizes and len({*sizes}) > 1:
            raise ModelError(f"node {node.name!r} reshapes {sizes[0]} values into {sizes[1]}")


def _size(shape: Shape | None) -> int | None:
    """How many values a tensor has, None where that is unknown."""
    dims = [d for d in shape or (None,) if isinstance(d, int)]
    return math.prod(dims) if shape is not None and len(dims) == len(shape) else None


def _fix_inputs(
    model: onnx.ModelProto, sizes: tuple[int, ...], chosen: Mapping[str, int] | None = None
) -> None:
    numbers: dict[str, int] = {}
    for info in model.graph.input:
        for i, dim in enumerate(info.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value"):
                key = dim.dim_param or f"{info.name}:{i}"
                known = (chosen or {}).get(key)
                if known is None:
                    known = numbers.setdefault(key, sizes[len(numbers) % len(sizes)])
                dim.dim_value = known


def _fold(graph: Graph, evaluate: Evaluator) -> bool:
    changed = False
    for node in graph.nodes:
        if is_op(node, "Shape"):
            changed |= fold_shape(graph, node, shape_of(node.inputs[0]))
    nodes = evaluable(graph, _is_small)
    values = evaluate(graph, nodes) if nodes else {}
    if isinstance(values, dict):
        changed |= bool(put_values(graph, nodes, values))
    return bool(graph.remove_dead()) or changed


def _is_small(node: Node) -> bool:
    """True where all results have a known, small size, as in shape arithmetic."""
    shapes = [shape_of(t) for t in node.outputs]
    return all(
        s is not None
        and all(isinstance(d, int) for d in s)
        and int(np.prod([int(d or 0) for d in s], dtype=np.int64)) <= _SMALL
        for s in shapes
    )
