"""Which tensors carry the model's data, and which only shapes, indices or masks.

The data path starts at float graph inputs, embedding lookups and matrix multiplications by float
weights, at lookups in packed tables, and follows every operator. A mask computed from integers by
Cast, Sub and Mul is not on it: tools that quantize that arithmetic get Gather indices out of range
and NaN zero points.
"""

from __future__ import annotations

import numpy as np

from qcompile.ir import (
    Graph,
    Node,
    Tensor,
    array,
    half_type,
    is_constant,
    is_float,
    is_layout,
    is_op,
    rank,
)
from qcompile.ir.graph import has_subgraph, reads
from qcompile.ir.operators import CONVOLUTIONS, MASKING, MATMULS, MOVERS, RANDOM

MASK = "attention_mask"  # the input that marks padding, by the convention of transformers
_WEIGHTED = (*MATMULS, *CONVOLUTIONS, "Gather", "Gemm", "com.microsoft.GatherBlockQuantized")
# Masking constants: float32's and float16's lowest, and the round numbers exporters choose.
_MASK_VALUE = 1e4


def data_path(graph: Graph, *, halves: bool = False, dequantized: bool = False) -> set[str]:
    """Names of float32 tensors that carry data; ``halves``: of 16-bit floats too.

    ``dequantized``: results of DequantizeLinear carry data too, also those of weights.
    """

    def counts(tensor: Tensor) -> bool:
        return is_float(tensor) or (halves and half_type(tensor) is not None)

    found = {t.name for t in graph.inputs if counts(t) and "mask" not in t.name.lower()}
    for node in graph.nodes:
        weights = (t for t in node.inputs if is_constant(t) and (rank(t) or 0) >= 2)
        starts = is_op(node, *_WEIGHTED) and any(map(counts, weights))
        starts |= dequantized and is_op(node, "DequantizeLinear")
        if starts or any(name in found for name in reads(node)):  # in its body too
            found |= {t.name for t in node.outputs if counts(t)}
    return found


def is_masking(node: Node, path: set[str]) -> bool:
    """True where a node combines data with a mask: a computed operand off the path, or a constant
    with huge values.
    """
    if not is_op(node, *MASKING):
        return False
    for tensor in node.inputs:
        if is_constant(tensor):
            values = array(tensor) if is_float(tensor) else np.zeros(1)
            if values.size and float(np.abs(values).max()) >= _MASK_VALUE:
                return True
        elif tensor.name and tensor.name not in path:
            return True
    return False


def layout_root(graph: Graph, tensor: Tensor) -> Tensor:
    """The tensor with the same values before all layout operators."""
    while (node := graph.producer(tensor)) is not None and is_layout(node):
        if is_constant(node.inputs[0]):
            break
        tensor = node.inputs[0]
    return tensor


def aliases(graph: Graph, tensor: Tensor) -> tuple[list[str], list[str]]:
    """Names for a tensor's values: of tensors, and of nodes.

    Tensors: itself, and results of layout operators on it. Nodes: its producer, and all readers of
    these tensors.
    """
    maker = graph.producer(tensor)
    nodes = [] if maker is None else [maker.name]
    tensors: list[str] = []
    waiting = [tensor]
    while waiting:
        current = waiting.pop()
        tensors.append(current.name)
        for node in graph.consumers(current):
            nodes.append(node.name)
            if is_layout(node):
                waiting += node.outputs
    return tensors, nodes


def movers_before(graph: Graph, tensor: Tensor, also: tuple[str, ...] = ()) -> list[Node]:
    """Layout operators before a tensor, nearest first, whose results have no other reader.

    Only those that accept 8-bit tensors and have no operand whose meaning depends on the type;
    ``also`` names more.
    """
    chain: list[Node] = []
    while graph.only_consumer(tensor) is not None:
        node = graph.producer(tensor)
        if node is None or not is_op(node, *MOVERS, *also) or is_constant(node.inputs[0]):
            break
        if any(t.name for t in node.outputs[1:]):
            break
        chain.append(node)
        tensor = node.inputs[0]
    return chain


def derived_from(graph: Graph, name: str) -> set[str]:
    """The tensors computed only from one graph input, constants and shapes, and itself."""
    found, shapes = {name}, set[str]()
    for node in graph.nodes:
        data = [t.name for t in node.inputs if t.name and not is_constant(t)]
        if is_op(node, "Shape", "Size") or all(n in shapes for n in data):
            shapes |= {t.name for t in node.outputs}
        elif all(n in shapes or n in found for n in data):
            found |= {t.name for t in node.outputs}
    return found


def of_shapes(graph: Graph) -> set[str]:
    """The computed tensors whose values depend on nothing but shapes: those of positions, say.

    Results of nodes with bodies and of random operators are left out.
    """
    found: set[str] = set()
    for node in graph.nodes:
        if has_subgraph(node) or is_op(node, *RANDOM):
            continue
        computed = (t.name for t in node.inputs if t.name and not is_constant(t))
        if is_op(node, "Shape", "Size") or found.issuperset(computed):
            found |= {t.name for t in node.outputs}
    return found
