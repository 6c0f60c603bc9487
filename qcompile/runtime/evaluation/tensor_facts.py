"""Static facts about a graph's tensors: types, shapes, constants, producers."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from qcompile.ir import is_op
from qcompile.ir.model_io.element_types import element_types
from qcompile.ir.model_io.external_data import Storage, values_of
from qcompile.ir.operators import LAYOUT
from qcompile.ir.subgraph import bodies
from qcompile.quant import Array


class TensorFacts:
    """Types, shapes, constants and producers; ``outer``: facts of the graph around this one.

    ``storage`` locates values that the model does not hold. An initializer that is also a graph
    input is not a constant: a feed may replace it. ``functions``: the model's, as ``op_name`` gives
    their calls.
    """

    def __init__(
        self,
        graph: onnx.GraphProto,
        storage: Storage,
        outer: TensorFacts | None = None,
        functions: frozenset[str] = frozenset(),
    ) -> None:
        inputs = {value.name for value in graph.input}
        typed = (*graph.value_info, *graph.input, *graph.output)
        self.storage, self._outer = storage, outer
        self.functions: frozenset[str] = outer.functions if outer else functions
        self._constants = {t.name: t for t in graph.initializer if t.name not in inputs}
        self._makers = {name: node for node in graph.node for name in node.output if name}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._types = element_types(graph)
        self._declared = {v.name: v.type.tensor_type for v in typed}
        self.names = set(_names(graph))  # all names in it, also in subgraphs

    def type(self, name: str) -> int:
        """The element type, 0 where unknown."""
        return self._types.get(name) or (self._outer.type(name) if self._outer else 0)

    def values(self, name: str) -> Array | None:
        """The values of a constant, None for other tensors."""
        if name in self._constants:
            return values_of(self._constants[name], self.storage)
        return self._outer.values(name) if self._outer else None

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Sizes, 0 where unknown; None where the rank is unknown."""
        if name in self._constants:
            return tuple(self._constants[name].dims)
        known = self._declared.get(name)
        if known is None or not known.HasField("shape"):
            return self._outer.shape(name) if self._outer else None
        return tuple(dim.dim_value for dim in known.shape.dim)

    def is_single(self, name: str) -> bool:
        """True where the tensor is known to be a scalar or a vector of one element."""
        maker = self._makers.get(name)
        if maker is not None and is_op(maker, "DynamicQuantizeLinear"):
            return True  # the scale, or the zero point
        return self.shape(name) in ((), (1,))

    def maker(self, name: str) -> onnx.NodeProto | None:
        """The node that computes a tensor, also in the graph around; None for others."""
        return self._makers.get(name) or (self._outer.maker(name) if self._outer else None)

    def readers(self, name: str) -> list[onnx.NodeProto]:
        """The nodes of this graph, without its subgraphs, that read a tensor."""
        return self._readers.get(name, [])

    def source(self, name: str) -> onnx.NodeProto | None:
        """The node that computes a tensor's values, before layout operators and Gather."""
        node = self.maker(name)
        while node is not None and is_op(node, *LAYOUT, "Gather"):
            node = self.maker(node.input[0])
        return node


def function_names(model: onnx.ModelProto) -> frozenset[str]:
    """The model's own functions, as ``op_name`` gives their calls."""
    return frozenset(f"{f.domain}.{f.name}" if f.domain else f.name for f in model.functions)


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    yield from (t.name for t in graph.initializer)
    yield from (v.name for v in (*graph.input, *graph.output, *graph.value_info))
    for node in graph.node:
        yield from (node.name, *node.input, *node.output)
        for body in bodies(node):
            yield from _names(body)
