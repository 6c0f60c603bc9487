"""The provider that calibrates and ranks: refused where it is missing, and kept apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import qcompile
from qcompile import Gates, Options, RecipeError, TargetError
from qcompile.calibration import collector
from qcompile.commands.cli import main
from qcompile.compiler.search import sensitivity as ranking
from qcompile.ir.model_io.to_proto import serialize
from qcompile.quant import Array
from qcompile.rewriting.testing import encoder
from qcompile.runtime.providers import PROVIDERS, Choice, check_provider
from qcompile.runtime.session import (
    CPU,
    CUDA,
    Session,
    SessionOptions,
    listed_providers,
    provider_or_cpu,
)
from qcompile.system.resume_cache import Cache

OPEN = Gates(min_cosine=None, min_worst_cosine=None, min_r2=None, max_latency_ratio=None)
no_gpu = pytest.mark.skipif(provider_or_cpu(CUDA) == CUDA, reason="the CUDA provider is here")
# A provider of the same package, which leaves every node to the CPU.
STAND_IN = "AzureExecutionProvider"


def feeds() -> list[dict[str, Array]]:
    rng = np.random.default_rng(3)
    ids = [rng.integers(0, 64, (4, 6)) for _ in range(4)]
    return [{"ids": i, "attention_mask": np.ones_like(i)} for i in ids]


def build(provider: Choice | None = None, **given: Any) -> qcompile.Result:
    chosen: dict[str, Any] = {} if "recipe" in given else {"target": "cpu"}
    kept: dict[str, Any] = given.pop("options", {})
    options = Options(bench=False, threads=1, provider=provider, **kept)
    model = serialize(encoder(width=16))
    return qcompile.compile(model, feeds(), gates=OPEN, options=options, **chosen, **given)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[SessionOptions]:
    """Options of the sessions that calibrate and rank; ``cuda`` is a stand-in on the CPU."""
    if STAND_IN not in listed_providers():
        pytest.skip(f"no {STAND_IN} here")
    found: list[SessionOptions] = []

    class Seen(Session):
        def __init__(self, model: bytes | Path, options: SessionOptions) -> None:
            found.append(options)
            super().__init__(model, options)

    monkeypatch.setitem(PROVIDERS, "cuda", STAND_IN)
    monkeypatch.setattr(collector, "Session", Seen)
    monkeypatch.setattr(ranking, "Session", Seen)
    return found


@no_gpu
def test_a_missing_provider_is_refused_with_what_is_there_and_what_is_needed() -> None:
    with pytest.raises(TargetError) as refused:
        build("cuda")
    message = str(refused.value)
    assert "cannot run a model on CUDAExecutionProvider here (it has " in message
    assert CPU in message and "expected the package onnxruntime-gpu" in message


@no_gpu
@pytest.mark.parametrize("command", ["compile", "sensitivity"])
def test_the_command_line_refuses_it_in_one_line(command: str, tmp_path: Path) -> None:
    model, data = tmp_path / "m.onnx", tmp_path / "d.npz"
    model.write_bytes(serialize(encoder(width=16)))
    names = "ids", "attention_mask"
    ids, mask = (np.concatenate([feed[name] for feed in feeds()]) for name in names)
    np.savez(data, ids=ids, attention_mask=mask)
    out = tmp_path / ("o.onnx" if command == "compile" else "o.yaml")
    arguments = [command, str(model), "-o", str(out), "--data", str(data), "--provider", "cuda"]
    found = CliRunner().invoke(main, [*arguments, "-q"])
    assert found.exit_code == 2 and not out.exists()
    assert found.output.count("\n") == 1 and "onnxruntime-gpu" in found.output


def test_an_unknown_provider_is_refused() -> None:
    with pytest.raises(TargetError, match="unknown provider 'rocm', expected cpu or cuda"):
        check_provider("rocm")


def test_float32_is_whole_on_cuda() -> None:
    whole = SessionOptions(provider=CUDA, tf32=False)
    assert whole.configured_provider == (CUDA, {"use_tf32": "0"})
    assert SessionOptions(provider=CUDA).configured_provider == CUDA
    assert SessionOptions(tf32=False).configured_provider == CPU


def test_calibration_runs_on_it_and_verification_does_not(opened: list[SessionOptions]) -> None:
    found, usual = build("cuda"), build()
    assert [options.provider for options in opened] == [STAND_IN, CPU]
    assert not any(options.tf32 for options in opened)
    accounts = [result.report.calibration for result in (found, usual)]
    assert [account and account.provider for account in accounts] == ["cuda", "cpu"]
    assert found.model == usual.model


def test_ranking_runs_on_it(opened: list[SessionOptions]) -> None:
    model, options = serialize(encoder(width=16)), Options(threads=1, provider="cuda")
    qcompile.sensitivity(model, feeds(), by="kind", measure="alone", target="qdq", options=options)
    assert len(opened) >= 3 and {options.provider for options in opened} == {STAND_IN}


@pytest.mark.usefixtures("opened")
def test_a_light_lock_asks_for_the_provider_that_it_was_made_with(tmp_path: Path) -> None:
    lock = tmp_path / "m.lock.yaml"
    made = build("cuda", options={"keep_lock": True})
    made.save_lock(lock, light=True)
    assert build("cuda", recipe=lock).model == made.model
    with pytest.raises(RecipeError, match=r"calibrated on 'cuda'.*give --provider cuda"):
        build(recipe=lock)


@pytest.mark.usefixtures("opened")
def test_stored_ranges_of_another_provider_are_not_used(tmp_path: Path) -> None:
    def resumed(provider: Choice) -> bool:
        result = build(provider, options={"cache": Cache(tmp_path)})
        return "calibration-resumed" in {note.code for note in result.report.notes}

    assert [resumed("cpu"), resumed("cuda"), resumed("cpu"), resumed("cuda")] == [
        False, False, True, True,
    ]  # fmt: skip
