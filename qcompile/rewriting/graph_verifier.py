"""What must hold for a graph and a plan between any two passes.

Needed because graphsurgeon exports duplicate names and dangling inputs without an error.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest

import numpy as np
import onnx

from qcompile.errors import InvariantError
from qcompile.ir import Graph, Node, Tensor, array, domain_of, is_constant, is_op, is_zero
from qcompile.ir.graph import reads
from qcompile.ir.quantized_operators import QDQ
from qcompile.planning import Context

# Operators that ONNX Runtime knew in ONNX's own domain before ONNX did, with the same meaning.
_OLDER = ("LayerNormalization",)


def verify_graph(graph: Graph, ctx: Context | None = None) -> None:
    """Run every check. Raises InvariantError naming check, node and tensor."""
    for rule in GRAPH_CHECKS:
        rule(graph)
    if ctx is not None:
        plan_refers_to_live_tensors(graph, ctx)


def names_are_unique(graph: Graph) -> None:
    """Each tensor has one producer and each name one tensor; node names are unique."""
    owners: dict[str, Tensor] = {}
    for node in graph.nodes:
        for tensor in (*node.inputs, *node.outputs):
            if tensor.name and owners.setdefault(tensor.name, tensor) is not tensor:
                raise InvariantError(
                    f"names-are-unique: node {node.name!r} refers to a second tensor "
                    f"called {tensor.name!r}"
                )
    made: set[str] = set()
    nodes: set[str] = set()
    for node in graph.nodes:
        if node.name in nodes:
            raise InvariantError(f"names-are-unique: two nodes are called {node.name!r}")
        nodes.add(node.name)
        for tensor in node.outputs:
            if tensor.name and tensor.name in made:
                raise InvariantError(f"names-are-unique: tensor {tensor.name!r} is made twice")
            made.add(tensor.name)


def inputs_come_first(graph: Graph) -> None:
    """No dangling input, and nodes stand in topological order."""
    known = {t.name for t in graph.inputs} | set(graph.constants())
    for node in graph.nodes:
        for name in reads(node):
            if name not in known:
                raise InvariantError(
                    f"inputs-come-first: node {node.name!r} ({node.op}) reads tensor {name!r}, "
                    "produced later or not at all"
                )
        known |= {t.name for t in node.outputs}
    for tensor in graph.outputs:
        if tensor.name not in known:
            raise InvariantError(
                f"inputs-come-first: output {tensor.name!r} is not produced by any node"
            )


def operators_exist(graph: Graph) -> None:
    """Each standard operator exists in the declared opset, each domain is imported."""
    domains = graph.domains()
    local = {(f.domain or "", f.name) for f in graph.functions}
    for node in graph.nodes:
        domain = domain_of(node)
        if domain not in domains:
            raise InvariantError(
                f"operators-exist: node {node.name!r} needs domain {domain!r}, not imported"
            )
        if domain == "" and ("", node.op) not in local and node.op not in _OLDER:
            _check_schema(node, domains[""])


def _check_schema(node: Node, opset: int) -> None:
    try:
        schema = onnx.defs.get_schema(node.op, min(opset, onnx.defs.onnx_opset_version()))
    except onnx.defs.SchemaError:
        # ONNX Runtime registers a few contrib operators in ONNX's own domain; its old exporters
        # wrote them. Only a newer ONNX operator is a certain fault.
        try:
            newer = onnx.defs.get_schema(node.op)
        except onnx.defs.SchemaError:
            return
        raise InvariantError(
            f"operators-exist: node {node.name!r} uses {node.op}, new in opset "
            f"{newer.since_version}, but the model declares opset {opset}"
        ) from None
    if len(node.inputs) > schema.max_input:
        raise InvariantError(
            f"operators-exist: node {node.name!r} gives {node.op} {len(node.inputs)} inputs, "
            f"at most {schema.max_input} expected"
        )


def quantizers_are_sound(graph: Graph) -> None:
    """Scales are positive and finite; scale and zero point have one shape."""
    for node in graph.nodes:
        if not is_op(node, *QDQ) or not is_constant(node.inputs[1]):
            continue
        scale = array(node.inputs[1])
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            raise InvariantError(
                f"quantizers-are-sound: scale of node {node.name!r} is not positive and finite"
            )
        if len(node.inputs) > 2 and is_constant(node.inputs[2]):
            zero = array(node.inputs[2])
            if zero.shape != scale.shape and not zero.size == scale.size == 1:
                raise InvariantError(
                    f"quantizers-are-sound: node {node.name!r} has scale {scale.shape} "
                    f"but zero point {zero.shape}"
                )


def pairs_agree(graph: Graph) -> None:
    """A DequantizeLinear that reads a QuantizeLinear has the same scale and zero point."""
    for node in graph.nodes:
        if not is_op(node, "DequantizeLinear"):
            continue
        maker = graph.producer(node.inputs[0])
        if maker is None or not is_op(maker, "QuantizeLinear"):
            continue
        for mine, its in zip_longest(node.inputs[1:], maker.inputs[1:]):
            if not _same(mine, its):
                names = [None if t is None else t.name for t in (mine, its)]
                raise InvariantError(
                    f"pairs-agree: {node.name!r} and {maker.name!r} differ: {names[0]!r} and "
                    f"{names[1]!r}"
                )


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:  # a zero point left out is 0
        return all(t is None or is_zero(t) for t in (a, b))
    if a is b or a.name == b.name:
        return True
    return is_constant(a) and is_constant(b) and bool(np.array_equal(array(a), array(b)))


GRAPH_CHECKS: tuple[Callable[[Graph], None], ...] = (
    names_are_unique,
    inputs_come_first,
    operators_exist,
    quantizers_are_sound,
    pairs_agree,
)


def plan_refers_to_live_tensors(graph: Graph, ctx: Context) -> None:
    """Until insertion, each planned use exists and reads the planned tensor."""
    nodes = {n.name: n for n in graph.nodes}
    for decision in ctx.plan.quantized():
        for use in decision.uses:
            node = nodes.get(use.node)
            if node is None or use.index >= len(node.inputs):
                raise InvariantError(
                    f"plan: tensor {decision.tensor!r} is planned for input {use.index} of node "
                    f"{use.node!r}, which is gone"
                )
            found = node.inputs[use.index].name
            if found != decision.tensor:
                raise InvariantError(
                    f"plan: input {use.index} of node {use.node!r} is {found!r}, "
                    f"expected {decision.tensor!r}"
                )
