"""Graphs on which passes are tried, their feeds, and what calibration finds on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx

from qcompile.ir import Graph
from qcompile.ir.model_io.to_proto import serialize
from qcompile.planning import Context
from qcompile.quant import Array, ChannelStats, Range
from qcompile.rewriting import Pass
from qcompile.rewriting.testing import normal, parse
from qcompile.runtime.session import Session, SessionOptions, with_outputs

Feed = dict[str, Array]
F32 = np.float32


def linear() -> Graph:
    """A linear with what exporters leave around it, in an opset that is to be raised."""
    return parse(
        """g (float[B,S,8] x) => (float[B,S,6] y, float[R,6] z) {
            i = Identity(x)
            m = MatMul(i, w)
            n = Neg(b)
            y = Add(m, n)
            j = Relu(x)
            k = Relu(x)
            l = Add(j, k)
            f = Reshape(l, rows)
            z = Gemm<transB = 1>(f, v, )
        }""",
        14,
        w=normal(8, 6),
        b=normal(6),
        v=normal(6, 8),
        rows=np.array([-1, 8]),
    )


def attention() -> Graph:
    """Two heads, shapes computed at run time, a mask made of integers, a residual sum."""
    return parse(
        """g (float[B,S,8] x, int64[B,S] mask) => (float[B,S,8] y) {
            s = Shape(x)
            d0 = Gather(s, zero)
            d1 = Gather(s, first)
            v0 = Unsqueeze(d0, axes)
            v1 = Unsqueeze(d1, axes)
            split = Concat<axis = 0>(v0, v1, heads)
            joined = Concat<axis = 0>(v0, v1, width)
            qm = MatMul(x, wq)
            qb = Add(qm, bq)
            qr = Reshape(qb, split)
            q = Transpose<perm = [0, 2, 1, 3]>(qr)
            km = MatMul(x, wk)
            kr = Reshape(km, split)
            k = Transpose<perm = [0, 2, 3, 1]>(kr)
            vm = MatMul(x, wv)
            vr = Reshape(vm, split)
            v = Transpose<perm = [0, 2, 1, 3]>(vr)
            qk = MatMul(q, k)
            scores = Div(qk, root)
            float_mask = Cast<to = 1>(mask)
            wide = Unsqueeze(float_mask, inner)
            hidden = Sub(one, wide)
            bias = Mul(hidden, low)
            masked = Add(scores, bias)
            p = Softmax(masked)
            c = MatMul(p, v)
            ct = Transpose<perm = [0, 2, 1, 3]>(c)
            cr = Reshape(ct, joined)
            om = MatMul(cr, wo)
            o = Add(om, bo)
            y = Add(o, x)
        }""",
        **{name: normal(8, 8, seed=i) for i, name in enumerate(("wq", "wk", "wv", "wo"))},
        bq=normal(8),
        bo=normal(8, seed=1),
        root=np.array(2, F32),
        one=np.array(1, F32),
        low=np.array(-3.4e38, F32),
        zero=np.array(0),
        first=np.array(1),
        axes=np.array([0]),
        heads=np.array([2, 4]),
        width=np.array([8]),
        inner=np.array([1, 2]),
    )


def layernorm() -> Graph:
    """A decomposed layer normalization between two linears that share their weight."""
    return parse(
        """g (float[B,S,8] x) => (float[B,S,8] y, float[B,S,8] a) {
            a = MatMul(x, w)
            m = ReduceMean<axes = [-1]>(a)
            d = Sub(a, m)
            q = Pow(d, two)
            v = ReduceMean<axes = [-1]>(q)
            s = Add(v, e)
            r = Sqrt(s)
            n = Div(d, r)
            h = Mul(n, g)
            o = Add(h, b)
            y = MatMul(o, w)
        }""",
        w=normal(8, 8),
        g=normal(8),
        b=normal(8, seed=1),
        e=np.array(1e-5, F32),
        two=np.array(2, F32),
    )


def gelu() -> Graph:
    """Both forms of GELU, one after a linear."""
    scalars = {"root": 2**0.5, "one": 1, "half": 0.5, "three": 3, "cubic": 0.044715}
    return parse(
        """g (float[B,S,8] x) => (float[B,S,8] y, float[B,S,8] z) {
            l = MatMul(x, w)
            m = Add(l, b)
            d = Div(m, root)
            e = Erf(d)
            a = Add(e, one)
            p = Mul(m, a)
            y = Mul(p, half)
            c = Pow(x, three)
            f = Mul(c, cubic)
            g = Add(x, f)
            h = Mul(g, slope)
            t = Tanh(h)
            u = Add(t, one)
            v = Mul(x, half)
            z = Mul(v, u)
        }""",
        w=normal(8, 8),
        b=normal(8),
        slope=np.array((2 / np.pi) ** 0.5, F32),
        **{name: np.array(value, F32) for name, value in scalars.items()},
    )


def hidden() -> Graph:
    """A feed-forward block whose hidden layer is wide enough for GELU by tanh."""
    return parse(
        """g (float[B,S,8] x) => (float[B,S,8] y) {
            h = MatMul(x, w)
            g = Gelu(h)
            y = MatMul(g, v)
        }""",
        20,
        w=2 * normal(8, 16),
        v=normal(16, 8),
    )


def embedding() -> Graph:
    """Two tables, one large enough to be quantized, their sum normalized."""
    return parse(
        """g (int64[B,S] ids) => (float[B,S,4] y) {
            e = Gather(words, ids)
            t = Gather(types, zero)
            s = Add(e, t)
            n = LayerNormalization<axis = -1>(s, g, b)
            y = MatMul(n, w)
        }""",
        words=normal(65536, 4),
        types=normal(2, 4),
        zero=np.array(0),
        g=normal(4),
        b=normal(4, seed=1),
        w=normal(4, 4),
    )


def tied() -> Graph:
    """An embedding that is tied to the output layer, stored once more transposed."""
    table = normal(64, 8)
    return parse(
        """g (int64[B,S] few) => (float[B,S,64] y) {
            e = Gather(words, few)
            h = Tanh(e)
            y = MatMul(h, out)
        }""",
        words=table,
        out=np.ascontiguousarray(table.T),
    )


def branch() -> Graph:
    """An If whose bodies read outer tensors, among them a weight that a linear reads too."""
    return parse(
        """g (bool c, float[B,S,8] x) => (float[B,S,8] y) {
            i = Clip(x, , lo)
            h = Identity(i)
            m = MatMul(h, w)
            a = Add(m, b)
            r = If (c) <
                then_branch = yes () => (float[B,S,8] p) { k = MatMul(h, w) p = Add(k, a) },
                else_branch = no () => (float[B,S,8] q) { q = Neg(m) }
            >
            n = Mul(a, b)
            v = MatMul(n, w)
            y = Add(r, v)
        }""",
        w=normal(8, 8),
        b=normal(8),
        lo=np.array(2, F32),
    )


def pooled() -> Graph:
    """A position-wise block, and the mean of what is no padding."""
    return parse(
        """g (float[B,S,8] x, int64[B,S] attention_mask) => (float[B,8] y) {
            n = LayerNormalization<axis = -1>(x, g, b)
            m = MatMul(n, w)
            a = Add(m, b)
            r = Relu(a)
            s = Add(r, x)
            h = LayerNormalization<axis = -1>(s, g, b)
            f = Cast<to = 1>(attention_mask)
            u = Unsqueeze(f, last)
            k = Mul(h, u)
            t = ReduceSum<keepdims = 0>(k, second)
            c = ReduceSum<keepdims = 0>(u, second)
            y = Div(t, c)
        }""",
        w=normal(8, 8),
        b=normal(8),
        g=normal(8, seed=1),
        last=np.array([-1]),
        second=np.array([1]),
    )


def first_position() -> Graph:
    """A position-wise block of which the first position is used."""
    return parse(
        """g (float[B,S,8] x) => (float[B,8] y) {
            m = MatMul(x, w)
            r = Relu(m)
            s = Add(r, x)
            y = Gather<axis = 1>(s, first)
        }""",
        w=normal(8, 8),
        first=np.array(0),
    )


def concatenated() -> Graph:
    """A linear over two tensors side by side, one of them cut as the integers will be."""
    return parse(
        """g (float[B,S,8] x) => (float[B,S,8] y) {
            r = Clip(x, zero, )
            c = Concat<axis = -1>(x, r)
            y = MatMul(c, w)
        }""",
        w=normal(16, 8),
        zero=np.array(0, F32),
    )


def joined() -> Graph:
    """Tiny weights next to their biases, a ConvTranspose, and a join of ranges far apart."""
    tiny = normal(8, 8, 3, 3) / F32(8)
    tiny[::2] *= F32(1e-9)
    return parse(
        """g (float[B,3,12,12] image) => (float[B,12,4,4] y) {
            a = Conv(image, wa)
            b = Conv(a, wb, bb)
            c = Conv(a, wc)
            j = Concat<axis = 1>(b, c)
            p = Conv(j, wp)
            t = ConvTranspose(a, wt)
            u = Conv<strides = [2, 2]>(t, wu)
            q = Slice(u, first, end, axes)
            r = Slice(q, first, end, last)
            s = Sigmoid(r)
            k = Slice(p, first, end, axes)
            l = Slice(k, first, end, last)
            y = Add(l, s)
        }""",
        wa=normal(8, 3, 3, 3) / F32(5),
        wb=tiny,
        bb=normal(8),
        wc=normal(4, 8, 3, 3) * F32(10),
        wp=normal(12, 12, 3, 3),
        wt=normal(8, 8, 2, 2),
        wu=normal(12, 8, 3, 3),
        first=np.array([0]),
        end=np.array([4]),
        axes=np.array([2]),
        last=np.array([3]),
    )


def outliers(wide: float = 10) -> Graph:
    """A wide channel after a normalization, and some among many after an activation function.

    What reads them has small weights, as in trained models: the answers do not grow with them.
    """
    many = 1024
    gamma, first, second = np.ones(8, F32), normal(8, many) / F32(8), normal(many, 8, seed=1) / 32
    gamma[3], first[3] = wide, first[3] / wide
    first[:, 7::256] *= F32(wide)
    second[7::256] /= F32(wide)
    return parse(
        """g (float[B,S,8] x) => (float[B,S,8] y) {
            n = LayerNormalization<axis = -1>(x, g, b)
            m = MatMul(n, w)
            a = Add(m, c)
            r = Relu(a)
            y = MatMul(r, v)
        }""",
        g=gamma,
        b=normal(8) / 8,
        w=first,
        c=normal(many) / 8,
        v=second.astype(F32),
    )


def convolutions() -> Graph:
    """An image through all that stands between convolutions, and a classifier."""
    rng = np.random.default_rng(0)
    norms = {kind: rng.uniform(0.5, 1.5, 8).astype(F32) for kind in "ghmv"}
    kernels = {
        "w1": normal(8, 3, 3, 3) / F32(5),
        "w2": normal(8, 8, 3, 3, seed=1) / F32(8),
        "w3": normal(8, 1, 3, 3, seed=2) / F32(3),
        "w4": normal(8, 8, 1, 1, seed=3) / F32(3),
        "w5": normal(4, 16, 1, 1, seed=4) / F32(4),
        "f": normal(4, 5, seed=5),
    }
    weights = {
        **kernels,
        **norms,
        "b": normal(8),
        "six": np.array(6, F32),
        "zero": np.array(0, F32),
    }
    return parse(
        """g (float[B,3,12,12] image) => (float[B,5] y) {
            c1 = Conv<pads = [1, 1, 1, 1]>(image, w1)
            n = BatchNormalization(c1, g, h, m, v)
            r1 = Relu(n)
            p1 = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(r1)
            c2 = Conv<pads = [1, 1, 1, 1]>(p1, w2, b)
            r2 = Relu(c2)
            c3 = Conv<group = 8, pads = [1, 1, 1, 1]>(r2, w3)
            r3 = Clip(c3, zero, six)
            c4 = Conv(r3, w4)
            s = Add(c4, r2)
            r4 = Relu(s)
            k = Concat<axis = 1>(r4, r3)
            p2 = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(k)
            c5 = Conv(p2, w5)
            a = GlobalAveragePool(c5)
            l = Flatten(a)
            y = MatMul(l, f)
        }""",
        **weights,
    )


def hardswish() -> Graph:
    """Convolutions with HardSwish between them, one written out, as mobile networks have it."""
    return parse(
        """g (float[B,3,12,12] image) => (float[B,4,8,8] y) {
            c = Conv(image, w1)
            a = Add(c, three)
            p = Clip(a, zero, six)
            m = Mul(c, p)
            h = Div(m, six)
            d = Conv(h, w2)
            k = HardSwish(d)
            y = Conv(k, w3)
        }""",
        w1=normal(8, 3, 3, 3),
        w2=normal(8, 8, 3, 3, seed=1),
        w3=normal(4, 8, 1, 1, seed=2) / F32(8),
        three=np.array(3, F32),
        six=np.array(6, F32),
        zero=np.array(0, F32),
    )


def quantized() -> Graph:
    """What others' quantizers leave, static and dynamic, with a float linear between."""
    return parse(
        """g (float[B,S,8] x) => (float[B,S,6] y, float[B,S,6] a) {
            q = QuantizeLinear(x, s, z)
            d = DequantizeLinear(q, s, z)
            e = DequantizeLinear<axis = 1>(wq, ws, wz)
            m = MatMul(d, e)
            o = QuantizeLinear(m, t, u)
            a = DequantizeLinear(o, t, u)
            f = MatMul(a, w)
            g, gs, gz = DynamicQuantizeLinear(f)
            i = MatMulInteger(g, v, gz, vz)
            c = Cast<to = 1>(i)
            k = Mul(gs, vs)
            y = Mul(c, k)
        }""",
        wq=np.random.default_rng(0).integers(-127, 128, (8, 6), np.int8),
        ws=np.full(6, 0.01, F32),
        wz=np.zeros(6, np.int8),
        s=np.array(0.03, F32),
        z=np.array(128, np.uint8),
        t=np.array(0.1, F32),
        u=np.array(128, np.uint8),
        w=normal(6, 8),
        v=np.random.default_rng(1).integers(0, 256, (8, 6), np.uint8),
        vs=np.array(0.01, F32),
        vz=np.array(128, np.uint8),
    )


