"""Numbers for the dimensions of every tensor, in which equal numbers mean equal sizes.

Each tensor has one shape of integers per probe. Where the model takes the sizes of
``consistent_probes``, they are the probes. Or each symbol of ONNX's shape inference gets a prime of
its own: then only what the symbols prove counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from qcompile.errors import ModelError
from qcompile.ir import (
    Graph,
    Node,
    Shape,
    Tensor,
    array,
    is_constant,
    is_float,
    is_op,
    rank,
    scalar,
)
from qcompile.ir.analysis.constant_evaluation import Evaluator
from qcompile.ir.analysis.shape_inference import inferred_shapes
from qcompile.ir.analysis.shape_probing import consistent_probes, shapes_at
from qcompile.ir.model_io.from_proto import from_proto
from qcompile.ir.model_io.to_proto import skeleton
from qcompile.ir.operators import ONNX, SKIP_NORMALIZATIONS

Size: TypeAlias = tuple[int, ...]  # of one dimension, in every probe
_FIRST_PRIME = 1_000_003  # larger than any dimension of a weight
_SIDES = (32, 64, 96, 128, 160, 192, 224, 256, 288, 336, 384, 448, 512)  # of images, in pixels
_PRIMES = ((7, 11, 3, 17, 5), (13, 5, 19, 2, 23), (29, 31, 37, 41, 43))  # of other dimensions
_SAME_SHAPE = (
    "com.microsoft.BiasGelu", "com.microsoft.FastGelu", "com.microsoft.Gelu",
    "com.microsoft.MultiHeadAttention", "com.microsoft.QuickGelu", *SKIP_NORMALIZATIONS,
)  # fmt: skip
_VIEWS = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze")


def product(sizes: Sequence[Size], probes: int) -> Size:
    """The product of several dimensions; of none, it is 1."""
    return tuple(math.prod(s[i] for s in sizes) for i in range(probes))


def fixed(size: Size) -> int | None:
    """The one value that a size has in every probe, None where it varies."""
    return size[0] if len({*size}) == 1 and size[0] < _FIRST_PRIME else None  # else a symbol


@dataclass
class Sizes:
    """Sizes of the graph's tensors, and where the graph itself has them."""

    graph: Graph
    probes: Sequence[Mapping[str, Shape]]
    _found: dict[str, tuple[Size, ...] | None] = field(default_factory=dict)

    def of(self, tensor: Tensor) -> tuple[Size, ...] | None:
        """A tensor's dimensions, None where one is unknown in some probe."""
        if tensor.name not in self._found:
            self._found[tensor.name] = self._numbers(tensor)
        return self._found[tensor.name]

    def _numbers(self, tensor: Tensor) -> tuple[Size, ...] | None:
        flatten = self.graph.producer(tensor, "Flatten")
        if flatten is not None:  # inference does not multiply symbols
            dims, at = self.of(flatten.inputs[0]), int(flatten.attrs.get("axis", 1))
            if dims is None:
                return None
            at = at + len(dims) if at < 0 else at
            return tuple(product(part, len(self.probes)) for part in (dims[:at], dims[at:]))
        if is_constant(tensor):
            return tuple((int(n),) * len(self.probes) for n in tensor.shape)
        rows: list[tuple[int, ...]] = []
        for probe in self.probes:
            shape = probe.get(tensor.name)
            whole = [d for d in shape or () if isinstance(d, int)]
            if shape is None or len(whole) < len(shape):
                return None
            rows.append(tuple(whole))
        if len({len(row) for row in rows}) != 1:
            return None
        return tuple(zip(*rows, strict=True))

    def source(self, size: Size) -> int | tuple[Tensor, int] | None:
        """A dimension's value, or the graph input and the axis that have it; else None."""
        value = fixed(size)
        if value is not None:
            return value
        for tensor in self.graph.inputs:
            dims = self.of(tensor) or ()
            if size in dims:
                return tensor, dims.index(size)
        return None

    def value(self, tensor: Tensor) -> Size | None:
        """The dimension that a tensor with one element holds: a constant, or Shape(x)[i]."""
        while not is_constant(tensor):
            node = self.graph.producer(tensor)
            if node is None or not is_op(node, *_VIEWS):
                return None if node is None else self._read(node)
            tensor = node.inputs[0]
        number = scalar(tensor)
        return None if number is None else (int(number),) * len(self.probes)

    def _read(self, node: Node) -> Size | None:
        if is_op(node, "Shape"):
            whole = self.of(node.inputs[0]) or ()
            chosen = whole[node.attrs.get("start", 0) : node.attrs.get("end", len(whole))]
            return chosen[0] if len(chosen) == 1 else None
        if not is_op(node, "Gather", "Slice") or not is_constant(node.inputs[1]):
            return None
        shape = self.graph.producer(node.inputs[0], "Shape")
        if shape is None or "start" in shape.attrs or "end" in shape.attrs:
            return None
        dims, index = self.of(shape.inputs[0]), array(node.inputs[1])
        if dims is None or index.size != 1 or not -len(dims) <= int(index.flat[0]) < len(dims):
            return None
        if is_op(node, "Slice") and node.outputs[0].shape not in ([1], (1,)):
            return None
        return dims[int(index.flat[0])]


