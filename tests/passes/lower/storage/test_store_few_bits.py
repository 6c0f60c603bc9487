"""Weights of few bits are packed in the file, and int8 in a run."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.ir.lazy_values import is_stored
from qcompile.ir.model_io.from_proto import from_proto
from qcompile.ir.model_io.to_proto import serialize, to_proto
from qcompile.ir.model_io.write_model import write_model
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
from qcompile.runtime.session import Session, optimized_ops
from qcompile.runtime.spilled_arrays import Store

OPSET = 21
PRODUCT = "com.microsoft.MatMulIntegerToFloat"


def asked(target: str = "cpu") -> Context:
    """Of a compilation that asks for few bits of some weight."""
    ctx = context(target)
    spec = QSpec("int8", symmetric=True, granularity="channel", axis=1, width=4)
    ctx.plan.decisions.append(Decision("w", "weight", spec, "the recipe asks for 4 bits"))
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
    """Bytes that the file has less; the same results, and only operators ``left`` in a run."""
    before, expected = serialize(graph), outputs(graph, given, optimize=True)
    differential(graph, StoreFewBits(), atol=0, feeds=[given], ctx=asked())
    assert_equivalent(expected, outputs(graph, given, optimize=True), atol=0)
    after = serialize(graph)
    assert dict(optimized_ops(after)) == dict(optimized_ops(before)) == left
    reread = from_proto(to_proto(graph))
    assert serialize(reread) == after and to_proto(reread).ir_version == 10
    return len(before) - len(after)


def packed(graph: Graph) -> dict[str, str]:
    """Names and types of the constants that are packed."""
    found = {name: str(t.dtype) for name, t in graph.constants().items()}
    return {name: kind for name, kind in found.items() if kind in ("int4", "uint4")}


def test_golden() -> None:
    graph = product(codes(4, 64, 256))
    run_pass(graph, StoreFewBits(), ctx=(ctx := asked()))
    check(
        graph,
        """
        CHECK: %w/int8 = Cast(@w/int4:i4[64,256]#{{.*}}) {to=3}
        CHECK-NEXT: %y = com.microsoft.MatMulIntegerToFloat(%x, %w/int8, @a
        """,
    )
    assert ctx.origins["w/int4"] == ("w", None)


def test_golden_of_planes_and_blocks() -> None:
    graph = product(blocks(3, 16, 128, 256))
    run_pass(graph, StoreFewBits(), ctx=asked())
    check(
        graph,
        """
        CHECK-DAG: %w/nibbles = Cast(@w/uint4:u4[1,24576]#{{.*}}) {to=2}
        CHECK-DAG: %w/plane = Slice(%w/nibbles, @unpack/0
        CHECK-DAG: %w/masked = BitwiseAnd(%w/plane, @unpack/3
        CHECK-DAG: %w/centred = Sub(%w/int8, @unpack/4
        CHECK-DAG: %w/multipliers/int8 = Cast(@w/multipliers:i4[8,1,256]
        CHECK-DAG: %w/multiplied = Mul(%w/centred/shaped, %w/multipliers/joined)
        CHECK: %y = com.microsoft.MatMulIntegerToFloat(%x, %w/multiplied
        """,
    )


@pytest.mark.parametrize("bits", range(2, 8))
@pytest.mark.parametrize("shape", [(128, 256), (131, 257)])
def test_codes(bits: int, shape: tuple[int, int]) -> None:
    w = codes(bits, *shape)
    saved = check_stored(product(w), feed(shape[0]), {PRODUCT: 1})
    assert saved > w.size * (8 - bits) / 8 - 4000


@pytest.mark.parametrize("rows", [128, 135])
@pytest.mark.parametrize("bits", [2, 4])
def test_multipliers_of_blocks(rows: int, bits: int) -> None:
    """135 rows: the last block is shorter."""
    saved = check_stored(product(blocks(bits, 16, rows, 256)), feed(rows), {PRODUCT: 1})
    assert saved > rows * 256 * (8 - bits - 0.3) / 8 - 4000


def test_rows_that_repeat_others_are_stored_once() -> None:
    """As split-outliers appends them: from different blocks, so that no block has a multiplier."""
    w = blocks(4, 16, 128, 256)
    repeated = [3, 17, 40, 3]
    saved = check_stored(product(np.concatenate([w, w[repeated]])), feed(132), {PRODUCT: 1})
    assert saved > 128 * 256 * (8 - 4 - 0.3) / 8
    graph = product(np.concatenate([w, w[repeated]]))
    run_pass(graph, StoreFewBits(), ctx=asked())
    check(
        graph,
        """
        CHECK: %w/again = Gather(%w/{{.*}}, @w/repeated:i64[4]
        CHECK: %w/all = Concat(%w/{{.*}}, %w/again) {axis=0}
        """,
    )


def test_columns_that_repeat_others_are_stored_once() -> None:
    """As split-outliers appends them to the layer that computes the additional columns."""
    w = blocks(4, 16, 128, 256)
    repeated = np.arange(40, 96)
    wider = np.concatenate([w, w[:, repeated]], axis=1)
    saved = check_stored(product(wider), feed(128), {PRODUCT: 1})
    assert saved > wider.size - 128 * 256 * (4 + 0.3) / 8 - 4000
    graph = product(wider)
    run_pass(graph, StoreFewBits(), ctx=asked())
    check(
        graph,
        """
        CHECK: %w/again = Gather(%w/{{.*}}, @w/repeated:i64[56]
        CHECK: %w/all = Concat(%w/{{.*}}, %w/again) {axis=-1}
        """,
    )


def test_one_multiplier_for_each_output() -> None:
    w = codes(4, 64, 256) * np.where(np.arange(256) % 2, -1, 1).astype(np.int8)
    check_stored(product(w), feed(64), {PRODUCT: 1})


def test_multipliers_of_eight_bits_and_row_factors() -> None:
    factors = np.random.default_rng(2).choice([1, 2], 64).astype(np.int8)[:, None]
    multipliers = integers(9, 12, 4, 256, seed=1)
    wide = codes(3, 64, 256) * np.repeat(multipliers, 16, axis=0)
    check_stored(product(wide), feed(64), {PRODUCT: 1})
    check_stored(product(codes(5, 64, 256) * factors), feed(64), {PRODUCT: 1})
    both = blocks(3, 16, 64, 256) * factors
    check_stored(product(both), feed(64), {PRODUCT: 1})


LOOKUP = {"i": np.array([[0, 511, 4], [4, 7, 200]])}


@pytest.mark.parametrize("rows", ["codes", "blocks"])
def test_rows_of_a_table(rows: str) -> None:
    t = codes(4, 512, 72) if rows == "codes" else np.ascontiguousarray(blocks(2, 16, 72, 512).T)
    graph = parse("g (int64[n,m] i) => (int8[n,m,72] y) { y = Gather(t, i) }", OPSET, t=t)
    check_stored(graph, LOOKUP, {"Gather": 1})


def test_a_tied_table_is_packed_once() -> None:
    graph = parse(
        f"""g (int64[n,m] i, uint8[n,k,64] x) => (int8[n,m,64] e, float[n,k,512] y) {{
            e = Gather(t, i) w = Transpose<perm = [1, 0]>(t) y = {PRODUCT}(x, w, a, s)
        }}""",
        OPSET,
        t=np.ascontiguousarray(blocks(4, 16, 64, 512).T),
        a=np.array(0.5, np.float32),
        s=np.ones(512, np.float32),
    )
    x = np.random.default_rng(5).integers(0, 256, (2, 3, 64)).astype(np.uint8)
    assert check_stored(graph, {**LOOKUP, "x": x}, {"Gather": 1, PRODUCT: 1}) > 512 * 64 * 0.4
    assert packed(graph) == {"t/int4": "int4", "t/multipliers": "int4"}


def test_kernels_of_a_convolution() -> None:
    graph = parse(
        """g (uint8[n,16,9,9] x) => (uint8[n,64,7,7] y) {
            y = QLinearConv(x, one, zero, k, s, kz, one, zero)
        }""",
        OPSET,
        k=np.ascontiguousarray(blocks(3, 16, 144, 64).T).reshape(64, 16, 3, 3),
        one=np.array(1, np.float32),
        zero=np.array(0, np.uint8),
        s=np.full(64, 0.01, np.float32),
        kz=np.zeros(64, np.int8),
    )
    x = np.random.default_rng(5).integers(0, 256, (2, 16, 9, 9)).astype(np.uint8)
    check_stored(graph, {"x": x}, {"Transpose": 2, "com.microsoft.QLinearConv": 1})  # channels last


def test_a_weight_that_is_float_in_a_run() -> None:
    """The form that dequantize-at-load writes."""
    graph = parse(
        """g (float[n,256] x) => (float[n,64] y) {
            c = Cast<to = 1>(w) m = Mul(c, s) t = Transpose<perm = [1, 0]>(m) y = MatMul(x, t)
        }""",
        OPSET,
        w=codes(5, 64, 256),
        s=np.full((64, 1), 0.5, np.float32),
    )
    x = np.random.default_rng(5).standard_normal((3, 256), np.float32)
    before = outputs(graph, {"x": x}, optimize=True)
    run_pass(graph, StoreFewBits(), ctx=asked())
    assert_equivalent(before, outputs(graph, {"x": x}, optimize=True), atol=0)
    assert dict(optimized_ops(serialize(graph))) in ({"MatMul": 1}, {"Gemm": 1})
    assert packed(graph) == {"w/uint4": "uint4"}


def test_what_remains_in_a_run_is_seen() -> None:
    """The check on ONNX Runtime's graph: multipliers that are fed cannot be applied at load."""
    graph = parse(
        f"""g (uint8[n,64] x, int8[256] fed) => (float[n,256] y) {{
            v = Mul(w, fed) y = {PRODUCT}(x, v, a, s)
        }}""",
        OPSET,
        w=codes(4, 64, 256),
        a=np.array(0.5, np.float32),
        s=np.ones(256, np.float32),
    )
    given = {**feed(64), "fed": np.ones(256, np.int8)}
    with pytest.raises(AssertionError):
        check_stored(graph, given, {PRODUCT: 1})
    assert packed(graph)


def test_stays_where_nothing_asks_for_few_bits() -> None:
    graph = product(codes(4, 64, 256))
    before = dump(graph)
    run_pass(graph, StoreFewBits(), ctx=context())
    assert dump(graph) == before


@pytest.mark.parametrize(
    "w", [integers(-127, 127, 64, 256), codes(4, 32, 64)], ids=["8 bits", "small"]
)
def test_stays_where_nothing_is_saved(w: Array) -> None:
    graph = product(w)
    before = dump(graph)
    run_pass(graph, StoreFewBits(), ctx=asked())
    assert dump(graph) == before


def test_refuses_an_opset_without_the_types() -> None:
    reason = "opset 20 has no types of 4 bits: they need opset 21"
    assert_refused(product(codes(4, 64, 256), 20), StoreFewBits(), reason, asked())


def test_refuses_what_a_subgraph_reads() -> None:
    graph = parse(
        """g (bool c, int8[64,256] x) => (int8[64,256] y) {
            y = If(c) <
                then_branch = t () => (int8[64,256] a) { a = Add(x, w) },
                else_branch = e () => (int8[64,256] b) { b = Identity(x) }
            >
        }""",
        OPSET,
        w=codes(4, 64, 256),
    )
    assert_refused(graph, StoreFewBits(), "but a subgraph reads it", asked())


@pytest.mark.parametrize("limit", [None, 100])
@pytest.mark.parametrize("bits", [4, 5])
def test_kept_constants_are_written_packed(
    bits: int, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in large models: new constants are kept in files, and weights are written apart."""
    monkeypatch.setattr("qcompile.ir.graph._LARGE", 1 << 10)
    graph = product(codes(bits, 64, 256))
    expected = outputs(graph, feed(64))
    graph.keep = Store().constant
    run_pass(graph, StoreFewBits(), ctx=asked())
    assert all(is_stored(graph.constants()[name]) for name in packed(graph))
    files = write_model(graph, limit=limit)
    assert (files.data is not None) == (limit is not None)
    room = 3500 if limit is None else 3500 + 2 * 4096  # nodes; weights that begin on pages
    assert files.size < 64 * 256 * bits / 8 + room
    assert_equivalent(expected, Session(files.path).run(feed(64)), atol=0)


def test_a_weight_that_repeats_one_row_is_packed() -> None:
    """Rows that are not stored count among the bytes saved."""
    w = np.full((128, 96), 7, np.int8)
    assert check_stored(product(w), feed(128), {PRODUCT: 1}) > 9_000


def test_a_weight_that_is_too_small_to_pack_says_so() -> None:
    graph, ctx = product(codes(4, 32, 64)), asked()
    ctx.origins["w"] = ("w", None)
    run_pass(graph, StoreFewBits(), ctx=ctx)
    assert not packed(graph)
    assert [d.reason for d in ctx.plan.decisions] == [
        "8 bits in the file: packing 4 bits would save 1,024 bytes, under 4,096"
    ]
