"""Outlier channels read on in further columns: the same function inside the foreseen range."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qcompile.ir import Graph, array
from qcompile.passes.lower.insert_qdq import InsertQdq
from qcompile.passes.lower.quantize_parts import QuantizeParts
from qcompile.passes.plan.plan_operands import PlanOperands
from qcompile.passes.transform.round_weights import RoundWeights
from qcompile.passes.transform.split_outliers import SplitOutliers, _pairs
from qcompile.planning import Context, Decision
from qcompile.quant import PAIR_SUM, Array, QSpec, real, worst_sums
from qcompile.quant.weight_rounding import pairs
from qcompile.rewriting.testing import (
    assert_refused,
    check,
    context,
    differential,
    normal,
    outputs,
    parse,
    run_pass,
)
from qcompile.runtime.evaluation.int16_saturation import saturated_product
from tests.passes.corpus import calibrate, observed

CHANNELS, OUTLIER, WIDE = 16, 5, 8
# Nothing beyond the data is foreseen: the range ends where the data does.
SPLIT = SplitOutliers(doublings=0, least_channels=0)


def on_grid(*shape: int, seed: int = 0, step: float = 2.0**-7) -> Array:
    """Weights that int8 holds exactly: whole numbers of steps, 127 of them in every column.

    No two of one sign sum to over 128, so neither the bound on pairs changes them nor any order.
    """
    drawn = np.random.default_rng(seed).integers(-63, 64, shape)
    drawn[0] = 127
    drawn[1] = -np.abs(drawn[1])
    found: Array = (drawn * step).astype(np.float32)
    return found


W = on_grid(CHANNELS, 4)
# All products with W, below 128, are added in another order and with up to nine columns more.
ATOL = 2 * (CHANNELS + 9) * 2.0**-24 * 128


def rows(count: int = 200, *, both: bool = False, seed: int = 3) -> Array:
    """Within [-1, 1], one channel up to WIDE; with ``both`` to either side."""
    rng = np.random.default_rng(seed)
    data = rng.uniform(-1, 1, (count, CHANNELS))
    data[:, OUTLIER] = rng.uniform(-WIDE if both else 0, WIDE, count)
    data[:2] = [[-1] * CHANNELS, [1] * CHANNELS]
    data[0, OUTLIER], data[1, OUTLIER] = -WIDE if both else 0, WIDE
    found: Array = data.astype(np.float32)
    return found


def gathered(w: Array = W, body: str = "y = MatMul(x, w)", results: str = "float[N,4] y") -> Graph:
    """A graph input is quantized: columns come from a Gather."""
    given = {"w": w, "u": on_grid(CHANNELS, 4, seed=1), "b": normal(4)}
    return parse(f"g (float[N,16] x) => ({results}) {{ {body} }}", **given)


def inside(data: Array) -> list[dict[str, Array]]:
    """A feed that the columns hold: zero points are whole steps, so that the ends of the range may
    lie half a step inside of what was seen. That is 1/250 here; a hundredth is left out."""
    return [{"x": data * np.float32(0.99)}]


LAYER = "m = MatMul(x, w) a = Add(m, b) r = Relu(a) y = MatMul(r, v)"


def layered(body: str = LAYER, results: str = "float[N,4] y") -> Graph:
    """An activation function over a layer, whose outputs hold the outlier."""
    w = normal(6, CHANNELS, seed=1) / 4
    w[:, OUTLIER] *= WIDE
    given = {"w": w, "b": normal(CHANNELS, seed=2) / 4, "v": W}
    return parse(f"g (float[N,6] x) => ({results}) {{ {body} }}", **given)


def planned(graph: Graph, data: Array, item: SplitOutliers = SPLIT, target: str = "cpu") -> Context:
    ctx = run_pass(graph, PlanOperands(), ctx=context(target))
    return calibrate(graph, ctx, item, [{"x": data}])


def ends(graph: Graph, base: str) -> tuple[float, float, Array]:
    """Where the columns saturate, and how far each further one is moved, in spans."""
    found = graph.constants()
    low, high = float(array(found[f"{base}/low"])), float(array(found[f"{base}/high"]))
    return low, high, array(found[f"{base}/offsets"]) / np.float32(low - high)


# Columns by a Gather --------------------------------------------------------------------------


def test_golden_gathered() -> None:
    graph, data = gathered(), rows()
    ctx = planned(graph, data)
    differential(graph, SPLIT, atol=ATOL, feeds=inside(data), ctx=ctx)
    check(
        graph,
        """
        CHECK: %x/picked = Gather(%x, @x/outliers:i64[4]=[5, 5, 5, 5]) {axis=-1}
        CHECK-NEXT: %x/moved = Add(%x/picked, @x/offsets:f32[4]
        CHECK-NEXT: %x/columns = Concat(%x, %x/moved) {axis=-1}
        CHECK-NEXT: %x/split = Clip(%x/columns, @x/low:{{.*}}, @x/high:
        CHECK-NEXT: %y/product = MatMul(%x/split, @w/split:f32[20,4]
        CHECK-NEXT: %y = Add(%y/product, @MatMul:y/bias:f32[4]
        CHECK-NOT: =
        """,
    )
    low, high, copies = ends(graph, "x")
    np.testing.assert_allclose(copies, [1, 2, 3, 4])
    assert low <= -1 and high + 4 * (high - low) >= WIDE - (high - low) / 255
    wider = array(graph.constants()["w/split"])
    np.testing.assert_array_equal(wider, W[[*range(CHANNELS), *[OUTLIER] * 4]])
    span = ctx.ranges.get("x/split")
    assert span is not None and (span.lo, span.hi) == pytest.approx((low, high))
    assert {d.tensor for d in ctx.plan.quantized()} == {"x/split", "w/split"}


def test_outliers_to_both_sides_read_on_in_both_directions() -> None:
    graph, data = gathered(), rows(both=True)
    differential(graph, SPLIT, atol=ATOL, feeds=inside(data), ctx=planned(graph, data))
    _, _, copies = ends(graph, "x")
    assert copies.min() < -0.5 and copies.max() > 0.5


def saturated(data: Array, low: float, high: float, copies: Array) -> Array:
    """What the columns can hold of the data."""
    found = np.clip(data, low, high)
    span = high - low
    least, most = low + min(copies.min(), 0) * span, high + max(copies.max(), 0) * span
    found[:, OUTLIER] = np.clip(data[:, OUTLIER], least, most)
    return found


@pytest.mark.parametrize("both", [False, True])
def test_beyond_the_foreseen_range_it_saturates(both: bool) -> None:
    graph, wild = gathered(), rows(both=both, seed=8) * np.float32(3)
    run_pass(graph, SPLIT, ctx=planned(graph, rows(both=both)))
    held = saturated(wild, *ends(graph, "x"))
    assert np.abs(held - wild).max() > 1
    near = rows(both=both)
    step = (ends(graph, "x")[1] - ends(graph, "x")[0]) / 255
    assert np.abs(saturated(near, *ends(graph, "x")) - near).max() <= step / 2 * 1.001
    np.testing.assert_allclose(outputs(graph, {"x": wild})["y"], held @ W, atol=2 * ATOL)


def test_layers_that_share_the_data_share_the_columns() -> None:
    body = "q = MatMul(x, w) k = Gemm(x, u, b) y = Add(q, k)"
    graph, data = gathered(body=body), rows()
    differential(graph, SPLIT, atol=2 * ATOL, feeds=inside(data), ctx=planned(graph, data))
    check(
        graph,
        """
        CHECK: %q/product = MatMul(%x/split, @w/split:f32[20,4]
        CHECK: %k = Gemm(%x/split, @u/split:f32[20,4]{{.*}}, @b/shifted:f32[4]
        """,
    )


def small_outlier() -> Array:
    """The row of the outlier is an eighth as large as the others."""
    w = on_grid(CHANNELS, 4)
    w[OUTLIER] = np.rint(w[OUTLIER] / 8 * 128) / 128
    return w


def test_a_channel_of_small_weights_gets_a_wider_step() -> None:
    """Its columns hold x / f, and its rows f w, rounded to whole steps: off by half of one."""
    w, data = small_outlier(), rows(both=True)
    graph = gathered(w)
    ctx = planned(graph, data)
    scale = float(np.float32(2.0**-7))
    atol = ATOL + WIDE / 2 * scale / 2  # the columns add up to x / f, f at least 2
    differential(graph, SPLIT, atol=atol, feeds=inside(data), ctx=ctx)
    check(
        graph,
        """
        CHECK: %x/picked = Gather(%x, @x/outliers
        CHECK-NEXT: %x/scaled = Mul(%x/picked, @x/factors:f32[
        CHECK-NEXT: %x/moved = Add(%x/scaled, @x/offsets:f32[
        CHECK-NEXT: %x/columns = Concat(%x, %x/moved)
        """,
    )
    wider = array(graph.constants()["w/split"])
    assert not wider[OUTLIER].any()  # it is in the appended columns, the first copy too
    factor = 1 / array(graph.constants()["x/factors"])
    assert (factor >= 2).all()
    np.testing.assert_allclose(
        wider[CHANNELS:], w[[OUTLIER] * len(factor)] * factor[:, None], atol=scale / 2 * 1.001
    )


# Columns by the layer before ------------------------------------------------------------------


def test_golden_from_the_layer_before() -> None:
    """No Gather and no Concat: one product makes them all."""
    graph = layered()
    data = np.clip(normal(300, 6), -2, 2)
    ctx = planned(graph, data)
    differential(graph, SPLIT, atol=ATOL, feeds=inside(data), ctx=ctx)
    check(
        graph,
        """
        CHECK: %m/wider = MatMul(%x, @w/wider:f32[6,20]
        CHECK-NEXT: %a/wider = Add(%m/wider, @b/wider:f32[20]
        CHECK-NEXT: %r/wider = Relu(%a/wider)
        CHECK-NEXT: %r/moved = Add(%r/wider, @r/offsets:f32[20]
        CHECK-NEXT: %r/split = Clip(%r/moved, @r/low:{{.*}}, @r/high:
        CHECK-NEXT: %y/product = MatMul(%r/split, @v/split:f32[20,4]
        CHECK-NEXT: %y = Add(%y/product, @MatMul:y/bias
        CHECK-NOT: =
        """,
    )
    found = array(graph.constants()["w/wider"])
    np.testing.assert_array_equal(found[:, CHANNELS:], found[:, [OUTLIER] * 4])
    assert {d.tensor for d in ctx.plan.quantized()} == {"x", "w/wider", "r/split", "v/split"}


def test_what_was_rounded_stays_as_it_was_rounded() -> None:
    graph = layered()
    data = np.clip(normal(300, 6), -2, 2)
    ctx = planned(graph, data)
    run_pass(graph, RoundWeights(0.05), ctx=ctx)
    before = dict(ctx.rounded)
    run_pass(graph, SPLIT, ctx=ctx)
    for new, old, axis in (("w/wider", "w", 1), ("v/split", "v", 0)):
        picked = [*range(CHANNELS), *[OUTLIER] * 4]
        expected = np.take(before[old].values, picked, axis)
        np.testing.assert_array_equal(ctx.rounded[new].values, expected)
        np.testing.assert_array_equal(
            real(ctx.rounded[new]), np.take(real(before[old]), picked, axis)
        )


@pytest.mark.parametrize(
    ("body", "results", "found"),
    [
        ("m = MatMul(x, w) r = Relu(m) y = MatMul(r, v)", "float[N,4] y", "MatMul(%x, @w/wider"),
        (LAYER.replace("Relu", "ThresholdedRelu"), "float[N,4] y", "ThresholdedRelu(%a/wider"),
        (LAYER.replace("Add(m, b)", "Add(b, m)"), "float[N,4] y", "Add(@b/wider"),
        (LAYER, "float[N,4] y, float[N,16] r", "%r/picked = Gather(%r"),
        (LAYER, "float[N,4] y, float[N,16] a", "%r/picked = Gather(%r"),
        (LAYER + " n = Neg(m)", "float[N,4] y, float[N,16] n", "%r/picked = Gather(%r"),
        (LAYER.replace("Relu(a)", "Softmax(a)"), "float[N,4] y", "%r/picked = Gather(%r"),
        ("m = Mul(b, b) a = MatMul(x, w) r = Mul(a, m) y = MatMul(r, v)", "float[N,4] y", "Gather"),
    ],
    ids=[
        "no bias",
        "another function",
        "bias first",
        "an output",
        "an output inside",
        "read inside",
        "mixes",
        "a Mul",
    ],
)
def test_where_columns_come_from(body: str, results: str, found: str) -> None:
    graph = layered(body, results)
    data = np.clip(normal(300, 6), -2, 2)
    ctx = planned(graph, data)
    differential(graph, SPLIT, atol=2 * ATOL, feeds=inside(data), ctx=ctx)
    check(graph, f"CHECK: {found}")


def test_interior_quantizers_follow_the_wider_tensors() -> None:
    """Targets that quantize between layers planned ``a`` and ``r``, which are wider now."""
    graph = layered()
    data = np.clip(normal(300, 6), -2, 2)
    ctx = planned(graph, data)
    spec = QSpec("uint8", symmetric=False)
    maker = graph.find("Relu:r")
    use = type(next(ctx.plan.quantized()).uses[0])("Relu:r", 0)
    ctx.plan.decide(Decision("a", "activation", spec, "by hand", (use,)))
    ctx.request("a", spec)
    calibrate(graph, ctx, SPLIT, [{"x": data}])
    run_pass(graph, SPLIT, ctx=ctx)  # the verifier looks at planned uses
    assert maker.inputs[0].name == "a/wider"
    assert ctx.ranges.get("a/wider") == ctx.ranges.get("a")
    run_pass(graph, InsertQdq(), ctx=ctx)
    check(graph, "CHECK: QuantizeLinear(%a/wider")


# Once quantized -------------------------------------------------------------------------------


@pytest.mark.parametrize("both", [False, True])
def test_the_outlier_has_the_step_of_the_rest(both: bool) -> None:
    """y is x through its quantizer: weights of the unit matrix are exact up to rounding.

    Without the pass one step covers the outlier's range, and all are off by half of that.
    """
    data = rows(500, both=both)
    steps = []
    for items in ([], [SPLIT]):
        unit = np.eye(CHANNELS, dtype=np.float32)
        graph = parse("g (float[N,16] x) => (float[N,16] y) { y = MatMul(x, w) }", w=unit)
        ctx = planned(graph, data)
        run_pass(graph, *items, InsertQdq(), QuantizeParts(), ctx=ctx)
        name = "x/split/scale" if items else "x/scale"
        steps.append(float(array(graph.constants()[name])))
        off = np.abs(outputs(graph, {"x": data})["y"] - data)
        # Half a step where one column holds x; its ends may lie half a step inside the range.
        assert off.max() <= steps[-1] * 1.001 + 20 * 2.0**-24 * WIDE
        assert np.quantile(off[:, OUTLIER], 0.9) <= steps[-1] / 2 * 1.001 + 20 * 2.0**-24 * WIDE
    assert steps[1] < steps[0] * 0.6
    if not both:
        check(
            graph,
            """
            CHECK: %x/quantized = QuantizeLinear(%x, @x/split/scale
            CHECK: %x/moved/quantized = QuantizeLinear(%x/moved, @x/split/scale
            CHECK: Concat(%x/quantized, %x/moved/quantized)
            CHECK-NOT: Clip
            """,
        )


def test_more_share_makes_the_step_finer() -> None:
    """Five times as wide, the outlier takes what columns it gets."""
    data, steps = rows(both=True), []
    data[:, OUTLIER] *= 5
    for share in (0.25, 1.0):
        graph = gathered()
        item = SplitOutliers(share=share, doublings=0, least_channels=0)
        run_pass(graph, item, ctx=planned(graph, data))
        low, high, copies = ends(graph, "x")
        assert len(copies) <= share * CHANNELS
        steps.append(high - low)
    assert steps[1] < steps[0]


def test_ranges_to_come_get_columns_too() -> None:
    """With doublings, twice the data still fits where its tail foretells that."""
    graph, data = gathered(), rows()
    item = SplitOutliers(doublings=4, least_channels=0)
    ctx = planned(graph, data, item)
    ahead = float(ctx.channels["x"].extrapolated(4).hi[OUTLIER])
    run_pass(graph, item, ctx=ctx)
    low, high, copies = ends(graph, "x")
    assert high + copies.max() * (high - low) >= ahead - (high - low) / 255


# Refusals -------------------------------------------------------------------------------------


def test_refuses_what_was_not_sampled() -> None:
    graph = gathered()
    ctx = planned(graph, rows())
    ctx.channels.clear()
    assert_refused(graph, SPLIT, "its channels were not sampled", ctx)


@pytest.mark.parametrize(
    "spec", [QSpec("uint8", False, "channel", -1), QSpec("int8", symmetric=True), None], ids=str
)
def test_refuses_a_quantizer_without_one_scale_and_a_zero_point(spec: QSpec | None) -> None:
    graph = gathered()
    ctx = planned(graph, rows())
    old = next(ctx.plan.quantized("activation"))
    ctx.plan.decisions.remove(old)
    if spec is not None:
        ctx.plan.decide(Decision("x", "activation", spec, "by hand", old.uses))
    assert_refused(graph, SPLIT, "its own quantizer with one scale and a zero point", ctx)


def test_refuses_a_transposed_weight() -> None:
    graph = gathered(np.ascontiguousarray(W.T), "y = Gemm<transB = 1>(x, w, )")
    assert_refused(graph, SPLIT, "a weight is transposed", planned(graph, rows()))


def test_refuses_a_weight_that_is_shared_with_other_data() -> None:
    body, results = "y = MatMul(x, w) n = Neg(x) z = MatMul(n, w)", "float[N,4] y, float[N,4] z"
    graph = gathered(body=body, results=results)
    ctx = planned(graph, rows())
    assert_refused(graph, SPLIT, "weight 'w' is shared by 2 nodes", ctx)


def test_columns_come_from_a_gather_where_the_layer_before_is_shared() -> None:
    body = LAYER + " n = Neg(x) z = MatMul(n, w)"
    graph = layered(body, "float[N,4] y, float[N,16] z")
    data = np.clip(normal(300, 6), -2, 2)
    ctx = planned(graph, data)
    differential(graph, SPLIT, atol=2 * ATOL, feeds=inside(data), ctx=ctx)
    check(graph, "CHECK: %r/picked = Gather(%r")


@pytest.mark.parametrize(
    ("item", "data", "reason"),
    [
        (SplitOutliers(least_channels=17), rows(), "16 channels: for so few"),
        (SPLIT, np.clip(rows(), -1, 1), "no outliers: 4 more columns would shrink"),
        (SPLIT, 0 * rows(), "no outliers"),
        (replace(SPLIT, least_gain=20), rows(), "no outliers: 4 more columns would shrink"),
    ],
    ids=["few channels", "no outlier", "dead", "little gain"],
)
def test_refuses_where_it_does_not_pay(item: SplitOutliers, data: Array, reason: str) -> None:
    graph = gathered()
    assert_refused(graph, item, reason, planned(graph, data))


def test_what_the_columns_hold() -> None:
    """Where the outlier lies inside the shared range, its further columns idle at an end."""
    graph, data = gathered(), rows()
    run_pass(graph, SPLIT, ctx=planned(graph, data))
    low, high, copies = ends(graph, "x")
    shared = np.clip(data, low, high)
    (held,) = observed(graph, ["x/split"], [{"x": shared}])["x/split"]
    np.testing.assert_array_equal(held[:, :CHANNELS], shared)
    idle = np.where(copies > 0, np.float32(low), np.float32(high))
    np.testing.assert_allclose(held[:, CHANNELS:], np.tile(idle, (len(data), 1)), atol=1e-6)


# Pairs of rows whose sums fit into int16 ------------------------------------------------------


def heavy(seed: int = 2, rows_of: int = CHANNELS) -> Array:
    """Weights of which two copies of one row sum to over 128: up to 127 steps in the outlier's."""
    drawn = np.random.default_rng(seed).integers(-63, 64, (rows_of, 4))
    drawn[0], drawn[1] = 127, -1
    drawn[OUTLIER] = [126, -126, 100, -100]
    drawn[OUTLIER ^ 1] = [-1, 1, -1, 1]
    found: Array = (drawn * 2.0**-7).astype(np.float32)
    return found


def worst_pair(graph: Graph, ctx: Context, weight: str) -> int:
    """The largest sum of two integers of one sign that lie side by side."""
    values = ctx.rounded[weight].values
    return int(worst_sums(*pairs(values.astype(np.int32))).max())


@pytest.mark.parametrize("channels", [CHANNELS, CHANNELS - 1], ids=["even", "odd"])
def test_copies_of_one_channel_never_meet(channels: int) -> None:
    """Each has a column of zero weights beside it; an odd body ends with one too."""
    w, data = heavy(rows_of=channels), rows()[:, :channels]
    graph = parse(f"g (float[N,{channels}] x) => (float[N,4] y) {{ y = MatMul(x, w) }}", w=w)
    ctx = planned(graph, data)
    # Four copies, three blanks between them, and one that pairs up the odd row of the body.
    columns = channels + 7 + channels % 2
    differential(graph, SPLIT, atol=2 * ATOL, feeds=inside(data), ctx=ctx)
    wider = array(graph.constants()["w/split"])
    assert len(wider) == columns and worst_pair(graph, ctx, "w/split") <= PAIR_SUM
    zero = [i for i, row in enumerate(wider[channels:]) if not row.any()]
    assert len(zero) == columns - channels - 4
    copies = wider[channels:][[i for i in range(columns - channels) if i not in zero]]
    np.testing.assert_array_equal(copies, w[[OUTLIER] * 4])


def test_without_the_bound_copies_lie_side_by_side() -> None:
    """What the order is for: the check above fails where the weights' pairs are not bounded."""
    graph, data = gathered(heavy()), rows()
    ctx = run_pass(graph, PlanOperands(), ctx=context())
    ctx.plan.decisions[:] = [
        replace(d, spec=replace(d.spec, paired=False)) if d.spec and d.spec.paired else d
        for d in ctx.plan.decisions
    ]
    calibrate(graph, ctx, SPLIT, [{"x": data}])
    run_pass(graph, SPLIT, ctx=ctx)
    assert len(array(graph.constants()["w/split"])) == CHANNELS + 4
    assert worst_pair(graph, ctx, "w/split") == 2 * 126


def test_columns_that_fit_each_other_share_a_pair() -> None:
    """Rows of two channels, each too large for itself: one beside the other, and no blanks."""
    large = np.array([[100, -100], [-100, 100]], np.int8)
    assert _pairs(np.repeat(large, 2, axis=0)) == [(0, 2), (1, 3)]
    assert _pairs(np.repeat(large[:1], 3, axis=0)) == [(0, None), (1, None), (2, None)]


def test_the_integers_of_bounded_weights_are_the_same_without_vnni() -> None:
    graph, data = gathered(heavy()), rows()
    ctx = planned(graph, data)
    run_pass(graph, SPLIT, InsertQdq(), ctx=ctx)
    weight = array(graph.constants()["w/split/int8"])
    left = np.random.default_rng(0).integers(0, 256, (50, len(weight))).astype(np.uint8)
    np.testing.assert_array_equal(saturated_product(left, weight), left.astype(int) @ weight)
