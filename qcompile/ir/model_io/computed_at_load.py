"""Which tensors of a model do not depend on its inputs, and from which constants they come.

ONNX Runtime computes such tensors once, when it loads the model: weights that are stored packed or
transposed are constants in a run.
Source: ONNX Runtime constant_folding.cc.
"""

from __future__ import annotations

import math

import onnx

from qcompile.ir.operators import is_op
from qcompile.ir.subgraph import bodies

# Operators that it runs in each call, also on constants.
_KEPT = (
    "Bernoulli", "DequantizeLinear", "Multinomial", "QuantizeLinear", "RandomNormal",
    "RandomNormalLike", "RandomUniform", "RandomUniformLike",
)  # fmt: skip


def sources(graph: onnx.GraphProto) -> dict[str, tuple[str, ...]]:
    """For each tensor that is a constant in a run: the constants that it comes from, by name.

    The one with the most elements is first: that of a packed weight holds its codes. A constant
    comes from itself. Initializers that are also inputs are left out: a feed may replace them. So
    are the results of Constant nodes, and what comes from them alone.
    """
    inputs = {value.name for value in graph.input}
    sizes = {t.name: math.prod(t.dims) for t in graph.initializer if t.name not in inputs}
    found: dict[str, tuple[str, ...]] = {name: (name,) for name in sizes}
    for node in graph.node:
        names = [name for name in node.input if name]
        if is_op(node, "Constant"):
            found[node.output[0]] = ()
        if not names or is_op(node, *_KEPT) or any(True for _ in bodies(node)):
            continue
        if all(name in found for name in names):
            merged = dict.fromkeys(source for name in names for source in found[name])
            ordered = tuple(sorted(merged, key=lambda name: -sizes[name]))
            found |= dict.fromkeys(filter(None, node.output), ordered)
    return {name: names for name, names in found.items() if names}
