"""Wide channels are scaled down, the weights that read them up: the same function in float."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir import Graph, array
from qcompile.passes.lower.insert_qdq import InsertQdq
from qcompile.passes.plan.plan_operands import PlanOperands
from qcompile.passes.transform.migrate_scales import MigrateScales
from qcompile.planning import Context
from qcompile.quant import Array, QSpec
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
from tests.passes.corpus import calibrate, stats

WIDE, CHANNELS = 40, 8
# A factor, its inverse and their product with a weight round by 2^-24 each, as do normalization
# and the product in either form. Sums of 8 products: |x| |w| is below 64 where the wide channel
# meets the small weights that read it.
ATOL = (3 + 8) * 2.0**-24 * 64
# A group of one channel, and one of seven.
OUTLIER = MigrateScales(least_error=0)


def weights(**more: tuple[int, ...]) -> dict[str, Array]:
    """gamma with one wide channel; the weights that read it have a small row for it."""
    gamma = 1 + np.float32(0.1) * normal(CHANNELS, seed=9)
    gamma[3] = WIDE
    given: dict[str, Array] = {"g": gamma, "b": normal(CHANNELS) / 8}
    for seed, (name, shape) in enumerate(more.items()):
        given[name] = normal(*shape, seed=seed)
        if len(shape) == 2:
            given[name][3] /= 8
    return given


def normalized(body: str, results: str = "float[N,8] y", **more: tuple[int, ...]) -> Graph:
    """``n``, the normalized x [N, 8] with a wide channel, and what reads it."""
    given = weights(**more)
    return parse(
        f"""g (float[N,8] x, bool k, float v) => ({results}) {{
            n = LayerNormalization<axis = -1>(x, g, b) {body} }}""",
        **given,
    )


def feed(rows: int = 300, seed: int = 3) -> dict[str, Array]:
    x = normal(rows, CHANNELS, seed=seed)
    return {"x": x, "k": np.array(True), "v": np.array(2, np.float32)}


def planned(graph: Graph, item: MigrateScales = OUTLIER) -> Context:
    ctx = run_pass(graph, PlanOperands(), ctx=context())
    return calibrate(graph, ctx, item, [feed()])


def factors(graph: Graph, weight: str) -> Array:
    """What the rows of a weight were multiplied with."""
    new = array(graph.constants()[f"{weight}/scaled"])
    found: Array = np.median(new / weights(w=(8, 8), u=(8, 8))[weight], axis=1)
    return found


QKV = "q = MatMul(n, w) k1 = MatMul(n, u) y = Add(q, k1)"


# The rewrite ----------------------------------------------------------------------------------


def test_golden_a_normalization_carries_the_factors() -> None:
    """All that reads it are the linear layers: no operator more."""
    graph = normalized(QKV, w=(8, 8), u=(8, 8))
    ctx = planned(graph)
    differential(graph, OUTLIER, atol=2 * ATOL, feeds=[feed(), feed(50, 7)], ctx=ctx)
    check(
        graph,
        """
        CHECK: %n/scaled = LayerNormalization(%x, @g/scaled:f32[8]{{.*}}, @b/scaled:f32[8]
        CHECK-NEXT: %q = MatMul(%n/scaled, @w/scaled:f32[8,8]
        CHECK-NEXT: %k1 = MatMul(%n/scaled, @u/scaled:f32[8,8]
        CHECK-NEXT: %y = Add(%q, %k1)
        CHECK-NOT: =
        """,
    )
    found = factors(graph, "w")
    np.testing.assert_allclose(found, factors(graph, "u"), rtol=1e-6)
    assert found.argmax() == 3 and found[3] > 4
    gamma = array(graph.constants()["g/scaled"])
    np.testing.assert_allclose(gamma * found, weights()["g"], rtol=1e-6)
    uses = {d.tensor: len(d.uses) for d in ctx.plan.quantized()}
    assert uses == {"w/scaled": 1, "n/scaled": 2, "u/scaled": 1}


def test_what_is_known_of_the_scaled_tensor_is_true() -> None:
    graph = normalized(QKV, w=(8, 8), u=(8, 8))
    ctx = planned(graph)
    run_pass(graph, OUTLIER, ctx=ctx)
    found, before = ctx.channels["n/scaled"], ctx.channels["n"]
    inverse = 1 / factors(graph, "w")
    np.testing.assert_allclose(found.rows, before.rows * inverse, rtol=1e-5)
    span, ahead = ctx.ranges.get("n/scaled"), before.extrapolated(4).scaled(inverse)
    assert span is not None and span.axis is None
    np.testing.assert_allclose((span.lo, span.hi), (ahead.lo.min(), ahead.hi.max()), rtol=1e-5)


def test_a_normalization_that_the_residual_reads_gets_a_mul() -> None:
    """The residual is the same bit for bit."""
    body = "m = MatMul(n, w) y = Add(m, n) r = Identity(n)"
    graph = normalized(body, "float[N,8] y, float[N,8] r", w=(8, 8))
    before = outputs(graph, feed())["r"]
    differential(graph, OUTLIER, atol=ATOL, feeds=[feed()], ctx=planned(graph))
    np.testing.assert_array_equal(outputs(graph, feed())["r"], before)
    check(
        graph,
        """
        CHECK: %n = LayerNormalization(%x, @g:f32[8]{{.*}}, @b:f32[8]
        CHECK: %n/scaled = Mul(%n, @n/factors:f32[8]
        CHECK: %m = MatMul(%n/scaled, @w/scaled:f32[8,8]
        CHECK: %y = Add(%m, %n)
        """,
    )


BRANCHES = """i = If (k) <
    then_branch = yes () => (float[N,8] s) { s = Neg(n) },
    else_branch = no () => (float[N,8] t) { t = Abs(n) }
> y = Add(m, i)"""
COMPUTED = "c = Mul(g, v) l = LayerNormalization<axis = -1>(x, c, b) y = MatMul(l, w)"


@pytest.mark.parametrize(
    ("body", "results", "mul"),
    [
        ("y = MatMul(n, w)", "float[N,8] y, float[N,8] n", "%n/scaled = Mul(%n"),
        (f"m = MatMul(n, w) {BRANCHES}", "float[N,8] y", "%n/scaled = Mul(%n"),
        (COMPUTED, "float[N,8] y, float[N,8] n", "%l/scaled = Mul(%l"),
        ("r = Relu(n) y = MatMul(r, w)", "float[N,8] y", "%r/scaled = Mul(%r"),
        ("y = MatMul(n, w) o = MatMul(n, n2)", "float[N,8] y, float[N,2] o", "= Mul(%n"),
    ],
    ids=["an output", "a subgraph", "computed gamma", "no normalization", "a float product"],
)
def test_a_mul_where_nothing_can_carry_the_factors(body: str, results: str, mul: str) -> None:
    graph = normalized(body, results, w=(8, 8), n2=(8, 2))
    ctx = planned(graph)
    ctx.plan.release("MatMul:o", "by hand")
    differential(graph, OUTLIER, atol=2 * ATOL, feeds=[feed()], ctx=ctx)
    check(graph, f"CHECK: {mul}")


def test_normalization_without_beta_and_over_more_axes() -> None:
    """Over the last axis alone can gamma carry a factor for each channel."""
    graph = normalized("l = LayerNormalization<axis = -1>(x, g) y = MatMul(l, w)", w=(8, 8))
    differential(graph, OUTLIER, atol=ATOL, feeds=[feed()], ctx=planned(graph))
    check(graph, "CHECK: %l/scaled = LayerNormalization(%x, @g/scaled:f32[8]{{[^,]*}})")
    two = parse(
        """g (float[N,2,8] x) => (float[N,2,8] y) {
            n = LayerNormalization<axis = 1>(x, g) y = MatMul(n, w)
        }""",
        g=np.stack([weights()["g"]] * 2),
        w=weights(w=(8, 8))["w"],
    )
    shaped = {"x": normal(150, 2, 8)}
    ctx = run_pass(two, PlanOperands(), ctx=context())
    calibrate(two, ctx, OUTLIER, [shaped])
    differential(two, OUTLIER, atol=ATOL, feeds=[shaped], ctx=ctx)
    check(two, "CHECK: %n/scaled = Mul(%n, @n/factors:f32[8]")


def test_a_weight_that_two_sites_share_is_left_alone() -> None:
    """Scaled for one of them, it would be stored twice."""
    graph = normalized("m = MatMul(n, w) r = Sigmoid(m) y = MatMul(r, w)", w=(8, 8))
    ctx = run_pass(graph, OUTLIER, ctx=planned(graph))
    check(graph, "CHECK: %m = MatMul(%n, @w:f32\nCHECK: %y = MatMul(%r, @w:f32")
    reason = (
        "weight 'w' is shared by 2 nodes: changed for this tensor alone, it would be stored twice"
    )
    assert ("n", reason) in [(s.node, s.reason) for s in ctx.skips]


def test_a_gemm_is_a_linear_layer() -> None:
    graph = normalized("y = Gemm(n, w, c)", w=(8, 8), c=(8,))
    differential(graph, OUTLIER, atol=ATOL, feeds=[feed()], ctx=planned(graph))
    check(graph, "CHECK: %y = Gemm(%n/scaled, @w/scaled:f32[8,8]{{.*}}, @c:f32[8]")


# Which factors --------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [2, 3, 8])
def test_groups_have_a_factor_each(groups: int) -> None:
    """Of one size, sorted by width; the factor of a group is its widest channel, in medians."""
    graph = normalized("y = MatMul(n, w)", w=(8, 8))
    item = MigrateScales(groups=groups, least_error=0, least_gain=0)
    ctx = planned(graph, item)
    differential(graph, item, atol=ATOL, feeds=[feed()], ctx=ctx)
    found = factors(graph, "w")
    assert len(np.unique(found.round(4))) == groups
    width = ctx.channels["n"].extrapolated(4).width
    for part in np.array_split(np.argsort(width, kind="stable"), groups):
        np.testing.assert_allclose(found[part], found[part[0]], rtol=1e-5)
    np.testing.assert_allclose(found.max() / found.min(), _ratio(width, groups), rtol=1e-5)


def _ratio(width: Array, groups: int) -> float:
    parts = np.array_split(np.sort(width), groups)
    return float(parts[-1].max() / parts[0].max())


@pytest.mark.parametrize("strength", [0.3, 0.5, 1.0])
def test_strength_is_the_exponent_of_the_widths(strength: float) -> None:
    """SmoothQuant's migration: x / width ** a."""
    graph = normalized("y = MatMul(n, w)", w=(8, 8))
    item = MigrateScales(strength=strength, least_error=0, least_gain=0)
    ctx = planned(graph, item)
    differential(graph, item, atol=ATOL, feeds=[feed()], ctx=ctx)
    width = ctx.channels["n"].extrapolated(4).width
    np.testing.assert_allclose(
        factors(graph, "w"), (width / np.median(width)) ** strength, rtol=1e-5
    )
    if strength == 1:
        after = ctx.channels["n/scaled"].extrapolated(4).width
        np.testing.assert_allclose(after, after[0], rtol=1e-5)


def test_a_heavier_penalty_on_weights_scales_less() -> None:
    found = []
    for penalty in (0.1, 100.0):
        graph = normalized("y = MatMul(n, w)", w=(8, 8))
        item = MigrateScales(weight_penalty=penalty, least_error=0, least_gain=1)
        run_pass(graph, item, ctx=planned(graph))
        moved = "w/scaled" in graph.constants()
        found.append(float(factors(graph, "w")[3]) if moved else 1.0)
    assert found[1] < found[0]


def test_quantized_answers_are_nearer() -> None:
    """One channel is 40 times as wide: the step of the others shrinks accordingly."""
    errors = []
    for items in ([InsertQdq()], [OUTLIER, InsertQdq()]):
        graph = normalized("y = MatMul(n, w)", w=(8, 8))
        expected = outputs(graph, feed())["y"]
        run_pass(graph, *items, ctx=planned(graph))
        errors.append(float(np.linalg.norm(outputs(graph, feed())["y"] - expected)))
    assert errors[1] < errors[0] / 3


# Refusals -------------------------------------------------------------------------------------


def plain(**options: float) -> tuple[Graph, MigrateScales]:
    return normalized("y = MatMul(n, w)", w=(8, 8)), MigrateScales(**options)  # type: ignore[arg-type]


def test_refuses_what_was_not_sampled() -> None:
    graph, item = plain()
    ctx = planned(graph)
    ctx.channels.clear()
    assert_refused(graph, item, "its channels were not sampled", ctx)


def test_refuses_a_quantizer_with_scales_per_channel_or_none() -> None:
    graph, item = plain()
    ctx = planned(graph)
    per_channel = QSpec("uint8", False, "channel", -1)
    for spec in (per_channel, None):
        ctx = planned(graph)
        found = next(d for d in ctx.plan.quantized("activation"))
        ctx.plan.decisions.remove(found)
        if spec is not None:
            ctx.plan.decide(type(found)("n", "activation", spec, "by hand", found.uses))
        assert_refused(graph, item, "does not have its own quantizer with one scale", ctx)


def test_refuses_a_transposed_weight() -> None:
    graph = normalized("y = Gemm<transB = 1>(n, w, )", w=(8, 8))
    assert_refused(graph, OUTLIER, "a weight is transposed", planned(graph))


def test_refuses_long_rows() -> None:
    graph, item = plain(most_channels=7)
    assert_refused(
        graph, item, "8 channels: for so many, split-outliers costs less", planned(graph)
    )


def test_refuses_where_the_error_is_small() -> None:
    graph, item = plain(least_error=0.5)
    assert_refused(graph, item, "its error is small: ", planned(graph))


def test_refuses_where_no_scales_help() -> None:
    graph, item = plain(least_error=0, least_gain=1e6)
    assert_refused(
        graph, item, "scaling would help little: the predicted error shrinks", planned(graph)
    )
    graph = normalized("r = Sigmoid(x) y = MatMul(r, w)", w=(8, 8))
    given = weights(w=(8, 8))["w"]
    assert np.abs(given[3]).max() > 0
    assert_refused(graph, OUTLIER, "scaling would help little", planned(graph))


def test_the_error_is_compared_with_the_residual_sum() -> None:
    """A stream that is a thousand times as large drowns it."""
    body = "m = MatMul(n, w) a = Add(m, c) big = Mul(x, v) y = Add(a, big)"
    reasons = []
    for size in (1, 1000):
        graph = normalized(body, w=(8, 8), c=(8,))
        data = {**feed(), "v": np.array(size, np.float32)}
        ctx = run_pass(graph, PlanOperands(), ctx=context())
        assert list(MigrateScales().wants(graph, ctx)) == ["n", "y"]
        calibrate(graph, ctx, MigrateScales(), [data])
        run_pass(graph, MigrateScales(least_error=1e-4), ctx=ctx)
        reasons.append([s.reason[:18] for s in ctx.skips])
    assert reasons == [[], ["its error is small"]]


def test_dead_channels_and_few_rows_are_no_obstacle() -> None:
    graph, item = plain(least_error=0)
    ctx = planned(graph)
    rows = ctx.channels["n"].rows.copy()
    rows[:, 5] = 0
    ctx.channels["n"] = stats(rows[:2])
    differential(graph, item, atol=ATOL, feeds=[feed()], ctx=ctx)
