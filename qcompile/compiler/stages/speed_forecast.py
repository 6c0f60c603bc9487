"""How fast the compiled model should be, before any work: what integers can gain is known then.

    time of compiled / time of float   ≈   1 - s + s / g

s is the share of the float model's time that goes into products, by ONNX Runtime's own profile of
a run or two; g how many times as many products the machine's instruction set does in integers at
best (``instruction_sets.TABLE``). What is around the products is taken to cost the same (Amdahl
1967). What came of it is measured at the end.
"""

from __future__ import annotations

from qcompile.compiler.report.records import Forecast
from qcompile.compiler.stages.prepare import Prepared
from qcompile.data.feeds import Feed
from qcompile.data.synthetic import synthetic_feeds
from qcompile.errors import QCompileError
from qcompile.runtime.profiler import Profile, profile
from qcompile.system import processor
from qcompile.targets import instruction_sets

_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Conv", "FusedConv", "Attention")
_RUNS = 2
_MODES = ("static", "dynamic")


def predict_speed(prepared: Prepared) -> Forecast | None:
    """None where nothing is timed, no provider is here, or a run fails: later stages say why."""
    timed = prepared.options.bench and prepared.target.gate_latency
    found = instruction_sets.of_machine(processor.instruction_sets())
    if not timed or prepared.provider_missing or found is None or prepared.mode not in _MODES:
        return None
    prepared.progress.step("expect")
    models, threads = [("", prepared.float_model.running)], prepared.options.threads
    try:
        [seen] = profile(models, _feed(prepared), threads, _RUNS, prepared.provider)
    except QCompileError:
        return None
    return forecast_of_share(found, _share(seen))


def forecast_of_share(found: instruction_sets.Isa, share: float) -> Forecast:
    """The forecast for a model of which products take this share of the time."""
    return Forecast(found.name, found.gain, share, 1 / (1 - share + share / found.gain))


def _share(seen: Profile) -> float:
    products = sum(o.ms for o in seen.ops if o.op.rsplit(".", 1)[-1] in _PRODUCTS)
    return products / seen.total if seen.total else 0.0


def _feed(prepared: Prepared) -> Feed:
    """The first of the data, or a made-up one where there is none that can be read twice."""
    if prepared.reusable_feeds is not None:
        return next(iter(prepared.reusable_feeds))
    return synthetic_feeds(prepared.graph, {}, 1, prepared.recipe.seed)[0]
