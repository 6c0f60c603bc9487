"""Sums of integers are judged in files with packed weights as in files with int8 weights."""

from __future__ import annotations

import numpy as np
import onnx
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


def single(w: Array) -> Graph:
    return parse(
        f"g (uint8[n,64] x) => (float[n,256] y) {{ y = {PRODUCT}(x, w, a, s) }}",
        21,
        w=w,
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


@pytest.mark.parametrize("shared", [False, True])
def test_the_option_of_exact_sums_fails_on_a_shared_weight(*, shared: bool) -> None:
    """Packed or not: several operators read one constant once it is unpacked."""
    plain, stored = (
        serialize(graph(CODES, WIDE, shared=shared)),
        packed(graph(CODES, WIDE, shared=shared)),
    )
    assert "/int4" in str(stored) and "/int4" not in str(plain)
    for data in (plain, stored):
        assert shares_weights(onnx.ModelProto.FromString(data)) is True
        assert IntegerSums(data).needed_option == NO_OPTION


def test_the_option_of_exact_sums_works_on_a_packed_weight() -> None:
    data = packed(single(LARGE))
    assert not shares_weights(onnx.ModelProto.FromString(data))
    assert IntegerSums(data).needed_option == "=".join(EXACT_SUMS)


@pytest.mark.parametrize("optimize", [True, False])
def test_exact_sessions_are_exact(*, optimize: bool) -> None:
    """Also where several operators read a packed weight, and where one may saturate."""
    x = integers(-128, 127, 5, 64, seed=7).view(np.uint8)
    options = SessionOptions(exact=True, optimize=optimize)
    for shared in (False, True):
        found = Session(packed(graph(CODES, LARGE, shared=shared)), options).run({"x": x})
        y, m = (x.astype(np.int64) @ w * np.float32(0.5) for w in (CODES, LARGE))
        assert np.array_equal(found["y"], y)
        assert np.array_equal(found["z"], m + (y if shared else m))