def trained() -> Graph:
    """What training with fake quantization leaves: float weights behind quantizers, int8 data."""
    weights = {
        "w": normal(6, 8),
        "ws": np.linspace(0.02, 0.03, 6, dtype=F32),
        "wz": np.zeros(6, np.int8),
        "v": normal(8, 6, seed=1),
        "vs": np.array(0.02, F32),
        "vz": np.array(128, np.uint8),
        "s": np.array(0.03, F32),
        "z": np.array(3, np.int8),
        "b": normal(6),
        "rows": np.array([-1, 8]),
    }
    return parse(
        """g (float[B,S,8] x) => (float[R,6] y, float[R,6] a) {
            q = QuantizeLinear(x, s, z)
            d = DequantizeLinear(q, s, z)
            f = Reshape(d, rows)
            wq = QuantizeLinear<axis = 0>(w, ws, wz)
            wd = DequantizeLinear<axis = 0>(wq, ws, wz)
            wt = Transpose<perm = [1, 0]>(wd)
            m = MatMul(f, wt)
            a = Add(m, b)
            r = QuantizeLinear(a, s)
            e = DequantizeLinear(r, s)
            vq = QuantizeLinear(v, vs, vz)
            vd = DequantizeLinear(vq, vs, vz)
            p = Gemm<transB = 1>(e, vd)
            y = MatMul(p, wt)
        }""",
        **weights,
    )


