"""Computes a GELU that is quantized by tanh, where the quantizer hides the difference.

    QuantizeLinear(Gelu(x))   →   QuantizeLinear(FastGelu(x))

The kernel of tanh takes about half the time of that of erf. The two functions differ by at most
``DIFFERENCE`` (at x = ±2.7), and a quantizer of step s is off by up to s / 2 in any case. Bias
additions, Clip and layout operators may come between. Refuses a result with a reader other than
quantizers, and a step of less than ``least_steps`` times the difference. Source: Hendrycks and
Gimpel 2016, section 2; com.microsoft.FastGelu.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.ir import MICROSOFT, Graph, Node, Refusal, Tensor, is_constant, is_op, scalar
from qcompile.ir.operators import MOVERS
from qcompile.planning import Context
from qcompile.rewriting import NodeRewrite, Numerics, Stage

# The largest |x (erf(x / √2) - tanh(√(2/π) (x + 0.044715 x³))) / 2| over all x.
DIFFERENCE = 4.74e-4


@dataclass(frozen=True)
class ApproximateGelu(NodeRewrite[Node]):
    """Compute GELU by tanh where its result is quantized in much wider steps than they differ.

    least_steps: the quantizer's step, at least, in multiples of the largest difference.
    """

    name: ClassVar[str] = "approximate-gelu"
    stage: ClassVar[Stage] = Stage.LOWER
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    after: ClassVar[tuple[str, ...]] = ("insert-qdq",)
    ops: ClassVar[tuple[str, ...]] = ("Gelu", "com.microsoft.Gelu")

    least_steps: float = 16.0

    def match(self, graph: Graph, ctx: Context, node: Node) -> Node | Refusal | None:
        if node.attrs.get("approximate", "none") != "none":
            return None
        step = _narrowest_step(graph, node.outputs[0])
        if isinstance(step, Refusal):
            return step
        if step < self.least_steps * DIFFERENCE:
            return Refusal(f"its quantizer's step {step:.2g} would show the difference to tanh")
        return node

    def rewrite(self, graph: Graph, ctx: Context, match: Node) -> None:
        graph.substitute(match.outputs[0], "FastGelu", match.inputs, "tanh", domain=MICROSOFT)


def _narrowest_step(graph: Graph, tensor: Tensor) -> float | Refusal:
    """The smallest scale of the quantizers that read a tensor, as far as differences reach them."""
    if graph.is_output(tensor) or not graph.consumers(tensor):
        return Refusal("its result is not only quantized: it is an output, or read by a body")
    steps = []
    for reader in graph.consumers(tensor):
        if is_op(reader, "QuantizeLinear") and reader.inputs[0] is tensor:
            step: float | Refusal | None = scalar(reader.inputs[1])
        elif _keeps_differences(reader, tensor):
            step = _narrowest_step(graph, reader.outputs[0])
        else:
            return Refusal(f"its result is not only quantized: {reader.op} reads it")
        if step is None:
            return Refusal("its quantizer has no constant step for the whole tensor")
        if isinstance(step, Refusal):
            return step
        steps.append(step)
    return min(steps)


def _keeps_differences(node: Node, tensor: Tensor) -> bool:
    """True if two values of a tensor differ in the node's result by no more than before."""
    if is_op(node, "Add", "Sub"):
        return any(is_constant(t) for t in node.inputs)
    return is_op(node, "Clip", *MOVERS) and node.inputs[0] is tensor
