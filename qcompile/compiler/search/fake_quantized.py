"""One model in which every planned quantization can be on or off, chosen anew in each run.

    activation:  x   →   Where(flag, DequantizeLinear(QuantizeLinear(x)), x)
    weight:      W   →   a graph input, fed with W or with the reals that its integers stand for

One session so measures every tensor by itself: nothing is compiled anew. Weights are inputs
because a Where over a table costs more than the layers behind it; feeding an array costs nothing.
With all on the answers are those of ``insert-qdq``, with all off those of the graph before the
lossy passes of the transform stage. Those rewrite a linear together with its data, its weight and
its bias, so on targets that quantize linears as a whole these three are switched together.
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
    """What goes on and off together: decisions, each with the uses concerned."""

    parts: tuple[Decision, ...]

    @property
    def uses(self) -> tuple[Use, ...]:
        return tuple(u for part in self.parts for u in part.uses)


@dataclass(frozen=True)
class Plain:
    """What a linear reads and adds before it is rewritten; ``bias`` None where it adds nothing."""

    data: Tensor
    weight: Constant
    bias: Constant | None


@dataclass
class FakeQuantizedModel:
    """The model, and what to feed beside the data: ``flags`` and ``arrays`` by input name.

    A flag says which switch it is; an array, a pair (when on, when off), too.
    """

    switches: tuple[FakeQuantSwitch, ...]
    model: bytes = b""
    flags: dict[str, int] = field(default_factory=dict)
    arrays: dict[str, tuple[int, Array, Array]] = field(default_factory=dict)

    def settings(self, on: Container[int]) -> Feed:
        """Inputs that quantize what the switches ``on`` stand for, and nothing else."""
        flags: Feed = {name: np.array(i in on) for name, i in self.flags.items()}
        return flags | {n: a if i in on else b for n, (i, a, b) in self.arrays.items()}


def switches(ctx: Context) -> list[FakeQuantSwitch]:
    """One for each quantized tensor; for each operator, where a target quantizes it as a whole."""
    quantizer_nodes.float_without_range(ctx)
    if ctx.target.quantize_interior:
        return [FakeQuantSwitch((decision,)) for decision in ctx.plan.quantized()]
    found: dict[str, list[Decision]] = {}
    for decision in ctx.plan.quantized():
        for node in dict.fromkeys(u.node for u in decision.uses):
            mine = tuple(u for u in decision.uses if u.node == node)
            found.setdefault(node, []).append(replace(decision, uses=mine))
    return [FakeQuantSwitch(tuple(parts)) for parts in found.values()]


def plain_forms(graph: Graph, ctx: Context) -> dict[str, Plain]:
    """Planned linears as they are now, by node; to be asked before lossy passes rewrite them."""
    if ctx.target.quantize_interior:
        return {}
    found: dict[str, Plain] = {}
    for use in (u for d in ctx.plan.quantized("weight") for u in d.uses):
        node = graph.find(use.node)
        if is_op(node, "MatMul", "Gemm"):
            at = _bias(graph, node)
            bias = None if at is None else at[0].inputs[at[1]]
            found[node.name] = Plain(node.inputs[1 - use.index], node.inputs[use.index], bias)
    return found


def build(
    graph: Graph,
    ctx: Context,
    chosen: Sequence[FakeQuantSwitch],
    plain: Mapping[str, Plain] | None = None,
) -> FakeQuantizedModel:
    """Turn a planned and transformed graph into the switched model; the graph is spent."""
    maker = _Maker(graph, ctx, dict(plain or {}), FakeQuantizedModel(tuple(chosen)))
    for i, switch in enumerate(chosen):
        for part in switch.parts:
            if part.kind == "weight":
                maker.weight(i, part)
        for part in switch.parts:
            if part.kind == "activation":
                maker.activation(i, part)
    graph.remove_dead()
    graph.sort()
    maker.made.model = serialize(graph)
    return maker.made


@dataclass
class _Maker:
    graph: Graph
    ctx: Context
    plain: dict[str, Plain]
    made: FakeQuantizedModel
    pairs: dict[tuple[str, QSpec | None], Tensor] = field(default_factory=dict)

    def activation(self, switch: int, part: Decision) -> None:
        """Let the uses read the quantized tensor or the plain one, as the flag says."""
        graph, key = self.graph, (part.tensor, part.spec)
        if key not in self.pairs:
            self.pairs[key] = quantizer_nodes.dequantized_activation(graph, self.ctx, part)
        flag = graph.add_input(f"{part.tensor}/on", np.bool_, ())
        self.made.flags[flag.name] = switch
        for node, uses in self._readers(part):
            old = node.inputs[uses[0].index]
            branches = [flag, self.pairs[key], self._off(node, old)]
            picked = graph.add("Where", branches, [f"{part.tensor}/switched"], like=old).outputs[0]
            for use in uses:
                graph.set_input(node, use.index, picked)

    def _readers(self, part: Decision) -> Iterator[tuple[Node, list[Use]]]:
        for name in dict.fromkeys(u.node for u in part.uses):
            yield self.graph.find(name), [u for u in part.uses if u.node == name]

    def _off(self, node: Node, now: Tensor) -> Tensor:
        """What the node reads when it is float.

        Where its data was split over more columns: the same, before they saturate. The columns
        appended meet rows of zeros then.
        """
        before, maker = self.plain.get(node.name), self.graph.producer(now, "Clip")
        moved = before is not None and before.data is not now
        return maker.inputs[0] if moved and maker is not None else now

    def weight(self, switch: int, part: Decision) -> None:
        """Make the weight an input, fed with one array or the other; its bias where it changed."""
        use = part.uses[0]
        node = self.graph.find(use.node)
        weight = node.inputs[use.index]
        values = array(weight)
        on = real(quantizer_nodes.rounded_weight(self.ctx, part, values))
        before = self.plain.get(use.node)
        if before is not None:
            self._bias(switch, node, before.bias)
            if before.weight is not weight:
                values = _before(array(before.weight), values)
        self._feed(switch, part.tensor, part.uses, on, values)

    def _bias(self, switch: int, node: Node, before: Constant | None) -> None:
        at = _bias(self.graph, node)
        if at is None or at[0].inputs[at[1]] is before:
            return
        holder, slot = at
        on = array(holder.inputs[slot])
        off = np.zeros_like(on) if before is None else _before(array(before), on)
        self._feed(switch, holder.inputs[slot].name, (Use(holder.name, slot),), on, off)

    def _feed(self, switch: int, name: str, uses: Sequence[Use], on: Array, off: Array) -> None:
        made = self.graph.add_input(f"{name}/switched", np.float32, on.shape)
        self.made.arrays[made.name] = (switch, np.ascontiguousarray(on), np.ascontiguousarray(off))
        for use in uses:
            self.graph.set_input(self.graph.find(use.node), use.index, made)


def _bias(graph: Graph, node: Node) -> tuple[Node, int] | None:
    """The node and slot of the constant that a linear adds to its product."""
    if is_op(node, "Gemm"):
        return (node, 2) if len(node.inputs) > 2 and is_constant(node.inputs[2]) else None
    add = graph.only_consumer(node.outputs[0], "Add")
    if add is None:
        return None
    return next(((add, i) for i, t in enumerate(add.inputs) if is_constant(t)), None)


def _before(old: Array, now: Array) -> Array:
    """The old values in the shape of now: rows of zeros added, and the columns that now has."""
    if old.shape[-1:] == (1,):
        old = np.broadcast_to(old, now.shape)
    made = np.zeros_like(now)
    if now.ndim > 1:
        made[: old.shape[0]] = now[: old.shape[0]]
    else:
        made[:] = now
    made[tuple(slice(n) for n in old.shape)] = old
    return made
