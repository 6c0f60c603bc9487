"""The check of integer sums on two processors: what it runs, and that it fails."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from benchmarks.robustness import same_sums
from benchmarks.robustness._integer_graphs import graphs
from benchmarks.robustness._operator_probes import probes
from benchmarks.robustness.same_sums import Worker, check
from qcompile.compiler.stages import saturation_check
from qcompile.compiler.stages.saturation_check import IntegerSums
from qcompile.data.feeds import Feed
from qcompile.quant import Array
from qcompile.runtime import session as runtime
from qcompile.runtime.evaluation.int16_saturation import saturated_product

GRAPHS = dict(graphs())


@pytest.fixture(scope="module")
def here() -> Iterator[Worker]:
    with Worker([sys.executable]) as worker:
        yield worker


class Saturating(Worker):
    """Computes MatMulInteger as x86 without VNNI does, and everything else as the worker."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def run(self, model: onnx.ModelProto | Path, feeds: Sequence[Feed]) -> list[list[Array]]:
        if isinstance(model, Path) or model.graph.node[0].op_type != "MatMulInteger":
            return self.worker.run(model, feeds)
        constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
        weight, shift = constants["b"], int(constants["az"])
        sums = weight.astype(np.int32).sum(0)
        return [[saturated_product(f["a"], weight) - shift * sums] for f in feeds]


def saved(folder: Path, name: str) -> Path:
    path = folder / f"{name}.onnx"
    path.write_bytes(GRAPHS[name].SerializeToString())
    return path


@pytest.mark.parametrize(
    ("name", "form", "verdict"),
    [
        ("one_row", "dynamic", "same"),
        ("one_row", "weight-only", "none"),
        ("conv_groups", "qdq", "same"),
        ("matmulinteger_uint8_int8_narrow", "as-is", "same"),
        ("matmulinteger_uint8_int8_wide", "as-is", "stated"),
        ("convinteger_int8_uint8_narrow", "as-is", "stated"),
    ],
)
def test_verdicts(here: Worker, tmp_path: Path, name: str, form: str, verdict: str) -> None:
    workers = [here, Saturating(here)]
    assert check(saved(tmp_path, name), form, workers).verdict == verdict


def test_a_broken_promise_is_found(
    here: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report that promises what is not so, and one that does not say why it promises nothing."""
    path = saved(tmp_path, "matmulinteger_uint8_int8_wide")
    workers = [here, Saturating(here)]
    found = check(path, "as-is", workers)
    assert found.differ == ("y",) or runtime.saturates()
    monkeypatch.setattr(IntegerSums, "same", True)
    assert check(path, "as-is", workers).verdict == "wrong"
    monkeypatch.undo()
    real = saturation_check.saturation_account
    monkeypatch.setattr(
        saturation_check, "saturation_account", lambda *a: replace(real(*a), rows=[], linears=1)
    )
    assert check(path, "as-is", workers).verdict == "silent"


@pytest.mark.parametrize(
    "name", ["qlinearconv_uint8_int8_wide", "convinteger_uint8_int8_wide", "qgemm_uint8_int8_wide"]
)
def test_probes_have_the_exact_sums(name: str, here: Worker) -> None:
    [probe] = probes(IntegerSums(GRAPHS[name]), None)
    if not runtime.saturates() or name.startswith("convinteger"):
        for [found], exact in zip(here.run(probe.model, probe.feeds), probe.expected, strict=True):
            np.testing.assert_array_equal(found, exact)
    # A sum that is off by one shows.
    if name.startswith("qlinearconv"):
        wrong = [{**f, "c": f["c"] + np.int32(1)} for f in probe.feeds]
        for [found], exact in zip(here.run(probe.model, wrong), probe.expected, strict=True):
            assert (found != exact).all() or runtime.saturates()


def test_the_other_python_must_saturate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["same_sums", str(tmp_path), "--other", sys.executable])
    monkeypatch.setattr(Worker, "saturates", lambda _: False)
    with pytest.raises(SystemExit) as e:
        same_sums.main()
    assert e.value.code == 2 and "nothing to compare" in capsys.readouterr().err


def test_a_worker_knows_whether_it_saturates(here: Worker) -> None:
    assert here.saturates() == runtime.saturates()
