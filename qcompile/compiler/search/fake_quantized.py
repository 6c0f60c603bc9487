"""One model in which every planned quantization can be switched on or off in each run.

    activation:  x   →   Where(flag, DequantizeLinear(QuantizeLinear(x)), x)
    weight:      W   →   a graph input, fed with W or with the dequantized weight

One session thus measures every tensor separately: nothing is compiled again. Weights are inputs
because a Where over an embedding table costs more than the layers that read it; feeding an array
costs nothing. With all switches on the outputs are those of ``insert-qdq``, with all off those of
the graph before the lossy passes of the transform stage. Those passes rewrite a linear layer
together with its data, weight and bias, so on targets that quantize a linear layer as a whole these
three are switched together.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from qcompile.data.feeds import Feed
from qcompile.ir import Constant, Graph, Node, Tensor, array, is_constant, is_op
from qcompile.ir.model_io.to_proto import serialize
from qcompile.planning import Context, Decision, Use, quantizer_nodes
from qcompile.quant import Array, QSpec, real


@dataclass(frozen=True)
class FakeQuantSwitch:
    """Decisions that are switched on and off together, each with the uses concerned."""

    parts: tuple[Decision, ...]

    @property
    def uses(self) -> tuple[Use, ...]:
        return tuple(u for part in self.parts for u in part.uses)


@dataclass(frozen=True)
class FloatLinear:
    """The operands of a linear layer before lossy passes rewrite it; ``bias`` may be None."""

    data: Tensor
    weight: Constant
    bias: Constant | None


@dataclass
class FakeQuantizedModel:
    """The model (``proto``, serialized), and what to feed in addition to the data, by input name.

    ``flags``: number of the switch. ``arrays``: number of the switch, float32 values when it is
    on, and values of the same shape when it is off.
    """

    switches: tuple[FakeQuantSwitch, ...]
    proto: bytes = b""
    flags: dict[str, int] = field(default_factory=dict)
    arrays: dict[str, tuple[int, Array, Array]] = field(default_factory=dict)

    def settings(self, on: Container[int]) -> Feed:
        """Inputs that quantize what the switches ``on`` stand for, and nothing else."""
        flags: Feed = {name: np.array(i in on) for name, i in self.flags.items()}
        return flags | {n: a if i in on else b for n, (i, a, b) in self.arrays.items()}


def make_switches(ctx: Context) -> list[FakeQuantSwitch]:
    """One per quantized tensor, or per operator on targets that quantize an operator as a whole."""
    quantizer_nodes.float_without_range(ctx)
    if ctx.target.quantize_interior:
        return [FakeQuantSwitch((decision,)) for decision in ctx.plan.quantized()]
    by_node: dict[str, list[Decision]] = {}
    for decision in ctx.plan.quantized():
        for node in dict.fromkeys(u.node for u in decision.uses):
            uses = tuple(u for u in decision.uses if u.node == node)
            by_node.setdefault(node, []).append(replace(decision, uses=uses))
    return [FakeQuantSwitch(tuple(parts)) for parts in by_node.values()]


def record_float_linears(graph: Graph, ctx: Context) -> dict[str, FloatLinear]:
    """Planned linear layers as they are now, by node; call it before lossy passes rewrite them."""
    if ctx.target.quantize_interior:
        return {}
    linears: dict[str, FloatLinear] = {}
    for use in (u for d in ctx.plan.quantized("weight") for u in d.uses):
        node = graph.find(use.node)
        if is_op(node, "MatMul", "Gemm"):
            place = _bias_input(graph, node)
            bias = None if place is None else place[0].inputs[place[1]]
            data, weight = node.inputs[1 - use.index], node.inputs[use.index]
            linears[node.name] = FloatLinear(data, weight, bias)
    return linears


def build_fake_quantized(
    graph: Graph,
    ctx: Context,
    switches: Sequence[FakeQuantSwitch],
    float_linears: Mapping[str, FloatLinear] | None = None,
) -> FakeQuantizedModel:
    """Turn a planned and transformed graph into the switchable model; the graph is changed."""
    builder = _Builder(graph, ctx, dict(float_linears or {}), FakeQuantizedModel(tuple(switches)))
    for i, switch in enumerate(switches):
        for part in switch.parts:
            if part.kind == "weight":
                builder.switch_weight(i, part)
        for part in switch.parts:
            if part.kind == "activation":
                builder.switch_activation(i, part)
    graph.remove_dead()
    graph.sort()
    builder.model.proto = serialize(graph)
    return builder.model


@dataclass
class _Builder:
    """``pairs``: outputs of the Q/DQ pairs that exist already, by tensor and type."""

    graph: Graph
    ctx: Context
    float_linears: dict[str, FloatLinear]
    model: FakeQuantizedModel
    pairs: dict[tuple[str, QSpec | None], Tensor] = field(default_factory=dict)

    def switch_activation(self, switch: int, part: Decision) -> None:
        """Let the uses read the quantized tensor or the float one, as the flag says."""
        graph, key = self.graph, (part.tensor, part.spec)
        if key not in self.pairs:
            self.pairs[key] = quantizer_nodes.dequantized_activation(graph, self.ctx, part)
        flag = graph.add_input(f"{part.tensor}/on", np.bool_, ())
        self.model.flags[flag.name] = switch
        for node, uses in self._readers(part):
            old = node.inputs[uses[0].index]
            branches = [flag, self.pairs[key], self._when_off(node, old)]
            where = graph.add("Where", branches, [f"{part.tensor}/switched"], like=old)
            for use in uses:
                graph.set_input(node, use.index, where.outputs[0])

    def _readers(self, part: Decision) -> Iterator[tuple[Node, list[Use]]]:
        for name in dict.fromkeys(u.node for u in part.uses):
            yield self.graph.find(name), [u for u in part.uses if u.node == name]

    def _when_off(self, node: Node, now: Tensor) -> Tensor:
        """What the node reads when it is float.

        If its data was split over more columns, that is the input of the Clip that saturates them.
        The appended columns are then multiplied by rows of zeros.
        """
        before, clip = self.float_linears.get(node.name), self.graph.producer(now, "Clip")
        was_split = before is not None and before.data is not now
        return clip.inputs[0] if was_split and clip is not None else now

    def switch_weight(self, switch: int, part: Decision) -> None:
        """Make the weight an input, fed with one array or the other; its bias where it changed."""
        use = part.uses[0]
        node = self.graph.find(use.node)
        weight = node.inputs[use.index]
        values = array(weight)
        on = real(quantizer_nodes.rounded_weight(self.ctx, part, values)).reshape(values.shape)
        before = self.float_linears.get(use.node)
        if before is not None:
            self._switch_bias(switch, node, before.bias)
            if before.weight is not weight:
                values = _zero_padded(array(before.weight), values)
        self._add_array_input(switch, part.tensor, part.uses, on, values)

    def _switch_bias(self, switch: int, node: Node, before: Constant | None) -> None:
        place = _bias_input(self.graph, node)
        if place is None or place[0].inputs[place[1]] is before:
            return
        adder, slot = place
        on = array(adder.inputs[slot])
        off = np.zeros_like(on) if before is None else _zero_padded(array(before), on)
        uses = (Use(adder.name, slot),)
        self._add_array_input(switch, adder.inputs[slot].name, uses, on, off)

    def _add_array_input(
        self, switch: int, name: str, uses: Sequence[Use], on: Array, off: Array
    ) -> None:
        tensor = self.graph.add_input(f"{name}/switched", np.float32, on.shape)
        values = np.ascontiguousarray(on), np.ascontiguousarray(off)
        self.model.arrays[tensor.name] = (switch, *values)
        for use in uses:
            self.graph.set_input(self.graph.find(use.node), use.index, tensor)


def _bias_input(graph: Graph, node: Node) -> tuple[Node, int] | None:
    """The node and input index of the constant that a linear layer adds to its matrix product."""
    if is_op(node, "Gemm"):
        return (node, 2) if len(node.inputs) > 2 and is_constant(node.inputs[2]) else None
    add = graph.only_consumer(node.outputs[0], "Add")
    if add is None:
        return None
    return next(((add, i) for i, t in enumerate(add.inputs) if is_constant(t)), None)


def _zero_padded(old: Array, now: Array) -> Array:
    """``old`` in the shape of ``now``: zeros in rows that were appended, ``now`` in new columns."""
    if old.shape[-1:] == (1,):
        old = np.broadcast_to(old, now.shape)
    padded = np.zeros_like(now)
    if now.ndim > 1:
        padded[: old.shape[0]] = now[: old.shape[0]]
    else:
        padded[:] = now
    padded[tuple(slice(n) for n in old.shape)] = old
    return padded
