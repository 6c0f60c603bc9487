"""What the benchmark of float16 forms measures, and that it sees a node without a kernel."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import qcompile
from benchmarks import float16_forms
from benchmarks._rounding_noise import FLOAT16, FLOAT32, with_noise
from benchmarks.float16_forms import FORMS, measure
from benchmarks.robustness._battery_feeds import BatteryFeeds
from qcompile import Gates, Options
from qcompile.compiler.stages.models import in_float32
from qcompile.runtime.session import Session, SessionOptions
from tests.encoder_files import save_encoder, token_feeds

OPEN = Gates(min_cosine=None, min_worst_cosine=None, min_r2=None)


def test_noise_has_the_size_of_the_rounding(tmp_path: Path) -> None:
    """On data whose mantissas are of all sizes, as the root mean square over all values."""
    x = np.exp(np.random.default_rng(0).uniform(-4, 4, (64, 500))).astype(np.float32)
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [64, 500]) for n in "xy"]
    half = helper.make_tensor_value_info("h", TensorProto.FLOAT16, [64, 500])
    nodes = [
        helper.make_node("Cast", ["x"], ["c"], to=TensorProto.FLOAT16),
        helper.make_node("Identity", ["c"], ["h"]),
        helper.make_node("Cast", ["h"], ["y"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], value_info=[half])
    opsets = [helper.make_opsetid("", 19)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    plain = x.astype(np.float16).astype(np.float32)

    def error(bits: int) -> float:
        found = Session(with_noise(model, bits), SessionOptions(optimize=False)).run({"x": x})["y"]
        return float(np.sqrt(np.mean(np.square(found / plain - 1))))

    of_float16 = float(np.sqrt(np.mean(np.square(plain / x - 1))))
    assert error(FLOAT16) == pytest.approx(of_float16, rel=0.05)
    assert error(FLOAT32) < of_float16 / 1000


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BatteryFeeds]:
    model = save_encoder(tmp_path_factory.mktemp("encoder") / "m.onnx")
    return model, BatteryFeeds(token_feeds(4), [token_feeds(2, seed=5)])


def test_noise_is_the_same_in_each_run(small: tuple[Path, BatteryFeeds]) -> None:
    model, feeds = small
    options = Options(bench=False, verify=False, threads=1)
    made = qcompile.compile(
        model, feeds.calibration, target="qdq", float16=True, gates=OPEN, options=options
    )
    feed, plain = feeds.fresh[0][0], SessionOptions(threads=1, optimize=False)

    def outputs(noise: bytes) -> dict[str, np.ndarray]:
        return Session(noise, plain).run(feed)

    one, again = (outputs(with_noise(made.model, FLOAT16)) for _ in range(2))
    other = outputs(with_noise(made.model, FLOAT16, seed=1))
    wide = in_float32(made.model)
    for name, exact in Session(wide.path, plain).run(feed).items():
        assert np.array_equal(one[name], again[name])
        assert not np.array_equal(one[name], other[name])
        assert not np.array_equal(one[name], exact)


def test_rows_have_all_figures(small: tuple[Path, BatteryFeeds]) -> None:
    for form in (FORMS[0], FORMS[3]):
        row = measure(small[0], "encoder", form, small[1])
        assert not row.error and row.nodes > 10
        assert all(0.9 < c <= 1.0001 for c in (row.mean, row.noise, row.last_bits, row.to_float))
        assert row.text().count("|") == 11


def test_a_node_without_a_kernel_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [3, 3, 3]) for n in "xy"]
    node = helper.make_node("Det", ["x"], ["d"])
    last = helper.make_node("Add", ["x", "d"], ["y"])
    graph = helper.make_graph([node, last], "g", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "m.onnx")
    monkeypatch.setattr(float16_forms, "FORMS", FORMS[:1])
    monkeypatch.setattr(sys, "argv", ["float16_forms", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        float16_forms.main()
    shown = capsys.readouterr().out
    assert ended.value.code == 1
    assert "Det" in shown and "has a kernel or meets the rules in 0 of 1 rows" in shown
