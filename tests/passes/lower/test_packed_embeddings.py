"""Tables that stay packed in memory: GatherBlockQuantized, and lookups in a layer's own weight."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir import Graph, array
from qcompile.ir.model_io.to_proto import serialize
from qcompile.passes.lower.lower_embeddings import LowerEmbeddings
from qcompile.passes.lower.lower_weight_only import LowerWeightOnly
from qcompile.planning import Context, Decision, Use
from qcompile.quant import Array, QSpec
from qcompile.rewriting.testing import (
    check,
    context,
    differential,
    normal,
    outputs,
    parse,
    run_pass,
)
from qcompile.runtime.session import optimized_ops

PACKED = LowerEmbeddings(form="packed")
ROWS = 9
SCALES = np.random.default_rng(1).uniform(0.001, 0.01, ROWS).astype(np.float32)
LOOKUP = "t = DequantizeLinear<axis = 0>(tq, s) y = Gather(t, i)"
FEEDS = [{"i": np.array([[8]])}, {"i": np.array([[0, 3, -1], [2, 2, -9]])}]
ONE_ROUNDING = 2.0**-23  # of a scale times a multiplier


def table(bits: int, channels: int, block: int | None = None) -> Array:
    """int8 (rows, channels) that needs this many bits, in blocks with multipliers of both signs."""
    low = -(1 << bits - 1)
    codes = np.random.default_rng(bits).integers(low, -low, (ROWS, channels), np.int8)
    codes[:, 0], codes[0, 0] = low, low + 1
    if block is None:
        return codes
    signs = np.resize(np.array([1, -3, 5, 7, -8], np.int8), -(-channels // block))
    times = np.stack([np.roll(signs, i) for i in range(ROWS)])
    found: Array = codes * np.repeat(times, block, axis=1)[:, :channels]
    return found


def embedding(values: Array, body: str = LOOKUP, out: str = "") -> Graph:
    text = f"g (int64[B,S] i) => (float[B,S,{values.shape[1]}] y{out}) {{ {body} }}"
    return parse(text, tq=values, s=SCALES)


@pytest.mark.parametrize("channels", [32, 40, 96, 2000])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_with_one_scale(bits: int, channels: int) -> None:
    """Bit-equal; one block is longer than a row. All attributes are there: defaults differ."""
    graph = embedding(table(bits, channels))
    ctx = context()
    ctx.origins |= {"tq": ("t", 40.0), "s": ("t", None)}
    differential(graph, PACKED, atol=0, feeds=FEEDS, ctx=ctx)
    block = max(32, 1 << (channels - 1).bit_length())
    check(
        graph,
        f"""
        CHECK: graph g
        CHECK-NEXT: %y = com.microsoft.GatherBlockQuantized(@tq/blocks:u8[9,{channels * bits // 8}]
        CHECK-SAME: , %i, @s/blocks:f32[9,1]
        CHECK-SAME: {{bits={bits}, block_size={block}, gather_axis=0, quantize_axis=1}}
        CHECK-NOT: %
        """,
    )
    assert ctx.origins["tq/blocks"] == ("t", 40.0)
    assert ctx.origins["s/blocks"] == ("t", None)
    assert not ctx.skips


@pytest.mark.parametrize("channels", [128, 136])
@pytest.mark.parametrize(("bits", "block"), [(2, 16), (2, 32), (4, 16), (4, 32), (4, 64)])
def test_rows_with_a_scale_per_block(bits: int, block: int, channels: int) -> None:
    """The last block may be short: the operator's rows are as long as the table's."""
    graph = embedding(table(bits, channels, block))
    differential(graph, PACKED, atol=0, rtol=ONE_ROUNDING, feeds=FEEDS)
    check(graph, f"CHECK: GatherBlockQuantized(\nCHECK-SAME: bits={bits}, block_size={block},")


@pytest.mark.parametrize(
    ("bits", "channels", "written", "reason"),
    [
        (2, 6, 4, "2 bits, and are stored in 4: the operator takes 4, 8"),
        (4, 5, 8, "4 bits, and are stored in 8: the operator takes 8"),
        (3, 40, 4, "3 bits, and are stored in 4: the operator takes 2, 4, 8"),
    ],
)
def test_rows_are_whole_bytes(bits: int, channels: int, written: int, reason: str) -> None:
    graph = embedding(table(bits, channels))
    ctx = differential(graph, PACKED, atol=0, feeds=FEEDS)
    check(graph, f"CHECK: GatherBlockQuantized(\nCHECK-SAME: bits={written},")
    assert reason in ctx.skips[0].reason


def test_a_single_index() -> None:
    text = f"g (int64 i) => (float[40] y) {{ {LOOKUP} }}"
    graph = parse(text, tq=table(4, 40), s=SCALES)
    differential(graph, PACKED, atol=0, feeds=[{"i": np.array(3)}])


def test_two_lookups_read_one_packed_table() -> None:
    out = ", float[B,S,400] z"
    graph = embedding(table(4, 400), f"{LOOKUP} z = Gather(t, i)", out)
    differential(graph, PACKED, atol=0, feeds=FEEDS)
    assert len(graph.constants()) == 2
    check(graph, "CHECK-COUNT-2: GatherBlockQuantized(")


def test_a_transposed_table() -> None:
    body = """w = DequantizeLinear<axis = 1>(tq, s) t = Transpose<perm = [1, 0]>(w)
        y = Gather(t, i)"""
    values = np.ascontiguousarray(table(4, 40).T)
    graph = parse(f"g (int64[B,S] i) => (float[B,S,40] y) {{ {body} }}", tq=values, s=SCALES)
    differential(graph, PACKED, atol=0, feeds=FEEDS)
    check(graph, "CHECK: GatherBlockQuantized(@tq/blocks:u8[9,20]")


@pytest.mark.parametrize(
    ("body", "out", "reason"),
    [
        (f"{LOOKUP} z = Neg(t)", ", float[9,40] z", "not only lookups read the table"),
        (f"{LOOKUP} z = Transpose(t)", ", float[40,9] z", "not only lookups read the table"),
        (f"{LOOKUP} z = Gather<axis = 1>(t, i)", ", float[9,B,S] z", "not only lookups read"),
        (LOOKUP, ", float[9,40] t", "not only lookups read the table"),
        (f"{LOOKUP} z = Neg(tq)", ", int8[9,40] z", "the table is also a layer's int8 weight"),
        (f"{LOOKUP} z = Identity(tq)", ", int8[9,40] z", "the table is also a layer's int8"),
    ],
)
def test_a_table_that_others_read_is_not_packed(body: str, out: str, reason: str) -> None:
    """It would be stored twice; rows are looked up as int8."""
    graph = embedding(table(4, 40), body, out)
    feeds = [{"i": np.array([[0, 3, -1], [2, 2, -9]])}]
    ctx = differential(graph, PACKED, atol=0, feeds=feeds)
    assert any(reason in s.reason for s in ctx.skips)
    check(graph, "CHECK-NOT: GatherBlockQuantized\nCHECK: Gather(@tq:i8[9,40]")


# ---- tables that are a layer's weight


def few_bits() -> Context:
    """A context whose plan asks for few bits."""
    ctx = context(mode="weight-only")
    spec = QSpec("int8", symmetric=True, granularity="channel", axis=1, width=4)
    ctx.plan.decide(Decision("w", "weight", spec, "asked for", (Use("MatMul:z", 1),)))
    return ctx


def tied(values: Array, transposed: bool) -> Graph:
    """A lookup in a table and a product by it, transposed; both dequantized as planned."""
    body = "w = DequantizeLinear<axis = 1>(wq, s) h = Identity(x) z = MatMul(h, w)"
    if transposed:
        body += " t = Transpose<perm = [1, 0]>(w) y = Gather(t, i)"
    else:
        body += " t = DequantizeLinear<axis = 0>(tq, s) y = Gather(t, i)"
    channels = values.shape[1]
    text = f"""g (int64[B,S] i, float[B,S,{channels}] x) =>
        (float[B,S,{channels}] y, float[B,S,{ROWS}] z) {{ {body} }}"""
    weights = {"wq": np.ascontiguousarray(values.T), "s": SCALES}
    return parse(text, **weights, **({} if transposed else {"tq": values}))


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("form", ["packed", "unpacked"])
@pytest.mark.parametrize("channels", [128, 200])
@pytest.mark.parametrize(("bits", "block"), [(2, 32), (4, 16), (4, None), (8, None)])
def test_rows_are_looked_up_in_the_weight_of_the_layer(
    bits: int, block: int | None, channels: int, form: str, transposed: bool
) -> None:
    """One tensor in the file, in either form; the last block of each row may be filled up."""
    graph = tied(table(bits, channels, block), transposed)
    feeds = [{**feed, "x": normal(*feed["i"].shape, channels)} for feed in FEEDS]
    passes = LowerWeightOnly(accuracy=0), LowerEmbeddings(form=form)
    ctx = few_bits()
    differential(graph, *passes, atol=1e-5, rtol=ONE_ROUNDING, feeds=feeds, ctx=ctx)
    large = [t for t in graph.constants().values() if len(t.shape) > 1]
    assert [array(t).dtype for t in large] == [np.uint8]
    assert not {"Reshape", "Slice"} & set(optimized_ops(serialize(graph)))  # folded at load


def test_a_provider_may_not_read_a_layers_weight() -> None:
    graph = tied(table(4, 128), transposed=True)
    run_pass(graph, LowerWeightOnly(), LowerEmbeddings(tied=False), ctx=few_bits())
    check(graph, "CHECK-NOT: GatherBlockQuantized\nCHECK: MatMulNBits")


def test_rows_of_a_layer_that_are_no_whole_bytes_are_stored_apart() -> None:
    """Of 5 values of 4 bits; as int8 they are whole."""
    graph = tied(table(4, 5), transposed=False)
    feeds = [{**feed, "x": normal(*feed["i"].shape, 5)} for feed in FEEDS]
    differential(
        graph,
        LowerWeightOnly(accuracy=0),
        LowerEmbeddings(),
        atol=1e-5,
        feeds=feeds,
        ctx=few_bits(),
    )
    check(graph, "CHECK-NOT: GatherBlockQuantized\nCHECK: MatMulNBits")


def test_lookups_in_the_weight_are_bit_equal() -> None:
    graph = tied(table(8, 200), transposed=True)
    feed = {**FEEDS[1], "x": normal(2, 3, 200)}
    expected = outputs(graph, feed)["y"]
    run_pass(graph, LowerWeightOnly(), LowerEmbeddings())
    np.testing.assert_array_equal(outputs(graph, feed)["y"], expected)


@pytest.mark.parametrize("changed", ["values", "scales"])
def test_a_table_of_other_integers_is_no_layers_weight(changed: str) -> None:
    graph = tied(table(4, 40), transposed=False)
    (lookup,) = (n for n in graph.nodes if n.op == "DequantizeLinear" and n.attrs["axis"] == 0)
    old = array(lookup.inputs[0 if changed == "values" else 1])
    new = old.copy()
    new[3] = new[3] * 2 if changed == "scales" else -new[3]
    graph.set_constant(lookup, 0 if changed == "values" else 1, new, "other")
    feeds = [{**feed, "x": normal(*feed["i"].shape, 40)} for feed in FEEDS]
    differential(
        graph,
        LowerWeightOnly(accuracy=0),
        LowerEmbeddings(),
        atol=1e-5,
        feeds=feeds,
        ctx=few_bits(),
    )
    check(graph, "CHECK: MatMulNBits\nCHECK-NOT: GatherBlockQuantized")


def test_forms_are_checked() -> None:
    with pytest.raises(ValueError, match="form is 'small', expected unpacked or packed"):
        LowerEmbeddings(form="small")
