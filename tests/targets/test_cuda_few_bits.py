"""Weights of few bits on target cuda: forms that its kernels read, with the values of the plan.

CUDA cannot be run here. The same nodes are run by the CPU provider, which has both operators.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

import qcompile
from qcompile import Gates, Options, Recipe, Result
from qcompile.ir import Graph, array
from qcompile.ir.model_io.from_proto import from_proto
from qcompile.passes.lower.lower_embeddings import LowerEmbeddings
from qcompile.planning import Context, Decision, Use
from qcompile.planning.context import WeightBits
from qcompile.quant import Array, QSpec
from qcompile.rewriting.testing import check, context, differential, model_proto, normal, parse
from qcompile.targets.cuda import CUDA, KERNELS

INT4 = LowerEmbeddings(form="int4", tied=False)
OFF = Gates(min_cosine=None, min_worst_cosine=None, min_r2=None)
ROWS = 9
SCALES = np.random.default_rng(1).uniform(0.001, 0.01, ROWS).astype(np.float32)
FEEDS = [{"i": np.array([[8]])}, {"i": np.array([[0, 3, -1], [2, 2, -9]])}]
ONE_ROUNDING = 2.0**-23  # of a scale times a multiplier
MULTIPLIERS = np.array([1, -3, 5, 7, -8], np.int8)


def table(bits: int, channels: int, block: int | None = None) -> Array:
    """int8 (rows, channels): codes, in blocks times multipliers of both signs."""
    low = -(1 << bits - 1)
    codes = np.random.default_rng(bits).integers(low, -low, (ROWS, channels), np.int8)
    codes[:, 0], codes[0, 0] = low, low + 1
    if block is None:
        return codes
    times = np.stack(
        [np.roll(np.resize(MULTIPLIERS, -(-channels // block)), i) for i in range(ROWS)]
    )
    found: Array = codes * np.repeat(times, block, axis=1)[:, :channels]
    return found


def few_bits() -> Context:
    """A context whose plan asks for few bits."""
    ctx = context("cuda", mode="weight-only")
    spec = QSpec("int8", symmetric=True, granularity="channel", axis=0, width=4)
    ctx.plan.decide(Decision("t", "weight", spec, "asked for", (Use("Gather:y", 0),)))
    return ctx


def lookup(values: Array) -> Graph:
    text = f"""g (int64[B,S] i) => (float[B,S,{values.shape[1]}] y) {{
        t = DequantizeLinear<axis = 0>(tq, s) y = Gather(t, i) }}"""
    return parse(text, tq=values, s=SCALES)


def read_by_cuda(graph: Graph, indices: Array) -> Array:
    """What CUDA's kernel computes, of 4-bit codes in INT4: the block is that of the value's place
    in the whole table, the zero point 0. Source: gather_block_quantized.cu.
    """
    (node,) = (n for n in graph.nodes if n.op == "GatherBlockQuantized")
    codes, scales = (array(node.inputs[i]) for i in (0, 2))
    flat = np.arange(codes.size) // node.attrs["block_size"]
    values = codes.astype(np.float32).reshape(-1) * scales.reshape(-1)[flat]
    found: Array = values.reshape(codes.shape)[indices]
    return found


@pytest.mark.parametrize(
    ("bits", "channels", "block", "written"),
    [
        (4, 64, None, 64), (4, 384, None, 128), (4, 96, 64, 32), (4, 48, 16, 16), (2, 128, 16, 16),
        (2, 128, None, 128), (3, 96, 32, 32),
    ],
)  # fmt: skip
def test_blocks_end_where_rows_do(
    bits: int, channels: int, block: int | None, written: int
) -> None:
    """Both kernels read the same; all attributes are there, since their defaults differ."""
    values = table(bits, channels, block)
    graph = lookup(values)
    ctx = differential(graph, INT4, atol=0, rtol=ONE_ROUNDING, feeds=FEEDS, ctx=few_bits())
    check(
        graph,
        f"""
        CHECK: %y = com.microsoft.GatherBlockQuantized(@tq/blocks:i4[9,{channels}]
        CHECK-SAME: {{bits=4, block_size={written}, gather_axis=0, quantize_axis=1}}
        """,
    )
    assert channels % written == 0
    expected = values.astype(np.float32) * SCALES[:, None]
    indices = FEEDS[1]["i"]
    np.testing.assert_allclose(read_by_cuda(graph, indices), expected[indices], rtol=ONE_ROUNDING)
    assert KERNELS.obstacle(graph.nodes[0], graph.opset) is None
    assert any("are stored in 4" in s.reason for s in ctx.skips) == (bits < 4)


def test_the_model_of_the_kernel_sees_a_block_across_rows() -> None:
    """The form of target cpu has a block that is longer than a row."""
    values = table(4, 96)
    graph = lookup(values)
    differential(graph, INT4, atol=0, feeds=FEEDS, ctx=few_bits())
    graph.nodes[0].attrs["block_size"] = 128
    expected = values.astype(np.float32) * SCALES[:, None]
    assert not np.allclose(read_by_cuda(graph, np.arange(ROWS)), expected)


def test_rows_that_are_no_whole_blocks_stay_int8() -> None:
    graph = lookup(table(4, 40))
    ctx = differential(graph, INT4, atol=0, feeds=FEEDS, ctx=few_bits())
    assert "rows of 40 values are no whole blocks of 16 or more: int8" in [
        s.reason for s in ctx.skips
    ]
    check(graph, "CHECK-NOT: GatherBlockQuantized\nCHECK: Gather(@tq:i8[9,40]")


@pytest.mark.parametrize("bits", [5, 8])
def test_codes_of_more_bits_stay_int8(bits: int) -> None:
    graph = lookup(table(bits, 64))
    differential(graph, INT4, atol=0, feeds=FEEDS, ctx=few_bits())
    check(graph, "CHECK-NOT: GatherBlockQuantized\nCHECK: Gather(@tq:i8[9,64]")


def test_tables_stay_as_they_are_where_nothing_asks_for_few_bits() -> None:
    graph = lookup(table(4, 64))
    differential(graph, INT4, atol=0, feeds=FEEDS, ctx=context("cuda", mode="weight-only"))
    check(graph, "CHECK-NOT: GatherBlockQuantized\nCHECK: Gather(@tq:i8[9,64]")


# ---- compiled


def compiled(weights: WeightBits, table_bits: WeightBits, channels: int = 96) -> Result:
    """A lookup and a layer, and a LayerNormalization between them, which is float16 too."""
    text = """g (int64[B,9] ids) => (float[B,9,32] y) {
        e = Gather(t, ids) n = LayerNormalization(e, g, b) y = MatMul(n, w) }"""
    given = {"t": normal(600, channels), "w": normal(channels, 32)}
    model = model_proto(text, g=np.ones(channels, np.float32), b=normal(channels), **given)
    feeds = [{"ids": np.random.default_rng(i).integers(0, 600, (4, 9))} for i in range(4)]
    recipe = Recipe(
        target="cuda",
        mode="weight-only",
        weight_bits=weights,
        embedding_bits=table_bits,
    )
    options = Options(bench=False, threads=1)
    return qcompile.compile(model, feeds, recipe=recipe, gates=OFF, options=options)


@pytest.mark.parametrize(("bits", "written"), [(2, 4), (3, 4), (4, 4), (5, 8), (8, 8)])
def test_every_node_has_a_kernel_and_the_report_the_bits(bits: WeightBits, written: int) -> None:
    result = compiled(bits, bits)
    graph = from_proto(onnx.load_from_string(result.model))
    assert result.report.requirements["kernels"] > 0
    (layer,) = (n for n in graph.nodes if n.op == "MatMulNBits")
    assert layer.attrs["bits"] == written
    lookups = [n for n in graph.nodes if n.op == "GatherBlockQuantized"]
    assert len(lookups) == (written == 4)
    for node in (layer, *lookups):
        assert array(node.inputs[2]).dtype == np.float16
    rows = [r for r in result.report.ledger if r.kind == "weight" and r.tensor in ("t", "w")]
    said = f"{bits} bits in the file" if bits == written else f"{bits} bits, {written} in the file"
    assert all(said in r.reason and "float in the run" in r.reason for r in rows if bits < 8)
    assert (len(result.model) < 600 * 96 * 0.8) == (written == 4)


def test_values_are_those_of_a_float_model_of_the_same_integers() -> None:
    """Up to float16, whose results are rounded by 2^-11 at each of a few nodes."""
    result = compiled(4, 4)
    assert result.report.verdict is not None
    model = onnx.load_from_string(result.model)
    graph = from_proto(model)
    (layer,) = (n for n in graph.nodes if n.op == "MatMulNBits")
    (lookup_node,) = (n for n in graph.nodes if n.op == "GatherBlockQuantized")
    block, k, n = (layer.attrs[a] for a in ("block_size", "K", "N"))
    packed, scales = array(layer.inputs[1]), array(layer.inputs[2]).astype(np.float32)
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(n, -1).astype(np.float32) - 8
    weight = (codes * np.repeat(scales.reshape(n, -1), block, axis=1))[:, :k].T
    codes = array(lookup_node.inputs[0]).astype(np.float32)
    steps = array(lookup_node.inputs[2]).astype(np.float32)
    rows = codes * np.repeat(steps, lookup_node.attrs["block_size"], axis=1)
    ids = np.random.default_rng(9).integers(0, 600, (4, 9))
    e = rows[ids]
    e = (e - e.mean(-1, keepdims=True)) / np.sqrt(e.var(-1, keepdims=True) + 1e-5)
    expected = (e + normal(96)) @ weight
    found = qcompile.session(result.model).run(None, {"ids": ids})[0]
    apart = np.abs(found - expected).max() / np.abs(expected).max()
    assert apart < 8 * 2**-11


def test_few_bits_are_data_of_the_target() -> None:
    assert {bits: few.stored for bits, few in CUDA.few_bits.items()} == {
        2: 4, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8,
    }  # fmt: skip


@pytest.mark.parametrize(("bits", "fits"), [(2, False), (4, True), (8, True)])
@pytest.mark.parametrize("op", ["MatMulNBits", "GatherBlockQuantized"])
def test_the_table_of_kernels_knows_the_widths(op: str, bits: int, fits: bool) -> None:
    given: dict[str, Any] = {"w": np.zeros((4, 32), np.uint8), "s": np.ones((4, 1), np.float32)}
    call = {
        "MatMulNBits": "x, w, s",
        "GatherBlockQuantized": "w, i, s",
    }[op]
    text = f"""g (float[N,32] x, int64[N] i) => (float[N,32] y) {{
        y = com.microsoft.{op}<bits = {bits}, block_size = 32, K = 32, N = 4>({call}) }}"""
    graph = parse(text, **given)
    refusal = KERNELS.obstacle(graph.nodes[0], 1)
    assert (refusal is None) == fits
