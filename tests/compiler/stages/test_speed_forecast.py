"""What speed is foretold: by the share of products in float's time, and the instruction set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import qcompile
from qcompile import Options
from qcompile.compiler.stages import speed_forecast
from qcompile.errors import ModelError
from qcompile.ir.model_io.to_proto import serialize
from qcompile.rewriting.testing import encoder
from qcompile.runtime import kernels, profiler
from qcompile.runtime.profiler import OpTime, Profile
from qcompile.system import processor
from qcompile.targets import instruction_sets
from qcompile.targets.instruction_sets import TABLE

MODEL = serialize(encoder(1, width=16))
TIMED = Options(bench_rounds=1, threads=1)


def feeds() -> list[dict[str, Any]]:
    rng = np.random.default_rng(3)
    made = []
    for _ in range(8):
        ids = rng.integers(0, 64, (2, 7))
        made.append({"ids": ids, "attention_mask": np.ones_like(ids)})
    return made


@pytest.fixture
def vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "instruction_sets", lambda: ["AVX512-VNNI", "AVX512F", "AVX2"])


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three quarters in products."""
    ops = OpTime("MatMul", 6, 60.0), OpTime("com.microsoft.FusedMatMul", 1, 15.0)
    rest = OpTime("Softmax", 1, 20.0), OpTime("Add", 9, 5.0)
    found = [Profile("", (*ops, *rest))]
    monkeypatch.setattr(speed_forecast, "profile", lambda *_: found)


def compiled(options: Options = TIMED, data: Any = None, **more: Any) -> dict[str, Any]:
    given = feeds() if data is None else data
    gates = qcompile.Gates(max_latency_ratio=None)
    report = qcompile.compile(MODEL, given, gates=gates, options=options, **more).report
    found: dict[str, Any] = report.to_dict()["forecast"]
    return found


@pytest.mark.parametrize(
    ("share", "gain", "speedup"), [(0, 4, 1), (1, 4, 4), (0.75, 4, 16 / 7), (0.5, 4 / 3, 8 / 7)]
)
def test_amdahl(share: float, gain: float, speedup: float) -> None:
    row = instruction_sets.Isa("x", False, "", gain, ())
    assert speed_forecast.forecast_of_share(row, share).speedup == pytest.approx(speedup)


def test_it_is_in_the_report(vnni: None, shares: None) -> None:
    found = compiled()
    assert found["isa"] == "avx512-vnni" and found["share"] == 0.75
    assert found["speedup"] == pytest.approx(1 / (0.25 + 0.75 / TABLE["avx512-vnni"].gain))
    assert found["summary"].startswith(
        "about 2.2x: matrix multiplications and convolutions take 75% of float's time"
    )


def test_the_real_profile_has_a_share(vnni: None) -> None:
    found = compiled()
    assert 0 < found["share"] < 1 and 1 < found["speedup"] < 4


@pytest.mark.parametrize(
    "more",
    [
        {"options": Options(bench=False, threads=1)},
        {"target": "qdq"},
        {"mode": "weight-only"},
        {"mode": "float"},
    ],
)
def test_where_nothing_is_foretold(vnni: None, shares: None, more: dict[str, Any]) -> None:
    assert compiled(**more) == {}


def test_an_unknown_processor_has_no_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "instruction_sets", list)
    assert compiled() == {}


def test_a_run_that_fails_is_for_later_stages_to_tell(
    vnni: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> list[profiler.Profile]:
        raise ModelError("no")

    monkeypatch.setattr(speed_forecast, "profile", fails)
    assert compiled() == {}


def test_data_that_can_be_read_once_is_left_alone(vnni: None, shares: None) -> None:
    found = compiled(data=iter(feeds()))
    assert found["share"] == 0.75


def test_every_instruction_set_that_machines_report_has_a_row() -> None:
    seen = [name for row in TABLE.values() for name in row.seen]
    assert sorted(seen) == sorted(processor._FLAGS.values())
    assert all(row.gain > 1 for row in TABLE.values())
    assert instruction_sets.of_machine(["AMX-INT8", "AVX512-VNNI"]) is TABLE["amx"]
