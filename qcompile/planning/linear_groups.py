"""Linear layers that will run in integers, by the tensor that they read.

Q, K and V read one tensor and share its quantizer, so whatever is done to its channels is done to
all their weights: a site is one such tensor with its layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompile.ir import Constant, Graph, Node, Refusal, Tensor, array, is_constant, is_op, rank
from qcompile.planning.context import Context
from qcompile.planning.plan import Decision, Use
from qcompile.quant import Array, QSpec


@dataclass(frozen=True)
class QuantizedLinear:
    """A MatMul or Gemm with a weight that becomes integers as ``spec``.

    ``transposed``: the weight is (outputs, inputs), a Gemm's transB.
    """

    node: Node
    weight: Constant
    spec: QSpec
    transposed: bool

    @property
    def inputs(self) -> int:
        """Channels of the data."""
        return int(self.weight.shape[1 if self.transposed else 0])

    @property
    def data_use(self) -> Use:
        return Use(self.node.name, 0)

    @property
    def weight_use(self) -> Use:
        return Use(self.node.name, 1)

    def set_weight(self, graph: Graph, ctx: Context, values: Array, name: str) -> Constant:
        """Give the layer other weights, as a constant of that name; what was decided follows."""
        new = graph.set_constant(self.node, 1, values, name)
        ctx.plan.move((self.weight_use,), new.name)
        return new


@dataclass(frozen=True)
class LinearGroup:
    """All quantized linear layers that read one tensor; ``spec``: that of its quantizer there.

    ``spec`` is None where the values are quantized elsewhere, for example where a layout operator
    is between the quantizer and the layer.
    """

    tensor: Tensor
    spec: QSpec | None
    linears: tuple[QuantizedLinear, ...]

    @property
    def data(self) -> str:
        return str(self.tensor.name)

    @property
    def uses(self) -> tuple[Use, ...]:
        return tuple(linear.data_use for linear in self.linears)

    def shared_weight(self, graph: Graph) -> Refusal | None:
        """Why the layers' weights cannot be changed for this tensor alone, None where they can.

        Other nodes read a weight too: the changed one would be stored in addition.
        """
        own = {id(linear.node) for linear in self.linears}
        for weight in (linear.weight for linear in self.linears):
            if graph.is_output(weight) or any(id(n) not in own for n in graph.consumers(weight)):
                readers = len(graph.consumers(weight))
                return Refusal(
                    f"weight {weight.name!r} is shared by {readers} nodes: changed for this tensor "
                    "alone, it would be stored twice"
                )
        return None

    def redirect(self, graph: Graph, ctx: Context, tensor: Tensor) -> None:
        """Let all layers read another tensor; their decisions follow."""
        for linear in self.linears:
            graph.set_input(linear.node, 0, tensor)
        ctx.plan.move(self.uses, tensor.name)


def linear_groups(graph: Graph, ctx: Context) -> list[LinearGroup]:
    """Linear groups of the plan, in the order of the graph."""
    weights = {u: d for d in ctx.plan.quantized("weight") for u in d.uses}
    data = {u: d.spec for d in ctx.plan.quantized("activation") for u in d.uses}
    grouped: dict[tuple[str, QSpec | None], list[QuantizedLinear]] = {}
    for node in graph.nodes:
        linear = _linear(node, weights.get(Use(node.name, 1)))
        if linear is not None:
            key = (node.inputs[0].name, data.get(linear.data_use))
            grouped.setdefault(key, []).append(linear)
    return [LinearGroup(ls[0].node.inputs[0], spec, tuple(ls)) for (_, spec), ls in grouped.items()]


def _linear(node: Node, decision: Decision | None) -> QuantizedLinear | None:
    if decision is None or decision.spec is None or not is_op(node, "MatMul", "Gemm"):
        return None
    weight = node.inputs[1]
    if not is_constant(weight) or rank(weight) != 2 or is_constant(node.inputs[0]):
        return None
    return QuantizedLinear(node, weight, decision.spec, bool(node.attrs.get("transB")))


def add_to_bias(graph: Graph, linear: QuantizedLinear, values: Array) -> None:
    """Add a vector (outputs,) to a layer's bias.

    It is added to an existing constant, a Gemm's third operand or that of the Add after a MatMul;
    without one, an Add is inserted.
    """
    node, shift = linear.node, values.astype(np.float32)
    if is_op(node, "Gemm") and len(node.inputs) > 2 and is_constant(node.inputs[2]):
        _extend(graph, node, 2, shift)
        return
    out = node.outputs[0]
    add = graph.only_consumer(out, "Add")
    if is_op(node, "MatMul") and add is not None:
        slot = next((i for i, t in enumerate(add.inputs) if is_constant(t)), None)
        if slot is not None and tuple(add.inputs[slot].shape[-1:]) in ((shift.size,), (1,)):
            _extend(graph, add, slot, shift)
            return
    readers = [(n, i) for n in graph.consumers(out) for i, t in enumerate(n.inputs) if t is out]
    graph.renew_output(node, "product", out.dtype)
    bias = graph.constant(f"{node.name}/bias", shift)
    graph.add("Add", [node.outputs[0], bias], [out], like=out)
    for reader, i in readers:
        graph.set_input(reader, i, out)


def _extend(graph: Graph, node: Node, slot: int, shift: Array) -> None:
    graph.set_constant(
        node, slot, array(node.inputs[slot]) + shift, f"{node.inputs[slot].name}/shifted"
    )