def half_stored() -> Graph:
    """Weights in float16 and bfloat16, and a table, cast to float32 where they are used."""
    bfloat16 = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16)
    return parse(
        """g (float[B,S,8] x) => (float[B,S,8] y) {
            f = Cast<to = 1>(w)
            u = Unsqueeze(x, second)
            m = Mul(u, f)
            r = ReduceMax<axes = [2], keepdims = 0>(m)
            k = Cast<to = 1>(v)
            o = Unsqueeze(r, second)
            n = Mul(o, k)
            s = ReduceMax<axes = [2], keepdims = 0>(n)
            i = ArgMax<axis = -1, keepdims = 0>(s)
            e = Gather(t, i)
            c = Cast<to = 1>(e)
            y = Add(s, c)
        }""",
        w=normal(32, 8).astype(np.float16),
        v=normal(32, 8, seed=1).astype(bfloat16),
        t=normal(32, 8, seed=2).astype(np.float16),
        second=np.array([2]),
    )


def bert_layer() -> Graph:
    """One layer of BERT: width 6, two heads of 3, a hidden layer of 10, and a pooler."""
    shapes = {
        "words": (9, 6), "table": (5, 6), "g0": (6,), "b0": (6,), "wq": (6, 6), "bq": (6,),
        "wk": (6, 6), "wv": (6, 6), "bv": (6,), "wo": (6, 6), "g1": (6,), "b1": (6,),
        "wi": (6, 10), "bi": (10,), "wd": (10, 6), "bd": (6,), "g2": (6,), "b2": (6,), "wp": (6, 4),
    }  # fmt: skip
    return parse(
        """g (int64[B,S] ids, int64[B,S] places, int64[B,S] mask)
            => (float[B,S,6] y, float[B,4] pooled) {
            e = Gather(words, ids) p = Gather(table, places) s0 = Add(e, p)
            x = LayerNormalization(s0, g0, b0)
            qm = MatMul(x, wq) qb = Add(qm, bq) qr = Reshape(qb, split)
            q = Transpose<perm = [0, 2, 1, 3]>(qr)
            km = MatMul(x, wk) kr = Reshape(km, split)
            k = Transpose<perm = [0, 2, 3, 1]>(kr)
            vm = MatMul(x, wv) vb = Add(vm, bv) vr = Reshape(vb, split)
            v = Transpose<perm = [0, 2, 1, 3]>(vr)
            scores = MatMul(q, k)
            wide = Unsqueeze(mask, axes) real = Cast<to = 1>(wide) bias = Mul(real, low)
            masked = Sub(scores, bias)
            probs = Softmax(masked)
            c = MatMul(probs, v) ct = Transpose<perm = [0, 2, 1, 3]>(c) cr = Reshape(ct, join)
            o = MatMul(cr, wo) s1 = Add(o, x)
            h = LayerNormalization(s1, g1, b1)
            im = MatMul(h, wi) ib = Add(bi, im) act = Relu(ib)
            dm = MatMul(act, wd) db = Add(dm, bd) s2 = Add(db, h)
            y = LayerNormalization(s2, g2, b2)
            cls = Gather<axis = 1>(y, first) pm = MatMul(cls, wp) pooled = Tanh(pm)
        }""",
        **{n: normal(*shape, seed=i) for i, (n, shape) in enumerate(shapes.items())},
        split=np.array([0, 0, 2, 3]),
        join=np.array([0, 0, 6]),
        axes=np.array([1, 2]),
        low=np.array(4, F32),
        first=np.array(0),
    )


