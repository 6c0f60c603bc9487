"""Which names of dimensions are constraints: those whose equal sizes the operators enforce.

A name that several axes of a model's inputs share is a remark of its exporter. The runtime only
warns about different sizes: scripts call all open dimensions "None", and the past of a decoder may
have length 0 where its declaration repeats the encoder's length. But whatever is inferred from
shapes takes equal names for equal sizes, in ONNX Runtime too, which reuses buffers ("Shape mismatch
attempting to re-use buffer"). So an axis keeps a shared name only if operators refuse any other
size there; a size of one is let pass by broadcasting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

from qcompile.errors import ModelError
from qcompile.ir import Graph, Tensor, is_onnx_domain
from qcompile.ir.analysis.constant_evaluation import Evaluator
from qcompile.ir.analysis.shape_probing import shapes_of
from qcompile.ir.model_io.to_proto import skeleton
from qcompile.ir.subgraph import subgraphs

# Sizes of dimensions: the first, and so many more for each other, times a factor for models that
# take no odd numbers. All are 5 modulo 6, so that 2 less is no other dimension's size.
_FACTORS = (1, 32)
_FIRST, _STEP, _LESS = 11, 6, 2
OWN = "#"  # between a name and the number that makes it another
_OPAQUE = "qcompile.opaque"  # the domain of nodes that inference passes over
_PREFIX = 128  # nodes to try first: most models compare their inputs early


@dataclass(frozen=True)
class _Axis:
    """One axis of a graph input, with the name that it shares."""

    owner: int
    axis: int
    name: str


def separate_names(graph: Graph, evaluate: Evaluator) -> list[str]:
    """Rename open dimensions of the graph's inputs that are not proved to have the size of others
    of their name; returns the names that were no constraints, sorted.

    A name of its own is the old one with a number, ``batch#0``, also in what is written. Where
    nothing can be proved, an exporter is believed, but for names that one input repeats: if no
    sizes are found that the model takes, or some operators are unknown to shape inference.
    """
    free = _shared(graph)
    known = all(is_onnx_domain(n) for n in graph.nodes)
    for length in (n for n in (_PREFIX, len(graph.nodes)) if free):
        factor = next((f for f in _FACTORS if _fits(graph, evaluate, f, length)), None)
        if factor is not None:
            free = [a for a in free if _fits(graph, evaluate, factor, length, a)]
        known &= factor is not None
    if not known:
        free = [a for a in free if _is_repeated(free, a)]
    _rename(graph, free)
    return sorted({a.name for a in free})


def _shared(graph: Graph) -> list[_Axis]:
    """All axes whose name another axis has too."""
    found = [
        _Axis(i, k, dim)
        for i, tensor in enumerate(graph.inputs)
        for k, dim in enumerate(tensor.shape or ())
        if isinstance(dim, str) and dim
    ]
    counts = Counter(a.name for a in found)
    return [a for a in found if counts[a.name] > 1]


def _is_repeated(axes: Sequence[_Axis], axis: _Axis) -> bool:
    """True where one input has the name on several axes."""
    return sum((a.owner, a.name) == (axis.owner, axis.name) for a in axes) > 1


def _sizes(graph: Graph, factor: int) -> dict[str, int]:
    """Sizes by name of dimension, all different; ``a + b`` is the sum of both."""
    dims = (d for t in graph.inputs for d in t.shape or () if isinstance(d, str) and d)
    names = list(dict.fromkeys(dims))
    sizes = {name: (_FIRST + _STEP * i) * factor for i, name in enumerate(names)}
    return {name: _sum(name, sizes) or size for name, size in sizes.items()}


def _sum(name: str, sizes: Mapping[str, int]) -> int | None:
    parts = [part.strip() for part in name.split("+")]
    known = [int(p) if p.isdigit() else sizes.get(p) for p in parts]
    return None if len(parts) < 2 or None in known else sum(n for n in known if n is not None)


def _fits(
    graph: Graph, evaluate: Evaluator, factor: int, length: int, changed: _Axis | None = None
) -> bool:
    """True where the first so many operators take sizes of the inputs, that of one axis changed."""
    model = skeleton(graph)
    sizes = _sizes(graph, factor)
    _set_sizes(model, graph, sizes)
    if changed is not None:
        dims = model.graph.input[changed.owner].type.tensor_type.shape.dim
        dims[changed.axis].dim_value = sizes[changed.name] - _LESS * factor
    _hide_subgraphs(model, graph)
    if length < len(graph.nodes):
        _cut(model.graph, length)
    try:
        shapes_of(model, evaluate, strict=True)
    except ModelError:
        return False
    return True


def _set_sizes(model: onnx.ModelProto, graph: Graph, sizes: Mapping[str, int]) -> None:
    unnamed = max(sizes.values())
    for info, tensor in zip(model.graph.input, graph.inputs, strict=False):
        for dim, declared in zip(info.type.tensor_type.shape.dim, tensor.shape or (), strict=False):
            if isinstance(declared, str) and declared in sizes:
                dim.dim_value = sizes[declared]
            elif not dim.HasField("dim_value"):
                unnamed += _STEP
                dim.dim_value = unnamed


def _hide_subgraphs(model: onnx.ModelProto, graph: Graph) -> None:
    """Make nodes with bodies opaque: which of the bodies run depends on the data."""
    for proto, node in zip(model.graph.node, graph.nodes, strict=True):
        bodies = list(subgraphs(node))
        if bodies:
            proto.domain = _OPAQUE
            del proto.attribute[:]
            proto.input.extend(name for body in bodies for name in body.reads)
    model.opset_import.append(onnx.helper.make_opsetid(_OPAQUE, 1))


def _cut(proto: onnx.GraphProto, length: int) -> None:
    """Keep so many nodes; what no other of them reads becomes the outputs."""
    del proto.node[length:], proto.output[:]
    read = {name for node in proto.node for name in node.input}
    made = (name for node in proto.node for name in node.output)
    proto.output.extend(onnx.ValueInfoProto(name=n) for n in made if n and n not in read)


def _rename(graph: Graph, free: Sequence[_Axis]) -> None:
    """Give these axes names of their own. Outputs have none of the names any more."""
    inputs = graph.inputs
    for number, axis in enumerate(free):
        tensor, name = inputs[axis.owner], f"{axis.name}{OWN}{number}"
        tensor.shape = [name if i == axis.axis else d for i, d in enumerate(tensor.shape)]
        _declared(graph, tensor)[axis.axis].dim_param = name
    gone = {a.name for a in free}
    for output in graph.outputs:
        if output.shape is not None:
            output.shape = [None if d in gone else d for d in output.shape]
        for dim in _declared(graph, output):
            if dim.dim_param in gone:
                dim.Clear()


def _declared(graph: Graph, tensor: Tensor) -> Sequence[onnx.TensorShapeProto.Dimension]:
    """The dimensions of an input or output as they are declared; none if it was added."""
    info = graph.header.interface.get(tensor.name, onnx.ValueInfoProto())
    return info.type.tensor_type.shape.dim if info.type.HasField("tensor_type") else ()


def base_name(dim: str) -> str:
    """The name that a dimension had before it got one of its own."""
    base, _, number = dim.rpartition(OWN)
    return base if base and number.isdigit() else dim
