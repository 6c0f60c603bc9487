"""Sums of integers are judged in files with packed weights as in files with int8 weights."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.compiler.stages.saturation_check import NO_OPTION, IntegerSums
from qcompile.ir import Graph
from qcompile.ir.model_io.to_proto import serialize
from qcompile.passes.lower.storage.store_few_bits import StoreFewBits
from qcompile.planning import Decision
from qcompile.quant import Array, QSpec
from qcompile.rewriting.testing import context, parse, run_pass
from qcompile.runtime.exact_sums import shares_weights
from qcompile.runtime.session import EXACT_SUMS, Session, SessionOptions

PRODUCT = "com.microsoft.MatMulIntegerToFloat"


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(low, high + 1, shape).astype(np.int8)


def graph(w: Array, v: Array, *, shared: bool = False) -> Graph:
    """Two products, whose weights are [64, 256]; the second one also reads w where shared."""
    second = "w" if shared else "v"
    return parse(
        f"""g (uint8[n,64] x) => (float[n,256] y, float[n,256] z) {{
            y = {PRODUCT}(x, w, a, s) m = {PRODUCT}(x, v, a, s)
            k = {PRODUCT}(x, {second}, a, s) z = Add(k, m)
        }}""",
        21,
        w=w,
        v=v,
        a=np.array(0.5, np.float32),
        s=np.ones(256, np.float32),
    )


def packed(model: Graph) -> bytes:
    ctx = context()
    spec = QSpec("int8", symmetric=True, granularity="channel", axis=1, width=4)
    ctx.plan.decisions.append(Decision("w", "weight", spec, "asked for"))
    before = serialize(model)
    run_pass(model, StoreFewBits(), ctx=ctx)
    data = serialize(model)
    assert len(data) < len(before)
    return data


CODES, BLOCKS = integers(-8, 7, 64, 256), integers(-4, 3, 64, 256, seed=1) * np.int8(5)
WIDE = integers(-127, 127, 64, 256, seed=2)
LARGE = integers(-8, 7, 64, 256, seed=3) * np.repeat(integers(9, 15, 4, 256, seed=4), 16, axis=0)


@pytest.mark.parametrize(("v", "same"), [(BLOCKS, True), (LARGE, False), (WIDE, False)])
def test_sums_are_bounded_by_the_unpacked_values(v: Array, *, same: bool) -> None:
    """LARGE is packed too, but its values reach 120."""
    plain, stored = IntegerSums(serialize(graph(CODES, v))), IntegerSums(packed(graph(CODES, v)))
    assert plain.same is stored.same is same
    assert stored.bounds == plain.bounds and len(stored.bounds) == 3
    assert all(linear.weight is not None for linear in stored.linears)


def test_the_option_of_exact_sums_is_named() -> None:
    model = packed(graph(CODES, WIDE))
    assert not shares_weights(from_bytes(packed(graph(CODES, CODES[::-1]))))
    assert IntegerSums(model).needed_option in (NO_OPTION, "=".join(EXACT_SUMS))
