"""Weights of few bits are packed in the file, and int8 in a run."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir import Graph, nbytes
from qcompile.ir.model_io.from_proto import from_proto
from qcompile.ir.model_io.to_proto import serialize, to_proto
from qcompile.ir.printer import dump
from qcompile.passes.lower.storage.store_few_bits import StoreFewBits
from qcompile.planning import Context, Decision
from qcompile.quant import Array, QSpec
from qcompile.rewriting.testing import (
    assert_equivalent,
    assert_refused,
    check,
    context,
    differential,
    outputs,
    parse,
    run_pass,
)
from qcompile.runtime.session import optimized_ops

OPSET = 21
PRODUCT = "com.microsoft.MatMulIntegerToFloat"


def asked(target: str = "cpu") -> Context:
    """Of a compilation that asks for few bits of some weight."""
    ctx = context(target)
    spec = QSpec("int8", symmetric=True, granularity="channel", axis=1, width=4)
    ctx.plan.decisions.append(Decision("w", "weight", spec, (), "the recipe asks for 4 bits"))
    ctx.origins["w/int8"] = ("w", 31.0)
    return ctx


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(low, high + 1, shape).astype(np.int8)


def codes(bits: int, *shape: int, seed: int = 0) -> Array:
    return integers(-(1 << bits - 1), (1 << bits - 1) - 1, *shape, seed=seed)


def blocks(bits: int, block: int, rows: int, columns: int) -> Array:
    """Codes times multipliers of blocks of rows."""
    multipliers = integers(1, 7, -(-rows // block), columns, seed=1) * np.int8(-1)
    return codes(bits, rows, columns) * np.repeat(multipliers, block, axis=0)[:rows]


def product(w: Array, opset: int = OPSET) -> Graph:
    inputs, outputs = w.shape
    return parse(
        f"""g (uint8[n,{inputs}] x) => (float[n,{outputs}] y) {{
            y = {PRODUCT}(x, w_int8, a, s, z)
        }}""".replace("w_int8", '"w/int8"') if False else
        f"g (uint8[n,{inputs}] x) => (float[n,{outputs}] y) {{ y = {PRODUCT}(x, w, a, s, z) }}",
        opset,
        w=w,
        a=np.array(0.5, np.float32),
        s=np.ones(outputs, np.float32),
        z=np.array(3, np.uint8),
    )


def feed(inputs: int) -> dict[str, Array]:
    return {"x": np.random.default_rng(5).integers(0, 256, (4, inputs)).astype(np.uint8)}


def check_stored(graph: Graph, given: dict[str, Array], left: dict[str, int]) -> int:
    """Same results, packed, and only ``left`` in a run; returns the bytes that the file has less."""
    before, size = serialize(graph), outputs(graph, given, optimize=True)
    differential(graph, StoreFewBits(), atol=0, feeds=[given], ctx=asked())
    assert_equivalent(size, outputs(graph, given, optimize=True), atol=0)
    after = serialize(graph)
    assert dict(optimized_ops(after)) == left
    reread = from_proto(to_proto(graph))
    assert serialize(reread) == after and to_proto(reread).ir_version == 10
    return len(before) - len(after)


@pytest.mark.parametrize("bits", range(2, 8))
@pytest.mark.parametrize("shape", [(128, 256), (131, 257)])
def test_codes(bits: int, shape: tuple[int, int]) -> None:
    w = codes(bits, *shape)
    saved = check_stored(product(w), feed(shape[0]), {PRODUCT: 1})
    assert saved > w.size * (8 - bits) / 8 - 4000
