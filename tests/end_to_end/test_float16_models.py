"""Models that come in with Q/DQ in float16: the integer operators want float32 scales."""

from __future__ import annotations

import numpy as np
import pytest

import qcompile
from qcompile import Options
from qcompile.ir.model_io.to_proto import serialize
from qcompile.quant import Array
from qcompile.rewriting.testing import normal, parse
from qcompile.targets.target import Mode

HALF = np.float16
OPTIONS = Options(bench=False, threads=1)
DATA = "xq = QuantizeLinear(x, sx, zx) xd = DequantizeLinear(xq, sx, zx)"
SCALES: dict[str, Array] = {"sx": np.array(0.03, HALF), "zx": np.array(128, np.uint8)}
ONE = "float16 sx, uint8 zx"

Case = tuple[str, dict[str, Array], tuple[int, ...]]


def integers(*shape: int) -> Array:
    return np.random.default_rng(0).integers(-127, 128, shape).astype(np.int8)


CASES: dict[str, Case] = {
    "linear": (
        f"""g (float16[B,16] x, int8[16,8] wq, float16[8] sw, {ONE}) => (float16[B,8] y) {{
            {DATA} wd = DequantizeLinear<axis = 1>(wq, sw) y = MatMul(xd, wd) }}""",
        {**SCALES, "wq": integers(16, 8), "sw": np.full(8, 0.01, HALF)},
        (4, 16),
    ),
    "sum": (
        f"""g (float16[B,16] x, {ONE}) => (float16[B,16] y) {{
            {DATA} s = Add(xd, xd) q = QuantizeLinear(s, sx, zx) y = DequantizeLinear(q, sx, zx)
        }}""",
        SCALES,
        (4, 16),
    ),
    "convolution": (
        f"""g (float16[B,4,8,8] x, int8[8,4,3,3] wq, float16[8] sw, {ONE})
            => (float16[B,8,6,6] y) {{
            {DATA} wd = DequantizeLinear<axis = 0>(wq, sw) c = Conv(xd, wd)
            q = QuantizeLinear(c, sx, zx) y = DequantizeLinear(q, sx, zx) }}""",
        {**SCALES, "wq": integers(8, 4, 3, 3), "sw": np.full(8, 0.01, HALF)},
        (2, 4, 8, 8),
    ),
}


@pytest.mark.parametrize("mode", ["static", "dynamic", "weight-only", "float"])
@pytest.mark.parametrize("name", CASES)
def test_they_compile(name: str, mode: Mode) -> None:
    text, values, shape = CASES[name]
    graph = parse(text, 19, **values)
    feeds = [{"x": normal(*shape, seed=i).astype(HALF)} for i in range(8)]
    assert not qcompile.compile(serialize(graph), feeds, mode=mode, options=OPTIONS).report.failures


@pytest.mark.parametrize("mode", ["static", "dynamic", "weight-only"])
def test_a_table_is_scaled_in_float16(mode: Mode) -> None:
    """Over 1 MiB, for smaller ones stay as they are: the same half floats, before or after."""
    text = """g (int64[B,S] i) => (float16[B,S,64] y) {
            t = DequantizeLinear<axis = 0>(wq, sw) y = Gather(t, i) }"""
    scales = (np.abs(normal(20000)) + 0.01).astype(HALF)
    model = serialize(parse(text, 19, wq=integers(20000, 64), sw=scales))
    feeds = [{"i": np.random.default_rng(i).integers(0, 20000, (2, 5))} for i in range(8)]
    made = qcompile.compile(model, feeds, mode=mode, options=OPTIONS)
    assert "Mul" in made.report.operators and "DequantizeLinear" not in made.report.operators
    assert made.report.verdict is not None and made.report.verdict.sqnr_db == np.inf
