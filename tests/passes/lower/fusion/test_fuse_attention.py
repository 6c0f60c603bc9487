"""Attention written out becomes one operator, where it is nothing but attention."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.passes.lower.fusion.fuse_attention import FuseAttention
from qcompile.quant import Array
from qcompile.rewriting.testing import (
    assert_refused,
    check,
    context,
    differential,
    encoder,
    normal,
    parse,
    run_pass,
)

# Two heads of four; sums of 8 and 5 products in another order: 100 roundings of values of 1.
ATOL = 1e-5
Q = "qm = MatMul(x, w) qa = Add(qm, b) qr = Reshape(qa, split) q = Transpose<perm = [0,2,1,3]>(qr)"
K = "km = MatMul(x, u) ka = Add(km, c) kr = Reshape(ka, split) k = Transpose<perm = [0,2,3,1]>(kr)"
V = "vm = MatMul(x, v) vr = Reshape(vm, split) vt = Transpose<perm = [0,2,1,3]>(vr)"
SCORES = "qk = MatMul(q, k) d = Div(qk, root) s = Add(d, bias)"
END = "t = Transpose<perm = [0,2,1,3]>(o) y = Reshape(t, joined)"
REST = f"p = Softmax<axis = -1>(s) o = MatMul(p, vt) {END}"
WHOLE = f"{Q} {K} {V} {SCORES} {REST}"
KEPT = ("b", "c", "u", "v", "w")  # weights, which two blocks may share


def attention(
    body: str, bias: str = "float[B,1,1,S] bias", outputs: str = "float[B,S,8] y", **changed: Array
) -> Graph:
    values: dict[str, Array] = {
        **{n: normal(8, 8, seed=i) / np.float32(3) for i, n in enumerate("wuv")},
        "b": normal(8),
        "c": normal(8, seed=1),
        "root": np.array(2, np.float32),
        "split": np.array([0, 0, 2, 4]),
        "joined": np.array([0, 0, 8]),
        **changed,
    }
    return parse(f"g (float[B,S,8] x, {bias}) => ({outputs}) {{ {body} }}", **values)


def feeds(*bias: int) -> list[dict[str, Array]]:
    """bias: its shape after the batch."""
    found = []
    for batch, length in ((1, 1), (2, 5)):
        shape = [batch, *(length if d == 0 else d for d in bias)]
        found.append({"x": normal(batch, length, 8), "bias": normal(*shape, seed=1)})
    return found


def test_all_of_it_becomes_one_operator_with_biases_and_an_expanded_mask() -> None:
    graph = attention(WHOLE)
    differential(graph, FuseAttention(), atol=ATOL, feeds=feeds(1, 1, 0), ctx=context("cuda"))
    check(
        graph,
        """
        CHECK: [[FULL:%bias/full]] = Expand(%bias, %
        CHECK: %y = com.microsoft.MultiHeadAttention(%qm, %km, %vm, @y/biases:f32[24]
        CHECK-SAME: , none, [[FULL]]) {num_heads=2, scale=0.5}
        CHECK-NOT: Softmax
        """,
    )


def test_without_mask_and_biases_three_operands_are_left() -> None:
    body = f"{Q.replace('qa = Add(qm, b) ', '').replace('qa', 'qm')} "
    body += f"{K.replace('ka = Add(km, c) ', '').replace('ka', 'km')} {V}"
    graph = attention(f"{body} s = MatMul(q, k) i = Abs(bias) {REST}")
    differential(graph, FuseAttention(), atol=ATOL, feeds=feeds(1, 1, 0), ctx=context("cuda"))
    check(
        graph, "CHECK: %y = com.microsoft.MultiHeadAttention(%qm, %km, %vm) {num_heads=2, scale=1}"
    )


@pytest.mark.parametrize(
    ("bias", "shape"),
    [
        ("float[B,1,S,S] bias", (1, 0, 0)),
        ("float[B,2,S,S] bias", (2, 0, 0)),
        ("float[B,1,S,1] bias", (1, 0, 1)),
    ],
)
def test_masks_of_other_shapes(bias: str, shape: tuple[int, ...]) -> None:
    graph = attention(WHOLE, bias)
    differential(graph, FuseAttention(), atol=ATOL, feeds=feeds(*shape), ctx=context("cuda"))
    check(graph, "CHECK: com.microsoft.MultiHeadAttention(")


def test_a_key_may_be_moved_in_two_steps() -> None:
    key = K.replace("k = Transpose<perm = [0,2,3,1]>(kr)", "kh = Transpose<perm = [0,2,1,3]>(kr) "
                    "k = Transpose<perm = [0,1,3,2]>(kh)")  # fmt: skip
    graph = attention(f"{Q} {key} {V} {SCORES} {REST}")
    differential(graph, FuseAttention(), atol=ATOL, feeds=feeds(1, 1, 0), ctx=context("cuda"))


def test_a_key_may_be_swapped_with_its_heads_merged_and_scaled() -> None:
    """As torch.onnx writes scaled_dot_product_attention through torch.export."""
    key = """km = MatMul(x, u) ka = Add(km, c) kr = Reshape(ka, split)
        kh = Transpose<perm = [0,2,1,3]>(kr) sizes = Shape(kh)
        some = Slice(sizes, from2, to3) lead = Slice(sizes, from0, from2)
        flat = Concat<axis = 0>(minus, some, four) back = Concat<axis = 0>(lead, four, some)
        k3 = Reshape(kh, flat) kt = Transpose<perm = [0,2,1]>(k3) k4 = Reshape(kt, back)
        k = Mul(k4, root)"""
    numbers = {"from0": [0], "from2": [2], "to3": [3], "minus": [-1], "four": [4]}
    values: dict[str, Any] = {n: np.array(v) for n, v in numbers.items()}
    graph = attention(f"{Q} {key} {V} {SCORES} {REST}", **values)
    differential(graph, FuseAttention(), atol=1e-4, feeds=feeds(1, 1, 0), ctx=context("cuda"))
    check(graph, "CHECK: com.microsoft.MultiHeadAttention(%qm, %km, %vm\nCHECK-SAME: scale=1}")


def test_two_terms_are_added_before() -> None:
    scores = "qk = MatMul(q, k) d = Mul(qk, root) e = Add(bias, d) f = Abs(bias) s = Add(f, e)"
    graph = attention(f"{Q} {K} {V} {scores} {REST}")
    differential(graph, FuseAttention(), atol=1e-4, feeds=feeds(1, 1, 0), ctx=context("cuda"))
    check(graph, "CHECK: %f/sum = Add(%f, %bias)\nCHECK: scale=2}")


def test_blocks_of_one_sequence_share_the_mask() -> None:
    """Known by the attention mask, from which each tensor's axes are followed."""
    graph = encoder(2)
    run_pass(graph, FuseAttention(), ctx=context("cuda"))
    ops = [n.op for n in graph.nodes]
    assert (ops.count("MultiHeadAttention"), ops.count("Expand")) == (2, 1)


def test_without_that_each_block_has_its_own() -> None:
    second = re.sub(r"\b(?!MatMul|Add|Div|Reshape|Transpose|Softmax|perm|axis)[a-z]{1,2}\b",
                    lambda m: m[0] if m[0] in KEPT else f"{m[0]}_", WHOLE)  # fmt: skip
    body = f"{WHOLE.replace('y = ', 'x_ = ')} {second.replace('y_ = ', 'y = ')}"
    graph = attention(body)
    differential(graph, FuseAttention(), atol=1e-4, feeds=feeds(1, 1, 0), ctx=context("cuda"))
    assert [n.op for n in graph.nodes].count("Expand") == 2


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("s = Add(d, bias)", "e = Add(d, bias) s = Where(c0, e, d)", "Where stands between"),
        ("s = Add(d, bias)", "e = MatMul(q, k) s = Add(d, e)", "a sum of several"),
        ("p = Softmax<axis = -1>", "p = Softmax<axis = 1>", "not over the last axis"),
        ("o = MatMul(p, vt)", "r = Relu(p) o = MatMul(r, vt)", "not only multiplied by values"),
        ("qr = Reshape(qa, split)", "qr = Reshape(qa, odd)", "split off the last of three"),
        ("q = Transpose<perm = [0,2,1,3]>(qr)", "q = Transpose<perm = [0,2,1,3]>(qr) i = Relu(q)",
         "query: its heads are not"),
        ("t = Transpose<perm = [0,2,1,3]>(o)", "t = Identity(o)", "are not moved back"),
        ("y = Reshape(t, joined)", "y = Reshape(t, apart)", "are not merged into one"),
    ],
)  # fmt: skip
def test_refusals(old: str, new: str, reason: str) -> None:
    assert old in WHOLE
    body = WHOLE.replace(old, new)
    outputs = "float[B,S,8] y" if "i = " not in new else "float[B,S,8] y, float[B,2,S,4] i"
    if "apart" in new:
        outputs = "float[B,S,4,2] y"
    if "t = Identity" in new:
        body = body.replace("y = Reshape(t, joined)", "y = Identity(t)")
        outputs = "float[B,2,S,4] y"
    extra = {"odd": np.array([-1, 5, 2, 4]), "apart": np.array([0, 0, 4, 2]), "c0": np.array(True)}
    used = {n: v for n, v in extra.items() if n in new}
    bias = "float[B,1,1,S] bias" + "".join(
        f", {'bool' if n == 'c0' else 'int64[4]'} {n}" for n in used
    )
    graph = attention(body, bias, outputs, **used)
    assert_refused(graph, FuseAttention(), reason, ctx=context("cuda"))


def test_a_query_that_something_else_reads_stays() -> None:
    graph = attention(f"{WHOLE} z = Neg(s)", outputs="float[B,S,8] y, float[B,2,S,S] z")
    assert_refused(graph, FuseAttention(), "scores are read elsewhere", ctx=context("cuda"))


def test_an_old_softmax_without_axis_is_not_over_the_last() -> None:
    graph = attention(WHOLE.replace("<axis = -1>(s)", "(s)"))
    graph.import_domain("", 12)
    assert_refused(graph, FuseAttention(), "not over the last axis", ctx=context("cuda"))


def test_a_softmax_of_a_classifier_is_nothing_to_explain() -> None:
    graph = parse(
        "g (float[B,8] x) => (float[B,3] y) { m = MatMul(x, w) y = Softmax<axis = -1>(m) }",
        w=normal(8, 3),
    )
    assert not run_pass(graph, FuseAttention(), ctx=context("cuda")).skips
