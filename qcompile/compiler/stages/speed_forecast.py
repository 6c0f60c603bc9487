"""Predicts the speed-up of the compiled model before any work (Amdahl 1967).

    time of compiled / time of float   ≈   1 - s + s / g

s is the share of the float model's time in matrix multiplications, LSTMs and convolutions, from
ONNX Runtime's profile of two runs; g is how many times as fast the machine's instruction set
computes them in int8 at best (``instruction_sets.TABLE``). All other operators are assumed to take
the same time. The real speed-up is measured at the end.
"""

from __future__ import annotations

from qcompile.compiler.report.records import Forecast
from qcompile.compiler.stages.prepare import Prepared
from qcompile.data.feeds import Feed
from qcompile.data.synthetic import synthetic_feeds
from qcompile.errors import QCompileError
from qcompile.runtime import kernels
from qcompile.runtime.profiler import Profile, profile
from qcompile.targets import instruction_sets

_LINEAR_OPERATORS = (
    "MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Conv", "FusedConv", "Attention", "LSTM",
)  # fmt: skip
_RUNS = 2
_MODES = ("static", "dynamic")


def predict_speed(prepared: Prepared) -> Forecast | None:
    """None if nothing is timed, the provider is missing, or a run fails: later stages say why."""
    timed = prepared.options.bench and prepared.target.gate_latency
    isa = instruction_sets.of_machine(kernels.instruction_sets())
    if not timed or prepared.provider_missing or isa is None or prepared.mode not in _MODES:
        return None
    prepared.progress.step("predict speed")
    models, threads = [("", prepared.float_model.running)], prepared.options.threads
    try:
        [profiled] = profile(models, _feed(prepared), threads, _RUNS, prepared.provider)
    except QCompileError:
        return None
    return forecast_of_share(isa, _share(profiled))


def forecast_of_share(isa: instruction_sets.Isa, share: float) -> Forecast:
    """The forecast for a model whose linear operators take this share (0 to 1) of the time."""
    return Forecast(isa.name, isa.gain, share, 1 / (1 - share + share / isa.gain))


def _share(profiled: Profile) -> float:
    linear_ms = sum(o.ms for o in profiled.ops if o.op.rsplit(".", 1)[-1] in _LINEAR_OPERATORS)
    return linear_ms / profiled.total if profiled.total else 0.0


def _feed(prepared: Prepared) -> Feed:
    """The first feed of the data, or a random one if no data can be read twice."""
    if prepared.reusable_feeds is not None:
        return next(iter(prepared.reusable_feeds))
    return synthetic_feeds(prepared.graph, {}, 1, prepared.recipe.seed)[0]