def sequence() -> Graph:
    """A projection by Einsum, an LSTM of both directions, a GRU; rows are steps."""
    return parse(
        """g (float[B,S,8] x) => (float[B,S,64] y, float[1,S,64] h) {
            e = Einsum<equation = "btd,dhk->bthk">(x, k)
            n = Add(e, b)
            j = Reshape(n, joined)
            l = LSTM<hidden_size = 16, direction = "bidirectional">(j, lw, lr, lb)
            t = Transpose<perm = [0, 2, 1, 3]>(l)
            r = Reshape(t, wide)
            s, h = GRU<hidden_size = 64>(r, gw, gr)
            y = Squeeze(s, axis)
        }""",
        k=normal(8, 2, 32, seed=1) / 4,
        b=normal(2, 32, seed=2),
        lw=normal(2, 64, 64, seed=3) / 8,
        lr=normal(2, 64, 16, seed=4) / 4,
        lb=normal(2, 128, seed=5),
        gw=normal(1, 192, 32, seed=6) / 8,
        gr=normal(1, 192, 64, seed=7) / 8,
        joined=np.array([0, 0, 64]),
        wide=np.array([0, 0, 32]),
        axis=np.array([1]),
    )


def gated() -> Graph:
    """Rows of very different size before a norm: each has a gate of its own."""
    return parse(
        """g (float[B,S,8] x) => (float[B,S,8] y) {
            k = MatMul(x, w)
            s = Sigmoid(k)
            m = Mul(x, s)
            y = LayerNormalization(m, gamma)
        }""",
        w=normal(8, 1),
        gamma=normal(8, seed=1),
    )


