"""Which operators take float16 by their definitions, and targets without float16."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.errors import TargetError
from qcompile.quant import Array
from qcompile.rewriting.registry import targets
from qcompile.rewriting.testing import normal, parse
from qcompile.targets.half_types import DefinedTypes
from qcompile.targets.target import Target


def takes(body: str, opset: int, index: int = 0) -> bool:
    zero, scale = np.array(0, np.int8), np.array(0.1, np.float32)
    known: dict[str, Array] = {"z": zero, "s": scale, "w": normal(4, 4)}
    read = {
        name: value for name, value in known.items() if f"{name}," in body or f"{name})" in body
    }
    graph = parse(f"g (float[N,4] x) => (float[N,4] y) {{ {body} }}", opset, **read)
    return DefinedTypes().takes(graph.nodes[0], opset, index, "f16")


def test_by_operator_opset_and_input() -> None:
    assert takes("y = MatMul(x, w)", 17, 1)
    assert takes("q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)", 19, 1)
    assert not takes("q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)", 17, 1)
    assert takes("y = Sum(x, x, x)", 17, 2)  # variadic
    assert not takes("y = com.microsoft.FastGelu(x)", 17)


def test_unknown_operators_take_nothing() -> None:
    node = parse("g (float[N] x) => (float[N] y) { y = Relu(x) }").nodes[0]
    node.op = "Unknown"
    assert not DefinedTypes().takes(node, 17, 0, "f16")


@pytest.mark.parametrize("target", targets().values(), ids=targets())
def test_float16_or_the_reason_why_not(target: Target) -> None:
    assert (target.half_form is None) == bool(target.no_half)
    if target.half_form is not None and target.half_form.lower:
        assert set(target.half_form.lower) == set(target.modes)
        rules = [*target.in_float16().rules, *target.in_float16().weight_only]
        specs = [s for r in rules for s in (r.activation, r.weight, r.output, r.right) if s]
        assert specs and all(spec.half_scale for spec in specs)


def test_cpu_is_refused_in_one_line() -> None:
    message = (
        r"target 'cpu' has no float16 \(ONNX Runtime's CPU .*\): leave out --float16, or choose"
    )
    with pytest.raises(TargetError, match=message):
        targets()["cpu"].in_float16()


def test_cuda_computes_in_float16_anyway() -> None:
    assert targets()["cuda"].in_float16() is targets()["cuda"]
