"""Quantizes the operands of a Concat instead of its result: it then copies a quarter of the bytes.

    QuantizeLinear(Clip(Concat(x, y), L, H), s, z)
        →   Concat(QuantizeLinear(x, s, z), QuantizeLinear(y, s, z))

Bit-equal: with one scale, quantizing and concatenating commute, and a Clip whose bounds are not
inside the quantized range changes nothing that saturation does not. Refuses a Clip with narrower
bounds, per-channel scales, and tensors with other readers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompile.ir import Graph, Node, Refusal, array, is_constant, is_op, scalar
from qcompile.planning import Context
from qcompile.rewriting import Numerics, Pass, Stage


@dataclass(frozen=True)
class QuantizeParts(Pass):
    """Move quantizers before Concat, and remove Clip where they saturate at its bounds."""

    name: ClassVar[str] = "quantize-parts"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.EXACT
    after: ClassVar[tuple[str, ...]] = ("insert-qdq",)

    def run(self, graph: Graph, ctx: Context) -> bool:
        changed = False
        waiting = graph.nodes
        while waiting:  # an operand of Concat may be a Clip or a Concat itself
            node = waiting.pop(0)
            if not is_op(node, "QuantizeLinear") or node.attrs.get("axis", 1) not in (1, -1):
                continue
            dropped = _drop_clip(graph, ctx, node)
            parts = _split(graph, ctx, node)
            changed |= dropped or bool(parts)
            waiting += parts
        return changed


def _drop_clip(graph: Graph, ctx: Context, quantizer: Node) -> bool:
    clip = graph.producer(quantizer.inputs[0], "Clip")
    if clip is None or graph.only_consumer(clip.outputs[0]) is None:
        return False
    refusal = _clip_obstacle(clip, quantizer)
    if refusal is not None:
        ctx.skip(clip, refusal.reason)
        return False
    graph.set_input(quantizer, 0, clip.inputs[0])
    graph.remove_dead()
    return True


def _clip_obstacle(clip: Node, quantizer: Node) -> Refusal | None:
    """Why the Clip is needed, None where saturation does the same."""
    bounds = [scalar(t) for t in clip.inputs[1:3] if t.name]
    step, zero = scalar(quantizer.inputs[1]), quantizer.inputs[2:]
    if len(bounds) != 2 or step is None or not zero or not is_constant(zero[0]):
        return Refusal("its bounds or the scale are not known")
    low, high = bounds
    if low is None or high is None:
        return Refusal("its bounds are computed")
    limits, point = np.iinfo(array(zero[0]).dtype), int(array(zero[0]).reshape(-1)[0])
    least, most = (limits.min - point) * step, (limits.max - point) * step
    if low > least + step / 4 or high < most - step / 4:
        return Refusal("its limits are narrower than the quantizer's range")
    return None


def _split(graph: Graph, ctx: Context, quantizer: Node) -> list[Node]:
    """The quantizers of the Concat's operands, none where nothing was moved."""
    concat = graph.producer(quantizer.inputs[0], "Concat")
    if concat is None:
        return []
    result = quantizer.outputs[0]
    if graph.only_consumer(concat.outputs[0]) is None or graph.is_output(result):
        ctx.skip(quantizer, "the float or the quantized result of Concat is used elsewhere")
        return []
    if any(t.shape for t in quantizer.inputs[1:]):
        ctx.skip(quantizer, "its scales are per channel")
        return []
    parts = [
        graph.add("QuantizeLinear", [t, *quantizer.inputs[1:]], [f"{t.name}/quantized"])
        for t in concat.inputs
    ]
    for part in parts:
        part.outputs[0].dtype = result.dtype
    operands = [part.outputs[0] for part in parts]
    joined = graph.add("Concat", operands, [f"{result.name}/parts"], concat.attrs)
    graph.replace_uses(result, joined.outputs[0])
    graph.remove_dead()
    return parts
