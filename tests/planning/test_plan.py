"""Plans join what is decided alike; ranges are found or have a reason."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.planning import Decision, Plan, Use
from qcompile.quant import ChannelStats, QSpec, Range, Ranges, StatRequest
from qcompile.rewriting.testing import context

UINT8 = QSpec("uint8", symmetric=False)
INT8 = QSpec("int8", symmetric=True, granularity="channel", axis=1)


def decision(tensor: str, *uses: Use, spec: QSpec | None = UINT8) -> Decision:
    return Decision(tensor, "activation", spec, "because", uses)


def test_uses_of_one_tensor_are_joined_once_each() -> None:
    plan = Plan()
    q, k = Use("q", 0), Use("k", 0)
    for uses in ((q,), (k,), (q, k)):
        plan.decide(decision("x", *uses))
    assert plan.decisions == [decision("x", q, k)]


def test_leading_axes_of_a_stack_are_rows() -> None:
    stack = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2)
    for stacked, shape in ((0, (2, 3, 2, 2)), (1, (2, 12)), (2, (6, 4)), (3, (12, 2))):
        one = Decision("w", "weight", INT8, "because", (Use("a", 1),), stacked=stacked)
        assert one.quantized_view(stack).shape == shape
        assert one.quantized_view(stack).reshape(-1).tolist() == list(range(24))


def test_one_weight_seen_in_two_shapes_is_two_decisions() -> None:
    plan = Plan()
    made = [
        Decision("w", "weight", INT8, "because", (Use(f"n{stacked}", 1),), stacked=stacked)
        for stacked in (1, 2)
    ]
    for one in made:
        plan.decide(one)
    assert plan.decisions == made


def test_other_specs_kinds_and_tensors_stay_apart() -> None:
    plan = Plan()
    made = [
        decision("x", Use("a", 0)),
        decision("x", Use("b", 0), spec=INT8),
        decision("x", Use("c", 0), spec=None),
        decision("y", Use("d", 0)),
        Decision("x", "weight", UINT8, "because", (Use("e", 1),)),
    ]
    for item in made:
        plan.decide(item)
    assert plan.decisions == made
    assert [d.uses[0].node for d in plan.quantized()] == ["a", "b", "d", "e"]
    assert [d.uses[0].node for d in plan.quantized("weight")] == ["e"]


def test_a_released_node_stays_float_and_other_readers_keep_their_decision() -> None:
    plan = Plan([decision("x", Use("a", 0)), decision("y", Use("a", 1), Use("b", 0))])
    plan.release("a", "no range")
    assert [(d.tensor, d.spec, d.uses, d.reason) for d in plan.decisions] == [
        ("x", None, (Use("a", 0),), "no range"),
        ("y", UINT8, (Use("b", 0),), "because"),
        ("y", None, (Use("a", 1),), "no range"),
    ]


def test_requests_know_their_axis() -> None:
    assert (StatRequest("x", UINT8).axis, StatRequest("x", INT8).axis) == (None, 1)


def test_ranges_are_set_found_and_dropped() -> None:
    ranges, span = Ranges(), Range(np.array(0.0), np.array(1.0))
    ranges.set("x", span)
    assert ranges.get("x") is span
    ranges.drop("x")
    ranges.drop("never there")
    assert ranges.get("x") is None


# What transforms do to it ---------------------------------------------------------------------


def test_moved_uses_take_their_decision_with_them() -> None:
    plan = Plan([decision("x", Use("q", 0), Use("k", 0)), decision("y", Use("r", 0))])
    plan.move((Use("q", 0),), "x/scaled")
    assert plan.decisions == [
        decision("x", Use("k", 0)),
        decision("y", Use("r", 0)),
        decision("x/scaled", Use("q", 0)),
    ]


def test_a_decision_whose_uses_all_move_is_gone() -> None:
    plan = Plan([decision("x", Use("q", 0), Use("k", 0))])
    plan.move((Use("k", 0), Use("q", 0)), "z")
    assert plan.decisions == [decision("z", Use("q", 0), Use("k", 0))]


def test_uses_that_move_to_one_tensor_are_joined() -> None:
    plan = Plan([decision("x", Use("q", 0)), decision("y", Use("k", 0))])
    plan.move((Use("q", 0),), "z")
    plan.move((Use("k", 0),), "z")
    assert plan.decisions == [decision("z", Use("q", 0), Use("k", 0))]


def test_renamed_tensors_keep_what_was_decided() -> None:
    plan = Plan([decision("x", Use("q", 0)), decision("y", Use("k", 0))])
    plan.rename("x", "z")
    assert [d.tensor for d in plan.decisions] == ["z", "y"]


def test_uses_that_become_integers_after_all_are_no_floats_any_more() -> None:
    plan = Plan()
    first, second = Use("a", 0), Use("a", 1)
    plan.decide(decision("x", first, second, spec=None))
    plan.decide(decision("y", first))
    plan.claim((first,))
    assert plan.decisions == [decision("x", second, spec=None), decision("y", first)]
    plan.claim((second,))
    assert plan.decisions == [decision("y", first)]


def test_the_maker_of_a_tensor_is_known_whoever_decides_first() -> None:
    plan = Plan()
    plan.decide(decision("x", Use("a", 0)))
    plan.decide(Decision("x", "activation", UINT8, "because", (Use("b", 0),), "conv"))
    assert [d.maker for d in plan.decisions] == ["conv"]


def test_a_decision_is_replaced_where_it_stands() -> None:
    plan = Plan([decision("x", Use("q", 0)), decision("y", Use("k", 0))])
    plan.replace(decision("x", Use("q", 0)), spec=INT8)
    assert plan.decisions == [decision("x", Use("q", 0), spec=INT8), decision("y", Use("k", 0))]
    with pytest.raises(ValueError, match="not in list"):
        plan.replace(decision("x", Use("q", 0)), spec=None)


def test_without_activations_weights_are_left() -> None:
    weight = Decision("w", "weight", INT8, "because", (Use("q", 1),))
    plan = Plan([decision("x", Use("q", 0)), weight])
    plan.drop_activations()
    assert plan.decisions == [weight]


@pytest.mark.parametrize("same_channels", [True, False])
def test_what_is_known_follows_a_tensor_to_its_new_name(same_channels: bool) -> None:
    ctx, ends = context(), np.zeros(2, np.float32)
    stats = ChannelStats(ends, ends, np.zeros((0, 2), np.float32))
    for name, axis in (("whole", None), ("by channel", -1)):
        low = np.array(0.0) if axis is None else ends
        ctx.plan.decide(decision(name, Use(name, 0)))
        ctx.ranges.set(name, Range(low, low + 1, axis))
        ctx.channels[name] = stats
        ctx.rename(name, f"{name}/new", same_channels=same_channels)
    ctx.ranges.missing["never run"] = "no values seen"
    ctx.rename("never run", "never run/new", same_channels=same_channels)
    new = {f"{name}/new" for name in ("whole", "by channel")}
    assert {d.tensor for d in ctx.plan.decisions} == new
    assert new & {*ctx.ranges.found} == (new if same_channels else {"whole/new"})
    assert new & {*ctx.channels} == (new if same_channels else set())
    assert ctx.ranges.missing["never run/new"] == "no values seen"
