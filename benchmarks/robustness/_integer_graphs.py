"""Hand-written graphs for ``same_sums``: float operators of odd sizes, and every integer operator.

The integer ones come with weights of 8 bits, of which neighbours saturate (``wide``), and with
weights that fit (``narrow``). Float weights have one sign and nearly one size, so that a plain
rounding to 8 bits would saturate in every pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from qcompile.rewriting.testing import model_proto

Array = npt.NDArray[Any]
_INNER = (1, 2, 3, 7, 64, 129)
_OUTER = (1, 5, 33)


@dataclass(frozen=True)
class Sample:
    """A model, data for it, and the exact result."""

    model: onnx.ModelProto
    feed: dict[str, Array]
    exact: int


def saturating_sum() -> Sample:
    """64 products 255 · 127, of which two exceed 2^15."""
    weight = np.full((64, 1), 127, np.int8)
    text = "g (uint8[1,64] a) => (int32[1,1] y) { y = MatMulInteger(a, w) }"
    return Sample(
        model_proto(text, w=weight), {"a": np.full((1, 64), 255, np.uint8)}, 64 * 255 * 127
    )


def write(folder: Path) -> Path:
    """Write every graph as a file; returns the folder."""
    for name, model in graphs():
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
    return folder


def graphs() -> Iterator[tuple[str, onnx.ModelProto]]:
    """Names and models."""
    yield from _float_linears()
    yield from _float_convolutions()
    yield from _float_others()
    for size in ("wide", "narrow"):
        yield from _integers(size)


def _near_one(*shape: int) -> npt.NDArray[np.float32]:
    """Values of one sign and nearly one size, with some outputs of random signs."""
    rng = np.random.default_rng(shape)
    values = rng.uniform(0.9, 1, shape) * rng.choice([-1, 1], shape[-1:])
    values[..., ::3] *= rng.choice([-1, 1], values[..., ::3].shape)
    scaled: Array = values / np.sqrt(np.prod(shape[:-1]))
    return scaled.astype(np.float32)


def _float_linears() -> Iterator[tuple[str, onnx.ModelProto]]:
    for k in _INNER:
        for n in _OUTER:
            yield (
                f"matmul_{k}x{n}",
                model_proto(
                    f"g (float[b,s,{k}] x) => (float[b,s,{n}] y) {{ y = MatMul(x, w) }}",
                    w=_near_one(k, n),
                ),
            )
    for a in (0, 1):
        for b in (0, 1):
            shape = ("7,b" if a else "b,7", (9, 7) if b else (7, 9))
            yield (
                f"gemm_{a}{b}",
                model_proto(
                    f"g (float[{shape[0]}] x) => (float[b,9] y) "
                    f"{{ y = Gemm<transA = {a}, transB = {b}, alpha = 0.5>(x, w, c) }}",
                    w=_near_one(*shape[1]),
                    c=np.ones(9, np.float32),
                ),
            )
    yield (
        "stack",
        model_proto(
            "g (float[3,s,16] x) => (float[3,s,8] y) { y = MatMul(x, w) }", w=_near_one(3, 16, 8)
        ),
    )
    yield (
        "constant_left",
        model_proto(
            "g (float[b,16,s] x) => (float[b,8,s] y) { y = MatMul(w, x) }", w=_near_one(8, 16)
        ),
    )
    yield (
        "one_row",
        model_proto("g (float[1,64] x) => (float[1,8] y) { y = MatMul(x, w) }", w=_near_one(64, 8)),
    )
    yield (
        "vector",
        model_proto("g (float[b,64] x) => (float[b] y) { y = MatMul(x, w) }", w=_near_one(64)),
    )
    yield (
        "chain",
        model_proto(
            """g (float[b,64] x) => (float[b,8] y) {
                a = MatMul(x, w) r = Relu(a) y = MatMul(r, v) }""",
            w=_near_one(64, 96),
            v=_near_one(96, 8),
        ),
    )
    yield (
        "transposed",
        model_proto(
            """g (float[b,64] x) => (float[b,40] y) { t = Transpose<perm = [1, 0]>(w)
                y = MatMul(x, t) }""",
            w=_near_one(40, 64),
        ),
    )
    yield (
        "shared",
        model_proto(
            """g (float[b,64] x) => (float[b,64] y) {
                a = MatMul(x, w) t = Transpose<perm = [1, 0]>(w) r = Relu(a) y = MatMul(r, t) }""",
            w=_near_one(64, 64),
        ),
    )


def _float_convolutions() -> Iterator[tuple[str, onnx.ModelProto]]:
    # (channels, groups, outputs, side of the kernel, attributes)
    cases = {
        "one": (3, 1, 16, 3, ""),
        "four": (4, 1, 8, 3, "pads = [1, 1, 1, 1]"),
        "odd": (5, 1, 7, 3, "strides = [2, 2]"),
        "single": (1, 1, 8, 5, ""),
        "pointwise": (17, 1, 9, 1, ""),
        "groups": (12, 3, 6, 3, "group = 3"),
        "pairs": (8, 4, 8, 3, "group = 4"),
        "multiplier": (4, 4, 12, 3, "group = 4"),
        "depthwise": (16, 16, 16, 3, "group = 16, pads = [1, 1, 1, 1]"),
        "dilated": (6, 1, 8, 3, "dilations = [2, 2]"),
        "even": (2, 1, 4, 2, ""),
        "wide": (32, 1, 32, 3, "pads = [1, 1, 1, 1]"),
    }
    for name, (channels, groups, outputs, side, attributes) in cases.items():
        kernel = _near_one(channels // groups, side, side, outputs).transpose(3, 0, 1, 2)
        head = f"<{attributes}>" if attributes else ""
        yield (
            f"conv_{name}",
            model_proto(
                f"""g (float[b,{channels},16,16] x) => (float[b,h] y) {{
                    c = Conv{head}(x, w, e) r = Relu(c)
                    d = Conv(r, v) q = Clip(d, lo, hi) p = GlobalAveragePool(q)
                    y = Flatten(p) }}""",
                w=np.ascontiguousarray(kernel),
                e=np.zeros(outputs, np.float32),
                v=_near_one(outputs, 1, 1, 6).transpose(3, 0, 1, 2).copy(),
                lo=np.array(-6, np.float32),
                hi=np.array(6, np.float32),
            ),
        )
    yield (
        "conv_1d",
        model_proto(
            """g (float[b,6,32] x) => (float[b,8,30] y) {
                c = Conv(x, w) y = Relu(c) }""",
            w=_near_one(6, 3, 8).transpose(2, 0, 1).copy(),
        ),
    )
    yield (
        "conv_3d",
        model_proto(
            """g (float[b,2,8,8,8] x) => (float[b,4,6,6,6] y) {
                c = Conv(x, w) y = Relu(c) }""",
            w=_near_one(2, 3, 3, 3, 4).transpose(4, 0, 1, 2, 3).copy(),
        ),
    )


def _float_others() -> Iterator[tuple[str, onnx.ModelProto]]:
    yield (
        "lstm",
        model_proto(
            """g (float[s,b,32] x) => (float[s,2,b,40] y) {
                y = LSTM<hidden_size = 40, direction = "bidirectional">(x, w, r) }""",
            w=np.stack([_near_one(32, 160).T] * 2),
            r=np.stack([_near_one(40, 160).T] * 2),
        ),
    )
    yield (
        "gru",
        model_proto(
            "g (float[s,b,32] x) => (float[s,1,b,40] y) { y = GRU<hidden_size = 40>(x, w, r) }",
            w=_near_one(32, 120).T[None].copy(),
            r=_near_one(40, 120).T[None].copy(),
        ),
    )
    yield (
        "products",
        model_proto(
            """g (float[b,4,s,16] q, float[b,4,s,16] k, float[b,4,s,16] v) => (float[b,4,s,16] y) {
                t = Transpose<perm = [0, 1, 3, 2]>(k) a = MatMul(q, t) p = Softmax<axis = -1>(a)
                y = MatMul(p, v) }"""
        ),
    )
    yield (
        "products_odd",
        model_proto(
            """g (float[b,7,s] x, float[b,7,5] z) => (float[b,s,5] y, float[b,5,5] o) {
                t = Transpose<perm = [0, 2, 1]>(x) y = MatMul(t, z)
                u = Transpose<perm = [0, 2, 1]>(z) o = MatMul(u, z) }"""
        ),
    )
    yield ("attention", _attention())
    yield (
        "experts",
        model_proto(
            """g (float[s,32] x) => (float[s,32] y) {
                l = MatMul(x, gate) p = Softmax<axis = -1>(l) h = MatMul(x, up) a = Relu(h)
                d = MatMul(a, down) pt = Transpose<perm = [1, 0]>(p)
                pu = Unsqueeze(pt, last) m = Mul(d, pu) y = ReduceSum<keepdims = 0>(m, first) }""",
            gate=_near_one(32, 4),
            up=_near_one(4, 32, 64),
            down=_near_one(4, 64, 32),
            last=np.array([2]),
            first=np.array([0]),
        ),
    )
    yield (
        "branch",
        model_proto(
            """g (float[b,32] x, bool c) => (float[b,8] y) { y = If (c) <
                then_branch = t () => (float[b,8] u) { u = MatMul(x, w) },
                else_branch = e () => (float[b,8] v) { n = MatMul(x, w) v = Neg(n) } > }""",
            w=_near_one(32, 8),
        ),
    )
    yield (
        "einsum",
        model_proto(
            """g (float[b,s,32] x) => (float[b,s,4,8] y) {
                y = Einsum<equation = "bsd,dhk->bshk">(x, w) }""",
            w=_near_one(32, 4, 8),
        ),
    )


def _attention() -> onnx.ModelProto:
    """Queries, keys and values of constant weights, heads of 7 channels."""
    return model_proto(
        """g (float[b,s,28] x) => (float[b,s,28] y) {
            q0 = MatMul(x, wq) k0 = MatMul(x, wk) v0 = MatMul(x, wv)
            q1 = Reshape(q0, heads) k1 = Reshape(k0, heads) v1 = Reshape(v0, heads)
            q = Transpose<perm = [0, 2, 1, 3]>(q1) k = Transpose<perm = [0, 2, 3, 1]>(k1)
            v = Transpose<perm = [0, 2, 1, 3]>(v1)
            a = MatMul(q, k) p = Softmax<axis = -1>(a) c = MatMul(p, v)
            t = Transpose<perm = [0, 2, 1, 3]>(c) m = Reshape(t, flat) y = MatMul(m, wo) }""",
        **{name: _near_one(28, 28) for name in ("wq", "wk", "wv", "wo")},
        heads=np.array([0, 0, 4, 7]),
        flat=np.array([0, 0, 28]),
    )


# By name: which weight, input, output, and what computes it from a, the quantized input.
_TYPED = {
    "matmulinteger": ("w", "[n,64]", "int32[n,8]", "y = MatMulInteger(a, w, az, bz)"),
    "tofloat": (
        "w", "[n,64]", "float[n,8]",
        "y = com.microsoft.MatMulIntegerToFloat(a, w, s, s, az, bz)",
    ),
    "qlinearmatmul": ("w", "[n,64]", "LEFT[n,8]", "y = QLinearMatMul(a, s, az, w, s, bz, s, az)"),
    "qgemm": (
        "transposed", "[n,64]", "float[n,8]",
        "y = com.microsoft.QGemm<transB = 1>(a, s, az, w, s, bz)",
    ),
    "qlinearconv": (
        "filters", "[n,4,8,8]", "LEFT[n,8,6,6]", "y = QLinearConv(a, s, az, w, s, bz, s, az)",
    ),
    "convinteger": ("filters", "[n,4,8,8]", "int32[n,8,6,6]", "y = ConvInteger(a, w, az, bz)"),
    "qdq": (
        "w", "[n,64]", "float[n,8]",
        "d = DequantizeLinear(a, s, az) e = DequantizeLinear(w, s, bz) y = MatMul(d, e)",
    ),
}  # fmt: skip


def _typed(left: str, right: str, weights: dict[str, Array]) -> Iterator[tuple[str, Any]]:
    """The operators of ``_TYPED`` on data of one type and weights of another."""
    constants = {
        "az": np.array(0 if left == "int8" else 100, left),
        "bz": np.array(0 if right == "int8" else 128, right),
        "s": np.array(0.01, np.float32),
    }
    for name, (weight, shape, made, body) in _TYPED.items():
        text = f"""g (float{shape} x) => ({made.replace("LEFT", left)} y) {{
            a = QuantizeLinear(x, s, az) {body} }}"""
        yield name, model_proto(text, w=weights[weight], **constants)


def _integers(size: str) -> Iterator[tuple[str, onnx.ModelProto]]:
    """Operators that multiply integers, in every combination of types that has a kernel."""
    rng = np.random.default_rng(0)
    limit = 127 if size == "wide" else 64

    def signed(*shape: int) -> Array:
        return rng.integers(limit - 6, limit + 1, shape).astype(np.int8)

    w, kernel = signed(64, 8), signed(8, 4, 3, 3)
    for left in ("uint8", "int8"):
        for right in ("uint8", "int8"):
            shift = 0 if right == "int8" else 128
            own, filters = ((x.astype(np.int16) + shift).astype(right) for x in (w, kernel))
            weights = {"w": own, "transposed": own.T.copy(), "filters": filters}
            for name, model in _typed(left, right, weights):
                yield f"{name}_{left}_{right}_{size}", model
    yield (
        f"dynamicmatmul_{size}",
        model_proto(
            """g (float[n,64] x) => (float[n,8] y) {
                y = com.microsoft.DynamicQuantizeMatMul(x, w, s) }""",
            w=w,
            s=np.array(0.01, np.float32),
        ),
    )
    yield (
        f"qattention_{size}",
        model_proto(
            """g (float[b,s,16] x) => (float[b,s,16] y) { a = QuantizeLinear(x, sc, z)
                y = com.microsoft.QAttention<num_heads = 2>(a, w, bias, sc, sc, , z) }""",
            w=signed(16, 48),
            bias=np.zeros(48, np.float32),
            sc=np.array(0.01, np.float32),
            z=np.array(100, np.uint8),
        ),
    )
    yield (
        f"dynamic_product_{size}",
        model_proto(
            """g (float[b,s,16] x, float[b,16,s] k) => (int32[b,s,s] y) {
                a, sa, za = DynamicQuantizeLinear(x) c = QuantizeLinear(k, sc, z)
                y = MatMulInteger(a, c, za, z) }""",
            sc=np.array(0.01, np.float32),
            z=np.array(0, np.int8),
        ),
    )