CORPUS: dict[str, Callable[[], Graph]] = {
    "attention": attention,
    "branch": branch,
    "concatenated": concatenated,
    "convolutions": convolutions,
    "embedding": embedding,
    "gated": gated,
    "gelu": gelu,
    "half_stored": half_stored,
    "hardswish": hardswish,
    "joined": joined,
    "hidden": hidden,
    "layernorm": layernorm,
    "linear": linear,
    "outliers": outliers,
    "pooled": pooled,
    "first-position": first_position,
    "quantized": quantized,
    "sequence": sequence,
    "tied": tied,
    "trained": trained,
}


def feeds(graph: Graph) -> list[Feed]:
    """A batch of one token, and one of odd sizes with padding."""
    return [feed(graph, 1, 1, 0), feed(graph, 2, 5, 1)]


def feed(graph: Graph, batch: int, length: int, seed: int) -> Feed:
    """Values for the inputs of a graph of the corpus; the first row is padded from its third."""
    mask = np.ones((batch, length), np.int64)
    mask[0, 3:] = 0
    values: Feed = {
        "x": normal(batch, length, 8, seed=seed),
        "image": normal(batch, 3, 12, 12, seed=seed),
        "ids": np.random.default_rng(seed).integers(0, 65536, (batch, length)),
        "few": np.random.default_rng(seed).integers(0, 64, (batch, length)),
        "mask": mask,
        "attention_mask": mask,
        "c": np.array(seed == 0),
    }
    return {t.name: values[t.name] for t in graph.inputs}


