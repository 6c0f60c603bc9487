"""What the ledger claims of a run is what ONNX Runtime's own optimized graph has."""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import qcompile
from qcompile import Options, Recipe
from qcompile.compiler.report.ledger import LedgerRow, ledger_rows, with_uses
from qcompile.compiler.report.weight_uses import Use, weight_uses
from qcompile.quant import Array
from qcompile.rewriting.testing import model_proto, normal
from qcompile.runtime.session import optimized_graph

ROWS = 2048  # smaller tables stay float
LARGE = 2500  # bytes; ONNX Runtime merges small constants of equal values
TEXT = """g (int64[B,S] ids) => (float[B,S,128] y) {
    e = Gather(table, ids) a = MatMul(e, w) h = Tanh(a) y = MatMul(h, v)
}"""
STATIC4: dict[str, Any] = {"weight_bits": 4, "embedding_bits": 4}
ONLY: dict[str, Any] = {"mode": "weight-only", **STATIC4}
PACKED: dict[str, Any] = {"forms": (("table", "packed"),)}
QDQ: dict[str, Any] = {"target": "qdq", **STATIC4}

# For each form: stored, computed with and held in memory, of layers and of the table.
FORMS: dict[str, tuple[dict[str, Any], tuple[str, str, str], tuple[str, str, str]]] = {
    "cpu W4": (STATIC4, ("int4", "int8", "int8"), ("int4", "float", "int8")),
    "cpu W6": ({**STATIC4, "weight_bits": 6},
               ("int6", "int8", "int8"), ("int4", "float", "int8")),
    "cpu W8": ({}, ("int8", "int8", "int8"), ("int8", "float", "int8")),
    "weight-only": (ONLY, ("int4", "int8", "int4"), ("int4", "float", "int8")),
    "weight-only, float data": (
        {**ONLY, "forms": (("weight-only-data", "float"),)},
        ("int4", "float", "int4"), ("int4", "float", "int8")),
    "packed table": (STATIC4 | PACKED, ("int4", "int8", "int8"), ("int4", "float", "int4")),
    "qdq W4A8": (QDQ, ("uint4", "float", "uint4"), ("uint4", "float", "uint4")),
    "qdq W4": ({**QDQ, "mode": "weight-only"},
               ("uint4", "int8", "uint4"), ("uint4", "float", "uint4")),
    "float": ({"mode": "float"}, ("float", "float", "float"), ("float", "float", "float")),
}  # fmt: skip


@functools.cache
def compiled(form: str) -> tuple[onnx.ModelProto, onnx.GraphProto, list[LedgerRow]]:
    """The written model, the graph that is run, and the rows of the report."""
    values = {
        "table": normal(ROWS, 128),
        "w": normal(128, 512, seed=1),
        "v": normal(512, 128, seed=2),
    }
    model = model_proto(TEXT, 21, **values)
    recipe = Recipe(**{"transforms": "none", **FORMS[form][0]})
    ids = np.random.default_rng(0).integers(0, 256, (16, 8))
    data = [{"ids": ids}] if recipe.mode in (None, "static") else None
    options = Options(bench=False, verify=False)
    result = qcompile.compile(model, data, recipe=recipe, options=options)
    written = onnx.load_from_string(result.model)
    return written, optimized_graph(result.model), result.report.ledger


def nbytes(tensor: TensorProto) -> int:
    packed = tensor.data_type in (TensorProto.INT4, TensorProto.UINT4)
    whole = int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    count: int = math.prod(tensor.dims)
    return count // 2 if packed else count * whole


def faults(rows: list[LedgerRow], run: onnx.GraphProto) -> Counter[int]:
    """Sizes of large constants that only the rows, or only the graph that is run, have."""
    claimed = Counter(row.memory for row in rows if row.memory is not None and row.memory > LARGE)
    held = Counter(size for size in map(nbytes, run.initializer) if size > LARGE)
    return (claimed - held) + (held - claimed)


@pytest.mark.parametrize("form", FORMS)
def test_memory_is_that_of_the_optimized_graph(form: str) -> None:
    written, run, rows = compiled(form)
    assert not faults(rows, run)
    size = written.ByteSize()
    assert (
        sum(row.bytes for row in rows) == size == sum(r.bytes for r in ledger_rows(written, size))
    )