def sizes_of(graph: Graph, evaluate: Evaluator) -> Iterator[Sizes]:
    """Sizes by probing, if the model takes any of the sizes that are tried, and by symbols."""
    known = _in_standard_operators(graph)
    probes = consistent_probes(known, evaluate, complete=False)
    probes = probes or _image_probes(known, evaluate)
    if probes:
        yield Sizes(graph, probes)
    yield Sizes(graph, [_primes_for_symbols(inferred_shapes(known))])


def _in_standard_operators(graph: Graph) -> Graph:
    """The graph without weights, with Identity for operators of ONNX Runtime that keep the shape of
    their first operand: ONNX inference does not know them."""
    model = skeleton(graph)
    for node in model.graph.node:
        if is_op(node, *_SAME_SHAPE):
            node.op_type, node.domain = "Identity", ONNX
            del node.attribute[:], node.input[1:], node.output[1:]
    return from_proto(model)


def _image_probes(graph: Graph, evaluate: Evaluator) -> list[dict[str, Shape]]:
    """Probes of a model of images whose open sizes have to fit, as by its position table: those of
    all square images that it takes, for several sizes of all other dimensions."""
    images = [t for t in graph.inputs if is_float(t) and rank(t) == 4]
    open_axes = {d for t in images for d in (t.shape or ())[1:] if isinstance(d, str)}
    if not open_axes:
        return []
    found = []
    for side in _SIDES:
        for primes in _PRIMES:
            numbers = {d: side for t in images for d in t.shape[2:] if isinstance(d, str)}
            numbers |= {
                t.shape[1]: _channels(graph, t) for t in images if isinstance(t.shape[1], str)
            }
            try:
                probe = shapes_at(graph, numbers, primes, evaluate)
            except ModelError:
                break
            found.append(probe)
    return found


def _channels(graph: Graph, image: Tensor) -> int:
    """What the first convolution of an image reads; 3 where none does."""
    convolutions = (n for n in graph.consumers(image) if is_op(n, "Conv"))
    weights = ((n.inputs[1], int(n.attrs.get("group", 1))) for n in convolutions)
    return next((int(w.shape[1]) * groups for w, groups in weights if is_constant(w)), 3)


def _primes_for_symbols(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    names = dict.fromkeys(d for s in shapes.values() for d in s if isinstance(d, str))
    primes: dict[str, int] = {}
    number = _FIRST_PRIME
    for name in names:
        while any(number % d == 0 for d in range(2, math.isqrt(number) + 1)):
            number += 1
        primes[name], number = number, number + 1
    return {
        tensor: tuple(primes[d] if isinstance(d, str) else d for d in shape)
        for tensor, shape in shapes.items()
    }
