"""What is concatenated is quantized before; a Clip that saturation repeats goes."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.ir import Graph
from qcompile.passes.lower.quantize_parts import QuantizeParts
from qcompile.quant import Array
from qcompile.rewriting.testing import (
    assert_refused,
    check,
    context,
    differential,
    normal,
    parse,
    run_pass,
)

STEP, ZERO = np.float32(0.05), np.uint8(100)
LOW, HIGH = float(-100 * STEP), float(155 * STEP)  # of uint8
# Integers times a scale are the same floats whatever comes first.
EXACT = 0.0


def graph(
    body: str,
    results: str = "float[N,6] y",
    *,
    low: float = LOW,
    high: float = HIGH,
    scale: Array | None = None,
    zero: Array | None = None,
) -> Graph:
    """Floats a [N, 4] and b [N, 2], what quantizes them, and a pair of bounds."""
    given = {
        "s": np.asarray(STEP) if scale is None else scale,
        "z": np.asarray(ZERO) if zero is None else zero,
        "low": np.array(low, np.float32),
        "high": np.array(high, np.float32),
    }
    return parse(
        f"g (float[N,4] a, float[N,2] b, bool k, float t) => ({results}) {{ {body} }}", **given
    )


def feed(rows: int = 40) -> dict[str, Array]:
    """Far beyond both bounds, and values half a step from them."""
    edges = np.array([LOW, HIGH], np.float32)[None] + (np.arange(rows)[:, None] - 20) * STEP / 8
    a = normal(rows, 4) * np.float32(6)
    t = np.array(1.5, np.float32)
    return {"a": a, "b": edges.astype(np.float32), "k": np.array(True), "t": t}


CONCAT = "c = Concat<axis = -1>(a, b)"
PAIR = "q = QuantizeLinear(p, s, z) y = DequantizeLinear(q, s, z)"


def test_golden() -> None:
    found = graph(f"{CONCAT} p = Clip(c, low, high) {PAIR}")
    differential(found, QuantizeParts(), atol=EXACT, feeds=[feed()])
    check(
        found,
        """
        CHECK: %a/quantized = QuantizeLinear(%a, @s:[[S:.*]], @z:[[Z:.*]])
        CHECK-NEXT: %b/quantized = QuantizeLinear(%b, @s:[[S]], @z:[[Z]])
        CHECK-NEXT: %q/parts = Concat(%a/quantized, %b/quantized) {axis=-1}
        CHECK-NEXT: %y = DequantizeLinear(%q/parts, @s:[[S]], @z:[[Z]])
        CHECK-NOT: Clip
        """,
    )


def test_without_a_clip() -> None:
    found = graph(CONCAT.replace("c =", "p =") + PAIR)
    differential(found, QuantizeParts(), atol=EXACT, feeds=[feed()])
    check(found, "CHECK: Concat(%a/quantized, %b/quantized)")


def test_a_clip_alone_goes() -> None:
    found = graph(f"p = Clip(a, low, high) {PAIR}", "float[N,4] y")
    differential(found, QuantizeParts(), atol=EXACT, feeds=[feed()])
    check(found, "CHECK: %q = QuantizeLinear(%a, @s\nCHECK-NOT: Clip")


def test_parts_are_looked_at_in_their_turn() -> None:
    """A clip of one part, and a part that is itself concatenated."""
    found = graph(
        f"d = Clip(b, low, high) e = Concat<axis = -1>(d, a) p = Concat<axis = -1>(e, b) {PAIR}",
        "float[N,8] y",
    )
    differential(found, QuantizeParts(), atol=EXACT, feeds=[feed()])
    check(
        found,
        """
        CHECK-DAG: [[B:%.*]] = QuantizeLinear(%b, @s
        CHECK-DAG: [[A:%.*]] = QuantizeLinear(%a, @s
        CHECK-NOT: Clip
        CHECK: %e/quantized/parts = Concat({{.*}}, %a/quantized) {axis=-1}
        CHECK: %q/parts = Concat(%e/quantized/parts, {{.*}}) {axis=-1}
        """,
    )


@pytest.mark.parametrize("slack", [0.0, 0.2, -1.0])
def test_bounds_a_quarter_of_a_step_inside_are_saturated_all_the_same(slack: float) -> None:
    """Rounding takes what lies there to the same ends; bounds outside do nothing."""
    low, high = float(LOW + slack * STEP), float(HIGH - slack * STEP)
    found = graph(f"p = Clip(a, low, high) {PAIR}", "float[N,4] y", low=low, high=high)
    differential(found, QuantizeParts(), atol=EXACT, feeds=[feed()])


def test_int8_saturates_at_ends_of_its_own() -> None:
    """Bounds of [-128, 127] steps less the zero point; those of uint8 would cut deeper above."""
    text, zero = f"p = Clip(a, low, high) {PAIR}", np.array(7, np.int8)
    low, high = (-128 - 7) * float(STEP), (127 - 7) * float(STEP)
    found = graph(text, "float[N,4] y", low=low, high=high, zero=zero)
    differential(found, QuantizeParts(), atol=EXACT, feeds=[feed()])
    deeper = graph(text, "float[N,4] y", low=low + float(STEP), high=high, zero=zero)
    assert_refused(deeper, QuantizeParts(), "limits are narrower")


@pytest.mark.parametrize(("low", "high"), [(LOW + STEP / 2, HIGH), (LOW, HIGH - STEP)])
def test_refuses_a_clip_that_cuts_deeper(low: float, high: float) -> None:
    found = graph(f"p = Clip(a, low, high) {PAIR}", "float[N,4] y", low=low, high=high)
    assert_refused(found, QuantizeParts(), "its limits are narrower")


def test_a_clip_that_cuts_deeper_stays_around_the_concatenation() -> None:
    found = graph(f"{CONCAT} p = Clip(c, low, high) {PAIR}", low=-1)
    assert_refused(found, QuantizeParts(), "its limits are narrower")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (f"p = Clip(a, low, ) {PAIR}", "its bounds or the scale are not known"),
        (f"p = Clip(a, , high) {PAIR}", "its bounds or the scale are not known"),
        (f"p = Clip(a, low, t) {PAIR}", "its bounds are computed"),
        (
            "p = Clip(a, low, high) q = QuantizeLinear(p, t, z) y = DequantizeLinear(q, t, z)",
            "its bounds or the scale are not known",
        ),
        (
            "p = Clip(a, low, high) q = QuantizeLinear(p, s) y = DequantizeLinear(q, s)",
            "its bounds or the scale are not known",
        ),
    ],
)
def test_refuses_a_clip_of_unknown_effect(body: str, reason: str) -> None:
    assert_refused(graph(body, "float[N,4] y"), QuantizeParts(), reason)


BRANCHES = """i = If (k) <
    then_branch = yes () => (float[N,6] u) { u = Neg(p) },
    else_branch = no () => (float[N,6] v) { v = Abs(p) }
>"""


@pytest.mark.parametrize(
    ("body", "results"),
    [
        ("", "float[N,6] y, float[N,6] p"),
        ("n = Neg(p)", "float[N,6] y, float[N,6] n"),
        (BRANCHES, "float[N,6] y, float[N,6] i"),
        ("", "float[N,6] y, uint8[N,6] q"),
    ],
    ids=["an output", "a reader", "a subgraph", "integers are an output"],
)
def test_refuses_what_is_visible_elsewhere(body: str, results: str) -> None:
    found = graph(f"{CONCAT.replace('c =', 'p =')} {PAIR} {body}", results)
    assert_refused(found, QuantizeParts(), "used elsewhere")


def test_a_clip_that_others_read_stays_and_nothing_is_said() -> None:
    """There is nothing to move: the quantizer reads no concatenation."""
    found = graph(f"p = Clip(a, low, high) {PAIR}", "float[N,4] y, float[N,4] p")
    assert run_pass(found, QuantizeParts()).skips == []
    check(found, "CHECK: QuantizeLinear(%p, @s")


def test_refuses_scales_per_axis() -> None:
    scale, zero = np.full(6, STEP, np.float32), np.full(6, ZERO, np.uint8)
    pair = "q = QuantizeLinear<axis = -1>(p, s, z) y = DequantizeLinear<axis = -1>(q, s, z)"
    found = graph(f"{CONCAT.replace('c =', 'p =')} {pair}", scale=scale, zero=zero)
    assert_refused(found, QuantizeParts(), "its scales are per channel")


def test_other_quantizers_are_no_refusal() -> None:
    for body in (PAIR.replace("(p,", "(a,"), f"p = Relu(a) {PAIR}"):
        found = graph(body, "float[N,4] y")
        assert run_pass(found, QuantizeParts(), ctx=context()).skips == []
