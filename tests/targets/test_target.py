"""Target tables: what they claim is spelled right, and asked for by operator and mode."""

from __future__ import annotations

import onnx
import pytest

from qcompile.planning.context import MODES
from qcompile.rewriting.pipeline_spec import parse
from qcompile.rewriting.registry import targets
from qcompile.targets.cpu import CPU
from qcompile.targets.qdq import QDQ
from qcompile.targets.target import Target


@pytest.mark.parametrize("target", targets().values(), ids=targets())
def test_tables_name_what_exists(target: Target) -> None:
    assert set(target.modes) <= set(MODES)
    assert set(target.lower) == set(target.modes)
    ops = [r.op for r in (*target.rules, *target.weight_only)]
    for op in (*ops, *target.float_ops, *(op for d, op, _ in target.gelu if not d)):
        assert "." in op or onnx.defs.has(op) or op in ("FastGelu", "Gelu"), op
    for rule in (*target.rules, *target.weight_only):
        assert not rule.min_bytes or rule.small
    for specs in filter(None, (*target.transform.values(), *target.lower.values())):
        assert len(parse(",".join(specs))) == len(specs)


@pytest.mark.parametrize("target", targets().values(), ids=targets())
def test_default_modes_exist_and_missing_ones_have_a_reason(target: Target) -> None:
    assert target.with_data in target.modes
    assert target.without_data is None or target.without_data in target.modes
    assert not set(target.no_modes) & set(target.modes)
    assert target is QDQ or {*target.modes, *target.no_modes} >= {*MODES}


def test_rules_by_operator_and_mode() -> None:
    static, bare = CPU.rule("MatMul", "static"), CPU.rule("MatMul", "weight-only")
    assert static is not None and static.activation is not None
    assert bare is not None and bare.activation is None
    assert CPU.rule("Softmax", "static") is None
    assert QDQ.rule("Softmax", "static") is not None
    assert QDQ.rule("Softmax", "weight-only") is None
