"""The quantizers of a plan, with what is learned of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from qcompile.errors import TrainingError
from qcompile.ir import Graph, array
from qcompile.planning import Context, Decision, Use, float_without_range
from qcompile.planning.quantizer_nodes import rounded_weight
from qcompile.training.fake_quantizers import ActivationQuantizer
from qcompile.training.torch_graph import Slot
from qcompile.training.weight_quantizers import WeightQuantizer

NAME = "train"  # in the report, where passes have their names


@dataclass(frozen=True)
class Planned:
    """A decision to quantize, and the quantizer that does so."""

    decision: Decision
    quantizer: ActivationQuantizer | WeightQuantizer


class Quantizers(nn.Module):
    """All quantizers of a planned graph; as a module, what is learned about them.

    ``slots`` is for TorchGraph. ``fixed``: by tensor, why its range stays as calibrated.
    """

    def __init__(self, planned: list[Planned], fixed: Mapping[str, str]) -> None:
        super().__init__()
        self.planned = planned
        self.fixed = dict(fixed)
        self.modules_in_order = nn.ModuleList([p.quantizer for p in planned])
        self.slots: dict[Use, Slot] = {
            use: item.quantizer for item in planned for use in item.decision.uses
        }

    def activations(self) -> Iterator[ActivationQuantizer]:
        for item in self.planned:
            if isinstance(item.quantizer, ActivationQuantizer):
                yield item.quantizer

    def weights(self) -> Iterator[WeightQuantizer]:
        for item in self.planned:
            if isinstance(item.quantizer, WeightQuantizer):
                yield item.quantizer

    def range_parameters(self) -> list[nn.Parameter]:
        """Changes of scales and zero points: relative numbers, to be trained at their own rate."""
        found = [q.scale.change for q in self.weights()]
        found += [p for q in self.activations() for p in (q.scale.change, q.shift)]
        return [parameter for parameter in found if parameter.requires_grad]

    def learn_ranges(self, on: bool) -> None:
        """Whether scales and zero points get gradients; those that are fixed never do."""
        for activation in self.activations():
            activation.learn(on)
        for weight in self.weights():
            weight.learn_scales(on)

    def switch(self, on: bool) -> None:
        """Whether anything is quantized; if not, the module computes the transformed float graph,
        with the weights that it had before training."""
        for item in self.planned:
            item.quantizer.on = on

    def settle(self) -> None:
        """Fix the numbers that will be written: after it, the forward pass computes with these.

        To be called before the last evaluation. Calling it again changes nothing.
        """
        for item in self.planned:
            item.quantizer.settle()


def slots_of(graph: Graph, ctx: Context) -> Quantizers:
    """Quantizers for all uses that the plan quantizes, starting at what was calibrated.

    graph: planned and transformed, before insertion. Weights start at ``ctx.rounded``, or rounded
    to nearest. Tensors without a range stay float, as ``insert-qdq`` leaves them. Ranges that other
    nodes depend on, and those that serve several types, stay as they are, with a reason in
    ``ctx.skips``. Raises TrainingError in mode dynamic.
    """
    ctx.running = NAME
    if ctx.choices.mode == "dynamic":
        raise TrainingError(
            "mode dynamic takes each range from the data of a run, so there is none to train: "
            "use mode static"
        )
    float_without_range(ctx)
    fixed = _fixed(ctx)
    for tensor, reason in fixed.items():
        ctx.skip(tensor, f"its range stays as calibrated: {reason}")
    return Quantizers(
        [Planned(d, _quantizer(graph, ctx, d, fixed)) for d in ctx.plan.quantized()], fixed
    )


def _fixed(ctx: Context) -> dict[str, str]:
    """Why ranges of quantized tensors are not learned, by tensor."""
    types: dict[str, int] = {}
    for decision in ctx.plan.quantized("activation"):
        types[decision.tensor] = types.get(decision.tensor, 0) + 1
    found = {name: why for name, why in ctx.fixed_ranges.items() if name in types}
    several = {name: count for name, count in types.items() if count > 1}
    return found | {name: f"it is one for {count} types" for name, count in several.items()}


def _quantizer(
    graph: Graph, ctx: Context, decision: Decision, fixed: Mapping[str, str]
) -> ActivationQuantizer | WeightQuantizer:
    spec = decision.spec
    assert spec is not None  # quantized() yields no other
    if decision.kind == "activation":
        span = ctx.ranges.get(decision.tensor)
        assert span is not None  # ``float_without_range`` made it float
        return ActivationQuantizer(span, spec, fixed.get(decision.tensor, ""))
    use = decision.uses[0]
    values = array(graph.find(use.node).inputs[use.index])
    initial = rounded_weight(ctx, decision, values)
    return WeightQuantizer(initial, decision.quantized_view(values), spec, values.shape)