# Calibration ----------------------------------------------------------------------------------


def observed(graph: Graph, names: Sequence[str], data: Sequence[Feed]) -> dict[str, list[Array]]:
    """What tensors hold in the graph as it is, one array a feed."""
    made = [n for n in names if graph.producer(graph.tensors()[n]) is not None]
    seen = list(data)
    if made:
        tapped = with_outputs(onnx.ModelProto.FromString(serialize(graph)), made)
        session = Session(tapped.SerializeToString(), SessionOptions(threads=1, optimize=False))
        seen = [{**one, **session.run(one)} for one in data]
    return {n: [one[n] for one in seen] for n in names}


def calibrate(graph: Graph, ctx: Context, item: Pass, data: Sequence[Feed] = ()) -> Context:
    """What the plan asked for and the pass wants to look at, where it is not known already.

    From runs of the graph as it is, so before insertion.
    """
    ranged = [r.tensor for r in ctx.requests if ctx.ranges.get(r.tensor) is None]
    watched = [n for n in dict.fromkeys(item.wants(graph, ctx)) if n not in ctx.channels]
    known = graph.tensors()
    wanted = [n for n in dict.fromkeys([*ranged, *watched]) if n in known]
    if wanted:
        data = data or [*feeds(graph), feed(graph, 8, 16, 2)]
    for name, values in observed(graph, wanted, data).items():
        if name in ranged:
            ctx.ranges.set(name, Range(min(v.min() for v in values), max(v.max() for v in values)))
        if name in watched:
            ctx.channels[name] = stats(*values)
    return ctx


def stats(*values: Array) -> ChannelStats:
    """Statistics of all rows."""
    rows = np.concatenate([v.reshape(-1, v.shape[-1]) for v in values])
    return ChannelStats(rows.min(0), rows.max(0), rows)
