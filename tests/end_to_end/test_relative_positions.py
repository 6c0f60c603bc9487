"""DeBERTa's attention: positions become indices through logarithms, and stay exactly those."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import qcompile
from qcompile import Options
from qcompile.ir.model_io.to_proto import to_proto
from qcompile.quant import Array
from qcompile.rewriting.testing import normal, parse
from qcompile.runtime.session import Session, SessionOptions, with_outputs

WIDTH, SPAN, NEAR = 32, 8, 4
SIZES = ((2, 3), (1, 1), (2, 17), (3, 40))


def attention() -> onnx.ModelProto:
    """One head whose scores are those of content and of positions, both ways, as DeBERTa's.

    Distances up to 4 have a bucket of their own, farther ones share by their logarithm. The key is
    transposed and then scaled, so its channels are not its last axis; positions read it unscaled.
    """
    weights = {name: normal(WIDTH, WIDTH, seed=i) / 6 for i, name in enumerate(("wq", "wk", "wv"))}
    scalars = {
        "near": np.array(NEAR), "back": np.array(-NEAR), "within": np.array(NEAR - 1),
        "span": np.array(SPAN), "zero": np.array(0), "one": np.array(1),
        "last": np.array(2 * SPAN - 1), "rows": np.array([0]), "columns": np.array([1]),
        "nearf": np.array(NEAR, np.float32), "stretch": np.array(NEAR - 1, np.float32),
        "farthest": np.array(np.log((2 * SPAN - 1) / NEAR), np.float32),
        "root": np.array(np.sqrt(2 * WIDTH), np.float32),
        "nothing": np.array(0, np.float32),
        "positions": normal(WIDTH, 2 * SPAN, seed=5) / 6,
    }  # fmt: skip
    values: dict[str, Array] = {**weights, **scalars}
    graph = parse(
        f"""g (float[B,S,{WIDTH}] x) => (float[B,S,{WIDTH}] y) {{
            shape = Shape(x) length = Gather(shape, one) r = Range(zero, length, one)
            down = Unsqueeze(r, columns) across = Unsqueeze(r, rows) d = Sub(down, across)
            below = Less(d, near) above = Greater(d, back) close = And(below, above)
            far = Abs(d) distance = Where(close, within, far)
            df = Cast<to = 1>(distance) ratio = Div(df, nearf) log = Log(ratio)
            part = Div(log, farthest) stretched = Mul(part, stretch) steps = Ceil(stretched)
            bucket = Add(steps, nearf) sign = Sign(d) signf = Cast<to = 1>(sign)
            signed = Mul(bucket, signf) plain = Cast<to = 1>(d)
            is_near = LessOrEqual(distance, near) chosen = Where(is_near, plain, signed)
            whole = Cast<to = 7>(chosen) shifted = Add(whole, span)
            clipped = Clip(shifted, zero, last)
            q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)
            kt = Transpose<perm = [0, 2, 1]>(k) ks = Div(kt, root) qk = MatMul(q, ks)
            c2p = MatMul(q, positions) zeros = Mul(qk, nothing)
            spread = Cast<to = 7>(zeros) index = Add(spread, clipped)
            bias = GatherElements<axis = 2>(c2p, index)
            p2c = MatMul(k, positions) other = GatherElements<axis = 2>(p2c, index)
            turned = Transpose<perm = [0, 2, 1]>(other) both = Add(bias, turned)
            scores = Add(qk, both) p = Softmax<axis = -1>(scores) y = MatMul(p, v)
        }}""",
        **values,
    )
    return to_proto(graph)


def feeds() -> list[dict[str, Array]]:
    return [
        {"x": normal(batch, length, WIDTH, seed=seed)}
        for seed in range(4)
        for batch, length in SIZES
    ]


@pytest.mark.parametrize("target", ["cpu", "qdq"])
def test_indices_stay_and_answers_are_kept(target: str) -> None:
    """The default gates hold: a mean cosine of .99 and more."""
    model = attention()
    found = qcompile.compile(model, feeds(), target=target, options=Options(bench=False))
    compiled = onnx.ModelProto.FromString(found.model)
    gathers = [n for n in compiled.graph.node if n.op_type == "GatherElements"]
    (index,) = {n.input[1] for n in gathers}
    before, after = (
        Session(with_outputs(m, [name]).SerializeToString(), SessionOptions(threads=1))
        for m, name in ((model, "index"), (compiled, index))
    )
    for feed in feeds()[: len(SIZES)]:
        (old,), (new,) = before.run(feed).values(), after.run(feed).values()
        np.testing.assert_array_equal(new, old)
        assert new.min() >= 0 and new.max() < 2 * SPAN
    assert found.report.verdict is not None and found.report.verdict.passed
