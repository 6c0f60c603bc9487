"""Writes what was learned into the planned graph, by the names of its tensors.

Weights become integers for ``insert-qdq`` (``ctx.rounded``), ranges of activations become those of
the plan (``ctx.ranges``), other trained constants become constants. Inserting and lowering go on as
without training.

Module and emitted model then have the same integers, scales and zero points, and round alike. What
is left is the order of float sums: two sums of n products differ by at most 2 · n · 2^-24 · Σ |a·b|
(Higham 2002, section 3.1, for each of them), in ``cpu`` forms by half of that, since integer sums
are exact. A quantizer behind the sum makes of that nothing, or one step, where the sum is that
close to a tie. ONNX Runtime turns float data times dequantized weights into MatMulNBits, which
rounds the data once more unless ``session.qdq_matmulnbits_accuracy_level`` is 0.
"""

from __future__ import annotations

import numpy as np

from qcompile.ir import Graph, array
from qcompile.planning import Context, Decision
from qcompile.training.fake_quantizers import ActivationQuantizer
from qcompile.training.quantizers import Quantizers
from qcompile.training.torch_graph import TorchGraph
from qcompile.training.weight_quantizers import WeightQuantizer


def write_back(graph: Graph, ctx: Context, module: TorchGraph, quantizers: Quantizers) -> None:
    """Make graph and context those of the trained module; ``quantizers`` are settled.

    graph, ctx: those from which ``slots_of`` and ``module`` came. Each trained weight becomes a
    constant of its own with the float values behind its integers, which the ledger's noise refers
    to; decisions follow. Constants that training has not changed keep their names.
    """
    quantizers.settle()
    for item in quantizers.planned:
        if isinstance(item.quantizer, WeightQuantizer):
            _write_weight(graph, ctx, item.decision, item.quantizer)
        elif isinstance(item.quantizer, ActivationQuantizer) and not item.quantizer.fixed:
            ctx.ranges.set(item.decision.tensor, item.quantizer.range())
    _write_constants(graph, ctx, module)
    graph.sort()


def _write_weight(
    graph: Graph, ctx: Context, decision: Decision, quantizer: WeightQuantizer
) -> None:
    """Let the uses of one decision read the trained weight, and note its integers."""
    graph.sort()  # so that the constant is a new one, also if another decision has equal values
    trained = graph.constant(f"{decision.tensor}/trained", quantizer.values())
    for use in decision.uses:
        graph.set_input(graph.find(use.node), use.index, trained)
    ctx.plan.move(decision.uses, trained.name)
    ctx.rounded[trained.name] = quantizer.rounded()


def _write_constants(graph: Graph, ctx: Context, module: TorchGraph) -> None:
    """Replace float constants whose parameters have changed."""
    constants = graph.constants()
    for name in module.names():
        old = constants.get(name)
        if old is None:  # all its readers read a trained weight
            continue
        values = module.parameter(name).detach().cpu().numpy()
        if not np.array_equal(values, array(old)):
            new = graph.constant(f"{name}/trained", values.astype(array(old).dtype))
            graph.replace_uses(old, new)
            ctx.plan.rename(name, new.name)