def test_a_false_claim_is_seen() -> None:
    _, run, rows = compiled("cpu W4")
    packed = [replace(r, memory=r.bytes) if r.dtype == "int4" else r for r in rows]
    assert faults(packed, run)
    assert faults(rows, compiled("weight-only")[1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("alone", [False, True])
def test_rows_say_what_is_stored_computed_and_held(form: str, *, alone: bool) -> None:
    """In the report, and from the file alone."""
    written, _, rows = compiled(form)
    if alone:
        rows = with_uses(ledger_rows(written, written.ByteSize()), written)
    weights = {row.name.partition("/")[0]: row for row in rows if row.kind == "weight"}
    _, layers, table = FORMS[form]
    for name, expected in (("v", layers), ("table", table)):
        row = weights[name]
        assert (row.dtype, row.computed, row.memory_dtype) == expected, name
    assert (weights["w"].shape, weights["table"].shape) == ((128, 512), (ROWS, 128))
    # In Q/DQ all of the table is dequantized, else rows of it.
    assert weights["table"].looked_up == ("qdq" not in form) and not weights["w"].looked_up


@pytest.mark.parametrize("form", FORMS)
def test_the_types_are_those_of_the_operators_that_run(form: str) -> None:
    written, run, _ = compiled(form)
    integer = {"MatMulIntegerToFloat", "DynamicQuantizeMatMul"}
    found = set()
    for node in run.node:
        blocks = node.op_type == "MatMulNBits"
        level = next((a.i for a in node.attribute if a.name == "accuracy_level"), 0)
        if blocks or node.op_type in {"MatMul", *integer}:
            found.add("int8" if level == 4 or node.op_type in integer else "float")
    assert FORMS[form][1][1] in found
    by_rules, in_run = weight_uses(written), weight_uses(written, run_graph=run)
    weights = [t.name for t in written.graph.initializer if not t.name.endswith(("scale", "point"))]
    types = [{n: uses[n].computed for n in weights} for uses in (by_rules, in_run)]
    assert types[0] == types[1] and set(types[0].values()) >= found


def differing(form: str) -> bool:
    return any(row.differs for row in compiled(form)[2])


def test_only_what_differs_from_the_file_differs() -> None:
    assert not differing("cpu W8") and not differing("float")
    assert all(map(differing, ("cpu W4", "cpu W6", "weight-only, float data", "qdq W4")))


# ---- graphs of other tools


ONE, ZERO = np.array(0.1, np.float32), np.array(128, np.uint8)
STEPS = np.ones(64, np.float32)
QUANTIZED = "q = QuantizeLinear(x, o, z) a = DequantizeLinear(q, o, z)"
W8 = np.random.default_rng(0).integers(-8, 8, (64, 64)).astype(np.int8)
W4 = W8.astype(onnx.helper.tensor_dtype_to_np_dtype(TensorProto.INT4))
MORE = {"v": normal(64, 64), "low": np.array(0, np.uint8), "one": np.array([1])}
HALF = np.ones((64, 64), np.float16)
D = "d = DequantizeLinear<axis = 1>(w, s)"
HAND_WRITTEN: dict[str, tuple[str, Array, str, str]] = {
    "MatMul of quantized data": (f"{QUANTIZED} {D} y = MatMul(a, d)", W8, "int8", "int8"),
    "4 bits are not multiplied by quantized data":
        (f"{QUANTIZED} {D} y = MatMul(a, d)", W4, "float", "int4"),
    "4 bits by float data": (f"{D} y = MatMul(x, d)", W4, "int8", "int4"),
    "8 bits by float data": (f"{D} y = MatMul(x, d)", W8, "int8", "int8"),
    "Gemm": (f"{D} y = Gemm(x, d, bias)", W4, "int8", "int4"),
    "scales that something else reads too": (f"{D} y = Gemm(x, d, s)", W4, "float", "int4"),
    "Gemm with a transposed weight": (f"{D} y = Gemm<transB = 1>(x, d, s)", W4, "float", "int4"),
    "scales of inputs":
        ("d = DequantizeLinear<axis = 0>(w, s) y = MatMul(x, d)", W4, "float", "int4"),
    "two readers": (f"{D} y1 = MatMul(x, d) y = MatMul(y1, d)", W8, "float", "int8"),
    "Relu behind it": (f"{D} a = MatMul(x, d) r = Relu(a) y = MatMul(r, v)", W4, "float", "int4"),
    "Relu at the end": (f"{D} a = MatMul(x, d) y = Relu(a)", W4, "int8", "int4"),
    "Relu in front of a quantizer": (
        f"{QUANTIZED} {D} m = MatMul(a, d) r = Relu(m) k = QuantizeLinear(r, o, low)"
        " y = DequantizeLinear(k, o, low)", W8, "int8", "int8"),
    "quantized data behind a Reshape":
        (f"{QUANTIZED} r = Unsqueeze(a, one) t = Squeeze(r, one) {D} y = MatMul(t, d)",
         W4, "float", "int4"),
    "computed at load": ("d = Cast<to = 1>(w) y = MatMul(x, d)", W4, "float", "float"),
    "float16": ("h = Cast<to = 10>(x) m = MatMul(h, w) y = Cast<to = 1>(m)",
                HALF, "float", "float"),
    "Transpose at load": ("d = Transpose(w) y = MatMul(x, d)", normal(64, 64), "float", "float"),
    "the shape is a node":
        ("n = Constant<value_ints = [64, 64]>() d = Reshape(w, n) y = MatMul(x, d)",
         normal(32, 128), "float", "float"),
    "not read": ("y = Relu(x)", W8, "", ""),
    "an output of the graph": ("u = Identity(w) y = Relu(x)", W8, "int8", "int8"),
}  # fmt: skip


def hand_written(body: str, weight: Array) -> onnx.ModelProto:
    header = '<ir_version: 10, opset_import: ["": 21]>'
    outputs = "float[N,64] y" + (", int8[64,64] u" if " u = " in f" {body}" else "")
    text = f"{header} g (float[N,64] x) => ({outputs}) {{ {body} }}"
    return model_proto(text, w=weight, s=STEPS, bias=STEPS, o=ONE, z=ZERO, **MORE)


@pytest.mark.parametrize("case", HAND_WRITTEN)
def test_rules_and_the_optimized_graph_say_the_same(case: str) -> None:
    body, weight, computed, memory = HAND_WRITTEN[case]
    model = hand_written(body, weight)
    use = weight_uses(model)["w"]
    assert (use.computed, use.memory_dtype) == (computed, memory)
    run = optimized_graph(model.SerializeToString())
    assert weight_uses(model, run_graph=run)["w"] == use
    if memory:
        assert use.memory in map(nbytes, run.initializer)


def test_a_float_bias_keeps_a_layer_float_which_only_the_run_shows() -> None:
    """The Add becomes part of a Gemm before anything else is fused."""
    model = hand_written(f"{QUANTIZED} {D} m = MatMul(a, d) y = Add(m, s)", W8)
    assert weight_uses(model)["w"].computed == "int8"
    run = optimized_graph(model.SerializeToString())
    assert weight_uses(model, run_graph=run)["w"].computed == "float"


def test_scales_that_the_runtime_repeats_for_each_block_count() -> None:
    model = hand_written(f"{D} y = MatMul(x, d)", W4)
    run = optimized_graph(model.SerializeToString())
    assert weight_uses(model)["s"].memory == 64 * 4
    assert weight_uses(model, run_graph=run)["s"].memory == 2 * 64 * 4


def test_a_weight_behind_identities_is_in_memory_once() -> None:
    """So are equal nodes; a weight that is read in two orders is there twice."""
    once = "a = Identity(w) b = Identity(w) m = MatMul(x, a) y = MatMul(m, b)"
    equal = "a = Transpose(w) b = Transpose(w) m = MatMul(x, a) y = MatMul(m, b)"
    twice = "a = Transpose(w) m = MatMul(x, a) y = MatMul(m, w)"
    for body, copies in ((once, 1), (equal, 1), (twice, 2)):
        model = hand_written(body, normal(64, 64))
        run = optimized_graph(model.SerializeToString())
        assert weight_uses(model)["w"].memory == copies * 64 * 64 * 4
        assert sum(map(nbytes, run.initializer)) == copies * 64 * 64 * 4


def test_what_a_body_reads_is_read() -> None:
    model = model_proto(
        """g (float[N,64] x, bool c) => (float[N,64] y) {
            y = If(c) <
                then_branch = t () => (float[N,64] a) { a = MatMul(x, w) },
                else_branch = e () => (float[N,64] b) { b = Relu(x) }
            >
        }""",
        w=normal(64, 64),
    )
    assert weight_uses(model)["w"] == Use("float", False, "float", 64 * 64 * 4)


@pytest.mark.parametrize(
    ("attributes", "more", "computed"),
    [
        ("bits = 4, block_size = 32, accuracy_level = 4", "", "int8"),
        ("bits = 4, block_size = 32, accuracy_level = 1", "", "float"),
        ("bits = 4, block_size = 32", "", "float"),
        ("bits = 4, block_size = 32, accuracy_level = 4", ", s", "float"),  # float zero points
        ("bits = 2, block_size = 64, accuracy_level = 4", "", "int8"),
        ("bits = 2, block_size = 16, accuracy_level = 4", "", "float"),  # no such kernel
    ],
)
def test_blocks_say_their_bits_shape_and_type(attributes: str, more: str, computed: str) -> None:
    text = f"""g (float[N,64] x) => (float[N,5] y) {{
        y = com.microsoft.MatMulNBits<K = 64, N = 5, {attributes}>(x, w, s{more})
    }}"""
    bits, block = (int(part.split("=")[1]) for part in attributes.split(",")[:2])
    blocks = np.zeros((5, 64 // block, block * bits // 8), np.uint8)
    steps = np.ones((5, 64 // block), np.float32)
    model = model_proto(text, w=blocks, s=steps)
    row = next(r for r in with_uses(ledger_rows(model, model.ByteSize()), model) if r.name == "w")
    sign = "u" if more else ""
    assert (row.dtype, row.shape, row.computed) == (f"{sign}int{bits}", (64, 5), computed)
    assert (row.memory_dtype, row.memory) == (row.dtype, 5 * 64 * bits // 8)
    on_gpu = weight_uses(model, "CUDAExecutionProvider")["w"]
    assert on_gpu.computed == "float"


def test_a_table_in_the_bytes_of_a_layer_has_the_layer_s_shape_and_both_uses() -> None:
    """Of another shape when it is looked up: ONNX Runtime keeps both."""
    model = model_proto(
        """g (int64[N] i) => (float[N,9] y) {
            t = Reshape(w, n) u = Reshape(s, n)
            e = com.microsoft.GatherBlockQuantized<bits = 4, block_size = 32, gather_axis = 0,
                quantize_axis = 1>(t, i, u)
            y = com.microsoft.MatMulNBits<K = 64, N = 9, bits = 4, block_size = 32,
                accuracy_level = 4>(e, w, s)
        }""",
        w=np.zeros((9, 2, 16), np.uint8),
        s=np.ones((9, 2), np.float32),
        n=np.array([9, -1]),
    )
    row = next(r for r in with_uses(ledger_rows(model, model.ByteSize()), model) if r.name == "w")
    assert (row.dtype, row.shape, row.computed) == ("int4", (64, 9), "float, int8")
    assert not row.looked_up and (row.memory_dtype, row.memory) == ("int4", 2 * 288)
    run = optimized_graph(model.SerializeToString())
    assert sum(nbytes(t) for t in run.initializer if t.data_type == TensorProto.UINT8) == 2 * 288


def test_uses_are_of_constants_alone() -> None:
    rows = with_uses([LedgerRow("w", "w", "activation", "float", (), 0, "")], hand_written(D, W8))
    assert (rows[0].memory, rows[0].computed, rows[0].differs) == (None, "", False)


def test_many_paths_and_long_ones_take_no_time() -> None:
    """2^200 paths, through 200 operators, and then 2000 more."""
    many = " ".join(f"a{i + 1} = Concat<axis = 0>(a{i}, a{i})" for i in range(200))
    long = " ".join(f"b{i + 1} = Identity(b{i})" for i in range(2000))
    model = model_proto(
        f"""g (int64[N] i) => (float[M,64] y) {{
            a0 = Gather(w, i) {many} b0 = Identity(a200) {long} y = Relu(b2000)
        }}""",
        w=normal(64, 64),
    )
    use = weight_uses(model)["w"]
    assert (use.computed, use.looked_up) == ("float", True)


@pytest.mark.parametrize("attributes", ["K = 64, bits = 4", "K = 64, N = 5, bits = 0", "bits = 3"])
def test_blocks_that_no_runtime_loads_stay_what_the_file_has(attributes: str) -> None:
    text = f"""g (float[N,64] x) => (float[N,5] y) {{
        y = com.microsoft.MatMulNBits<{attributes}, block_size = 32>(x, w, s)
    }}"""
    model = model_proto(text, w=np.zeros((5, 2, 16), np.uint8), s=np.ones((5, 2), np.float32))
    row = next(r for r in with_uses(ledger_rows(model, model.ByteSize()), model) if r.name == "w")
    assert (row.dtype, row.shape) == ("uint8", (5, 2, 16))
