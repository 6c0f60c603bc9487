"""Makes int8 matrix multiplications exact on x86 without VNNI, by multiplying uint8 by uint8.

There ONNX Runtime adds products of uint8 by int8 in int16, which saturates, and those of uint8 by
uint8 in int32. Its session option ``session.x64quantprecision`` shifts constant int8 weights to
uint8 where optimizations are on. This module does what that option does not: right operands that
are computed, constants in sessions without optimizations, and copies of weights that several
operators read, on which the option fails ("Attempt to replace the existing tensor", ONNX Runtime
1.32), and explicit zero points of weights per channel, where it would add a scalar, which is no
valid zero point. A shift of both values and zero point by 128 does not change the result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qcompile.ir.model_io.computed_at_load import sources
from qcompile.ir.model_io.element_types import element_types
from qcompile.ir.model_io.external_data import Storage, values_of
from qcompile.ir.quantized_operators import Operand, byte_products
from qcompile.ir.subgraph import bodies
from qcompile.quant import Array

_SHIFT = 128


def exact_form(
    model: onnx.ModelProto, storage: Storage | None = None, *, optimized: bool = True
) -> bool:
    """Turn int8 right operands of uint8 data into uint8, in place; True where anything changed.

    ``optimized``: the session option will shift the constants, so shared ones are only copied.
    ``storage`` locates values that the model does not hold; shifted ones become part of the model.
    Functions are unchanged: with optimizations ONNX Runtime inlines them first.
    """
    storage = storage or Storage()
    changed = _rewrite(model.graph, storage, {}, {}, constants=not optimized)
    if not optimized:
        return changed
    completed, copied = _add_zero_points(model.graph), _copy_shared(model.graph, storage)
    return completed or copied or changed


def _rewrite(
    graph: onnx.GraphProto,
    storage: Storage,
    outer: dict[str, onnx.TensorProto],
    types: dict[str, int],
    *,
    constants: bool,
) -> bool:
    """Shift operands of a graph, and in its subgraphs, which the session option ignores, all."""
    edit = _Edit(graph, storage, outer, types, constants=constants)
    nodes = [n for node in graph.node for n in edit.rewritten(node)]
    inner = [
        _rewrite(body, storage, edit.constants, edit.types, constants=True)
        for node in nodes
        for body in bodies(node)
    ]
    del graph.node[:]
    graph.node.extend(nodes)
    return edit.changed or any(inner)


def shares_weights(model: onnx.ModelProto) -> bool:
    """True where several nodes read one int8 constant, on which the session option fails.

    A weight that ONNX Runtime unpacks when it loads the model is a constant.
    """
    types = element_types(model.graph)
    constants = {name for name in sources(model.graph) if types.get(name) == TensorProto.INT8}
    readers = Counter(name for node in model.graph.node for name in node.input)
    dequantizers = (n for n in model.graph.node if n.op_type == "DequantizeLinear")
    dequantized = {n.output[0] for n in dequantizers if n.input[0] in constants}
    return any(readers[name] > 1 for name in constants | dequantized)


def _add_zero_points(graph: onnx.GraphProto) -> bool:
    """Give DequantizeLinear of int8 constants per channel its zero point, where it has none."""
    constants = {t.name: t for t in graph.initializer}
    changed = False
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or any(node.input[2:]):
            continue
        values, scale = (constants.get(name) for name in node.input[:2])
        if values is None or values.data_type != TensorProto.INT8:
            continue
        if scale is None or len(scale.dims) != 1:
            continue
        zero = numpy_helper.from_array(np.zeros(scale.dims, np.int8), f"{node.output[0]}/zero")
        graph.initializer.append(zero)
        node.input[:] = [*node.input[:2], zero.name]
        changed = True
    return changed


def _copy_shared(graph: onnx.GraphProto, storage: Storage) -> bool:
    """Give each operator its own copy of int8 constants, and each reader its own dequantizer.

    External data is not copied.
    """
    constants = {t.name: t for t in graph.initializer if t.data_type == TensorProto.INT8}
    nodes = list(graph.node)
    changed = _copy_dequantizers(nodes, constants)
    seen: set[str] = set()
    for i, node in enumerate(nodes):
        for slot, name in enumerate(node.input):
            tensor = constants.get(name)
            if tensor is None or name not in seen:
                seen.add(name)
                continue
            copy = graph.initializer.add()
            copy.CopyFrom(tensor)
            copy.name = node.input[slot] = f"{name}/{i}.{slot}"
            if name in storage.spans:
                copy.raw_data = values_of(tensor, storage).tobytes()
            changed = True
    if changed:
        del graph.node[:]
        graph.node.extend(nodes)
    return changed


def _copy_dequantizers(
    nodes: list[onnx.NodeProto], constants: Mapping[str, onnx.TensorProto]
) -> bool:
    makers = {
        n.output[0]: n for n in nodes if n.op_type == "DequantizeLinear" and n.input[0] in constants
    }
    seen, changed = set[str](), False
    for i, node in enumerate(list(nodes)):
        for slot, name in enumerate(node.input):
            if name in makers and name in seen:
                copy = onnx.NodeProto()
                copy.CopyFrom(makers[name])
                copy.name = copy.output[0] = node.input[slot] = f"{name}/{i}.{slot}"
                nodes.insert(nodes.index(makers[name]) + 1, copy)
                changed = True
            seen.add(name)
    return changed


class _Edit:
    """Rewrites one graph: the state of its tensors, and the shifted ones.

    ``outer``, ``types``: constants and element types of the graph around it.
    """

    def __init__(
        self,
        graph: onnx.GraphProto,
        storage: Storage,
        outer: dict[str, onnx.TensorProto],
        types: dict[str, int],
        *,
        constants: bool,
    ) -> None:
        self.graph, self.storage, self.shifts_constants = graph, storage, constants
        inputs = {value.name for value in graph.input}  # a feed may replace an initializer
        own = {t.name: t for t in graph.initializer if t.name not in inputs}
        self.constants = {**outer, **own}
        self.types = {**types, **element_types(graph)}
        self.shifted: dict[str, str] = {}  # names of uint8 tensors by those of int8 ones
        self.changed = False

    def rewritten(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """The operator, after the nodes that shift its right operands."""
        for left, right in byte_products(node):
            if self._must_shift(node, left, right):
                self.changed = True
                yield from self._shift(node, right)
        yield node

    def _must_shift(self, node: onnx.NodeProto, left: Operand, right: Operand) -> bool:
        if not left.is_float and self.types.get(left.names(node)[0]) == TensorProto.INT8:
            return False
        name, _, _ = right.names(node)
        if name in self.constants and not self.shifts_constants:
            return False
        return self.types.get(name) == TensorProto.INT8

    def _shift(self, node: onnx.NodeProto, right: Operand) -> Iterator[onnx.NodeProto]:
        for slot in (s for s in (right.value, right.zero_point) if s is not None):
            node.input.extend([""] * (slot + 1 - len(node.input)))
            name = node.input[slot]
            if not name:  # a missing zero point is 0
                self.shifted[name] = self._constant("zero/uint8", np.array(_SHIFT, np.uint8))
            elif name not in self.shifted and name in self.constants:
                values = values_of(self.constants[name], self.storage)
                shifted = (values.astype(np.int16) + _SHIFT).astype(np.uint8)
                self.shifted[name] = self._constant(f"{name}/uint8", shifted)
            elif name not in self.shifted:
                yield from self._computed(name)
            node.input[slot] = self.shifted[name]

    def _computed(self, name: str) -> Iterator[onnx.NodeProto]:
        """Nodes that shift a computed tensor: in int32, since the sum does not fit into int8."""
        shift = self._constant(f"{name}/shift", np.array(_SHIFT, np.int32))
        wide, moved, self.shifted[name] = (f"{name}/{n}" for n in ("int32", "moved", "uint8"))
        yield helper.make_node("Cast", [name], [wide], to=TensorProto.INT32)
        yield helper.make_node("Add", [wide, shift], [moved])
        yield helper.make_node("Cast", [moved], [self.shifted[name]], to=TensorProto.UINT8)

    def _constant(self, name: str, values: Array) -> str:
        if name not in self.constants:
            self.graph.initializer.append(numpy_helper.from_array(values, name))
            self.constants[name] = self.graph.initializer[-1]
            self.types[name] = self.constants[name].data_type
        return name
