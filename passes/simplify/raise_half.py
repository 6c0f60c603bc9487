"""Computes in float32 what the model computes or stores in float16 or bfloat16.

    Add(MatMul(x, @w : float16), @b : float16) : float16
        →   Cast(Add(MatMul(Cast(x, float32), @w), @b), float16)
    Cast(@w : bfloat16, float32)   →   @w : float32

ONNX Runtime's CPU provider has no bfloat16 kernels and computes float16 in float32, with casts
around every operator; and all passes after this one look for float32. Graph inputs and outputs keep
their types. Weights keep their names and values: ``store-half`` writes those that are still float
at the end in their own type. In mode float, on targets that compute in a 16-bit type
(``Target.halves``), only weights behind a Cast to float32 are raised.

Refuses, and casts around: nodes with a body, since that declares the types of its results (what it
computes is raised when it is compiled), and operators of functions and other libraries. Rounding:
what was rounded to 16 bits is not any more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx

from qcompile.ir import (
    HALF_TYPES,
    MICROSOFT,
    ONNX,
    Constant,
    Graph,
    HalfType,
    Node,
    Tensor,
    array,
    domain_of,
    half_type,
    has_subgraph,
    is_float,
    is_op,
)
from qcompile.planning import Context
from qcompile.rewriting import Numerics, Pass, Stage

_NUMBERS = {name: number for number, name in HALF_TYPES.items()}
# Attributes that hold the type of a result, or of what an operator computes with.
_TYPE_ATTRIBUTES = (
    "dtype", "output_datatype", "output_dtype", "softmax_precision", "stash_type", "to",
)  # fmt: skip


@dataclass(frozen=True)
class RaiseHalf(Pass):
    """Compute in float32 where the target has no kernels for a 16-bit float type."""

    name: ClassVar[str] = "raise-half"
    stage: ClassVar[Stage] = Stage.SIMPLIFY
    numerics: ClassVar[Numerics] = Numerics.ROUNDING

    def run(self, graph: Graph, ctx: Context) -> bool:
        kept = ctx.target.halves if ctx.choices.mode == "float" else ()
        raised = frozenset(HALF_TYPES.values()) - set(kept)
        raiser = _Raiser(graph, ctx, raised, _stays(graph, ctx, raised))
        raiser.weights()
        raiser.results()
        raiser.boundaries()
        raiser.remove_casts()
        return bool(graph.remove_dead()) or raiser.changed


def _stays(graph: Graph, ctx: Context, raised: frozenset[HalfType]) -> set[str]:
    """Names of the nodes that go on computing in 16 bits; each is refused."""
    found = set()
    for node in graph.nodes:
        why = _obstacle(graph, node)
        if why is None:
            continue
        found.add(node.name)
        types = {half_type(t) for t in (*node.inputs, *node.outputs)} & raised
        for kind in sorted(t for t in types if t is not None):
            ctx.skip(node, f"{why}: it stays in {kind}")
    return found


def _obstacle(graph: Graph, node: Node) -> str | None:
    if has_subgraph(node):
        return f"{node.op} passes on the types that its body declares"
    if domain_of(node) not in (ONNX, MICROSOFT) or graph.is_function(node):
        return f"{node.op} is no operator of ONNX or ONNX Runtime"
    return None


@dataclass
class _Raiser:
    """``raised``: the types that become float32. ``stays``: names of nodes that do not."""

    graph: Graph
    ctx: Context
    raised: frozenset[HalfType]
    stays: set[str]
    changed: bool = False
    floats: dict[str, Tensor] = field(default_factory=dict)  # of tensors that stay, in float32

    def _is_raised(self, tensor: Tensor) -> bool:
        return bool(tensor.name) and half_type(tensor) in self.raised

    def _readers(self, tensor: Tensor) -> list[tuple[Node, int]]:
        """The input slots of nodes that compute in float32 and read a tensor."""
        return [(n, i) for n, i in self.graph.slots(tensor) if n.name not in self.stays]

    def weights(self) -> None:
        """Let readers of 16-bit constants read them in float32: one copy, however many read it."""
        for constant in self.graph.constants().values():
            kind = half_type(constant)
            if kind is None:
                continue
            readers = self._readers(constant)
            if kind not in self.raised:
                readers = [(n, i) for n, i in readers if _to_float(n)]
            if readers:
                self._raise_weight(constant, readers)
                self.ctx.stored_as.add(kind)

    def _raise_weight(self, constant: Constant, readers: list[tuple[Node, int]]) -> None:
        values = array(constant).astype(np.float32)
        if len(readers) == len(self.graph.slots(constant)):
            new = self.graph.retyped(constant, values)
        else:
            new = self.graph.constant(f"{constant.name}/float32", values)
        for node, slot in readers:
            self.graph.set_input(node, slot, new)
        self.changed = True

    def results(self) -> None:
        """Let nodes compute in float32; what is visible outside keeps name and type."""
        for node in self.graph.nodes:
            if node.name in self.stays or not any(map(self._is_raised, node.outputs)):
                continue
            if self._casts_outside(node):
                self._read_before(node)
                continue
            self._raise_attributes(node)
            for i, tensor in enumerate(node.outputs):
                if self._is_raised(tensor):
                    self._raise_result(node, i, tensor)
            self.changed = True

    def _casts_outside(self, node: Node) -> bool:
        """True for a Cast to 16 bits that only graph outputs and nodes in 16 bits need."""
        out = node.outputs[0]
        visible = self.graph.is_output(out) or self._read_by_stays(out)
        return is_op(node, "Cast") and is_float(node.inputs[0]) and visible

    def _read_before(self, cast: Node) -> None:
        for reader, slot in self._readers(cast.outputs[0]):
            self.graph.set_input(reader, slot, cast.inputs[0])
            self.changed = True

    def _raise_attributes(self, node: Node) -> None:
        for name, value in node.attrs.items():
            if name in _TYPE_ATTRIBUTES and HALF_TYPES.get(value) in self.raised:
                node.attrs[name] = int(onnx.TensorProto.FLOAT)
            elif name == "value" and half_type(value) in self.raised:  # of a ConstantOfShape
                values = array(value).astype(np.float32)
                node.attrs[name] = Constant(value.name, values)

    def _raise_result(self, node: Node, index: int, tensor: Tensor) -> None:
        if not self.graph.is_output(tensor) and not self._read_by_stays(tensor):
            tensor.dtype = np.dtype(np.float32)
            return
        kind = half_type(tensor)
        assert kind is not None
        new = self.graph.divert_output(node, "float32", index)
        new.dtype, new.shape = np.dtype(np.float32), tensor.shape
        for reader, slot in self._readers(tensor):
            self.graph.set_input(reader, slot, new)
        self.graph.add("Cast", [new], [tensor], {"to": _NUMBERS[kind]})

    def _read_by_stays(self, tensor: Tensor) -> bool:
        return any(n.name in self.stays for n in self.graph.consumers(tensor))

    def boundaries(self) -> None:
        """Cast what comes from graph inputs, and from nodes that stay in 16 bits."""
        made = (t for n in self.graph.nodes if n.name in self.stays for t in n.outputs)
        for tensor in (*self.graph.inputs, *made):
            readers = self._readers(tensor) if self._is_raised(tensor) else []
            if not readers:
                continue
            if all(_to_float(node) for node, _ in readers):
                continue  # these are the casts
            name, to = f"{tensor.name}/float32", int(onnx.TensorProto.FLOAT)
            new = self.graph.add("Cast", [tensor], [name], {"to": to}).outputs[0]
            new.dtype, new.shape = np.dtype(np.float32), tensor.shape
            for node, slot in readers:
                self.graph.set_input(node, slot, new)
            self.changed = True

    def remove_casts(self) -> None:
        """Remove casts from float32 to float32, which had a 16-bit type on one side."""
        for node in self.graph.nodes if self.changed else ():
            out = node.outputs[0] if node.outputs else None
            if out is None or not _to_float(node) or not is_float(node.inputs[0]):
                continue
            if not self.graph.is_output(out):
                self.graph.replace_uses(out, node.inputs[0])


def _to_float(node: Node) -> bool:
    return is_op(node, "Cast") and node.attrs.get("to") == onnx.TensorProto.FLOAT
