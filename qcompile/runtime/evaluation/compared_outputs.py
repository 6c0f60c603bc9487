"""Compares two models that select by their values: boxes by NonMaxSuppression, rows by TopK.

Models that are close may still select different rows, so that what follows has other shapes or
another order. Therefore the tensors that decide are compared in front of the selection, and the
candidate selects by those of the reference: both select the same, and everything that follows is
compared on the same rows.

    reference:  … → scores → NonMaxSuppression → …           scores is an output too
    candidate:  … → scores/own        scores/fed → NonMaxSuppression → …
                    is an output      is an input: the reference's scores

Selections by integers and masks alone are the same in both models and are left as they are.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import onnx

from qcompile.data.feeds import Feed
from qcompile.ir import Graph, Node, Tensor, is_op
from qcompile.ir.analysis import shape_inference
from qcompile.ir.analysis.data_path import data_path
from qcompile.ir.graph import reads
from qcompile.ir.model_io import read_model, write_model
from qcompile.ir.model_io.node_proto import element_type
from qcompile.ir.model_io.read_model import Source
from qcompile.ir.model_io.write_model import ModelFiles
from qcompile.ir.operators import op_name
from qcompile.ir.subgraph import bodies, subgraphs
from qcompile.quant import Array

# Operators whose result has as many rows as the values of these operands say.
_SELECTORS = {"Compress": (1,), "NonMaxSuppression": (0, 1), "NonZero": (0,), "Unique": (0,)}
# Operands whose values are sizes, counts or positions in the result.
_SIZES = {
    "CenterCropPad": (1,), "ConstantOfShape": (0,), "Expand": (1,), "If": (0,), "Loop": (0, 1),
    "OneHot": (1,), "Pad": (1,), "Range": (0, 1, 2), "Reshape": (1,), "Resize": (2, 3),
    "Slice": (1, 2, 3, 4), "Split": (1,), "SplitToSequence": (1,), "Tile": (1,), "TopK": (1,),
    "Upsample": (1,),
}  # fmt: skip
_PICKS = ("Gather", "GatherElements", "GatherND")  # by the indices in operand 1
_OWN, _FED = "/own", "/fed"


@dataclass(frozen=True)
class Selection:
    """Where a model selects by computed values.

    ``nodes``: the operators that select. ``deciding``: the float tensors nearest to them.
    ``before``: for each float tensor, those that it is computed from. ``readers``: the operands
    that it is, as node and index, those that lead to a selection first. ``types``: element types.
    """

    nodes: tuple[str, ...]
    deciding: tuple[str, ...]
    before: Mapping[str, tuple[str, ...]]
    readers: Mapping[str, tuple[tuple[str, int], ...]]
    types: Mapping[str, int]

    def places(self, candidate: Graph) -> dict[str, str]:
        """The deciding tensors, and what they are called in the candidate.

        In place of one that it does not have, the nearest ones in front of it.
        """
        nodes = {n.name: n for n in candidate.nodes}
        made = {t.name: t for n in candidate.nodes for t in n.outputs}
        found: dict[str, str] = {}
        waiting, seen = list(reversed(self.deciding)), set[str]()
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            place = self._place(name, nodes, made)
            if place is None:
                waiting += reversed(self.before[name])
            else:
                found[name] = place
        return found

    def _place(
        self, name: str, nodes: Mapping[str, Node], made: Mapping[str, Tensor]
    ) -> str | None:
        """What the same operand reads in the candidate, or a tensor with the same name.

        The operand first: a quantizer between the two would round what is fed.
        """
        operands = ((nodes[node], i) for node, i in self.readers[name] if node in nodes)
        read = (str(node.inputs[i].name) for node, i in operands if i < len(node.inputs))
        for other in (*read, name):
            tensor = made.get(other)
            if tensor is not None and _is_floating(tensor):
                return other
        return None


def find_selection(graph: Graph) -> Selection | None:
    """Where a float model selects by values that quantization may change; None for nowhere."""
    values = _Values(graph)
    chosen = {n.name: (n, slots) for n in graph.nodes if (slots := list(values.selecting(n)))}
    if not chosen:
        return None
    deciding = (t for node, names in chosen.values() for name in names for t in values.floats(name))
    floats = [t for t in graph.tensors().values() if t.name in values.found and _is_floating(t)]
    return Selection(
        tuple(f"{node.op} {node.name!r}" for node, _ in chosen.values()),
        tuple(dict.fromkeys(deciding)),
        {t.name: tuple(values.floats_before(t.name)) for t in floats},
        {t.name: tuple(_readers(graph, t, chosen)) for t in floats},
        {t.name: element_type(t.dtype) for t in floats},
    )


class _Values:
    """``found``: names of tensors whose values depend on floats that are computed.

    ``picks``: those of them that are positions found by a TopK, with its data.
    """

    def __init__(self, graph: Graph) -> None:
        self.makers = {t.name: n for n in graph.nodes for t in n.outputs if t.name}
        self.tensors = graph.tensors()
        self.found: set[str] = set()
        self.picks: dict[str, str] = {}
        path = data_path(graph, halves=True)
        for node in graph.nodes:
            if is_op(node, "Shape", "Size"):
                continue  # the same where the selections are
            outs = [t for t in node.outputs if t.name]
            if any(name in self.found for name in reads(node)):
                self.found |= {t.name for t in outs}
            self.found |= {t.name for t in outs if t.name in path}
            self._follow_picks(node)

    def _follow_picks(self, node: Node) -> None:
        if is_op(node, "TopK") and node.inputs[0].name in self.found:
            self.picks |= {t.name: node.inputs[0].name for t in node.outputs[1:]}
        source = next((self.picks[t.name] for t in node.inputs if t.name in self.picks), None)
        if source is not None and not is_op(node, "Shape", "Size"):
            self.picks |= {t.name: source for t in node.outputs if not _is_floating(t)}

    def selecting(self, node: Node) -> Iterator[str]:
        """Names of the operands by whose values a node selects, if these can differ."""
        operands = dict(enumerate(t.name for t in node.inputs))
        if any(_has_selector(body.proto) for body in subgraphs(node)):
            yield from (name for name in reads(node) if name in self.found)
        for slot in (*_SELECTORS.get(op_name(node), ()), *_SIZES.get(op_name(node), ())):
            if operands.get(slot) in self.found:
                yield operands[slot]
        if is_op(node, *_PICKS) and operands.get(1) in self.picks:
            yield self.picks[operands[1]]

    def floats(self, name: str) -> list[str]:
        """The float tensor itself, or those that a mask or an index is computed from."""
        return [name] if _is_floating(self.tensors[name]) else self.floats_before(name)

    def floats_before(self, name: str) -> list[str]:
        """The nearest float tensors that a tensor is computed from."""
        found: dict[str, None] = {}
        waiting, seen = [name], {name}
        while waiting:
            maker = self.makers.get(waiting.pop())
            for other in reads(maker) if maker is not None else ():
                if other in seen or other not in self.found:
                    continue
                seen.add(other)
                if _is_floating(self.tensors[other]):
                    found[other] = None
                else:
                    waiting.append(other)
        return list(found)


def _readers(graph: Graph, tensor: Tensor, chosen: Container[str]) -> list[tuple[str, int]]:
    """The operands that a tensor is; first those of nodes that select, or make masks or indices."""

    def computes(node: Node) -> bool:
        return node.name not in chosen and any(map(_is_floating, node.outputs))

    slots = sorted(graph.slots(tensor), key=lambda slot: computes(slot[0]))
    return [(node.name, i) for node, i in slots]


def _kind(tensor: Tensor) -> int | None:
    """The element type of a tensor; None where it is unknown, or not a tensor."""
    known = tensor.dtype is not None and getattr(tensor, "type", "tensor_type") == "tensor_type"
    return element_type(tensor.dtype) if known else None


def _is_floating(tensor: Tensor) -> bool:
    kinds = onnx.TensorProto
    return _kind(tensor) in (kinds.FLOAT, kinds.FLOAT16, kinds.DOUBLE)


def _has_selector(graph: onnx.GraphProto) -> bool:
    """True where a body, or one in it, holds a NonMaxSuppression or the like."""
    return any(
        is_op(node, *_SELECTORS) or any(_has_selector(body) for body in bodies(node))
        for node in graph.node
    )


@dataclass(frozen=True)
class ComparedModels:
    """Two models to run and compare; ``fed``: tensors of the reference that the candidate reads,
    with the type that they have there (a float16 model may have become float32).

    Both are as they were given where nothing is selected by values.
    """

    reference: bytes | Path
    candidate: bytes | Path
    fed: Mapping[str, int] = field(default_factory=dict)
    note: str = ""
    _files: tuple[ModelFiles, ...] = field(default=(), repr=False)

    def feed(self, feed: Feed, outputs: Mapping[str, Array]) -> Feed:
        """A feed for the candidate, with outputs of the reference for the same feed."""
        types = {n: onnx.helper.tensor_dtype_to_np_dtype(kind) for n, kind in self.fed.items()}
        return {**feed, **{n + _FED: outputs[n].astype(t, copy=False) for n, t in types.items()}}

    def named(self, outputs: Mapping[str, Array]) -> dict[str, Array]:
        """The candidate's outputs, its own deciding tensors under the reference's names."""
        return {self._shown.get(name, name): values for name, values in outputs.items()}

    @property
    def _shown(self) -> dict[str, str]:
        return {name + _OWN: name for name in self.fed}


def compared_models(
    selection: Selection | None, reference: Source, candidate: Source
) -> ComparedModels:
    """The models in the form in which their outputs can be compared.

    Raises ModelError where one cannot be read, OutputError where there is no room for copies.
    """
    old, new = read_model.runnable(reference), read_model.runnable(candidate)
    if selection is None:
        return ComparedModels(old, new)
    graph = read_model.load(new)
    shape_inference.infer(graph)
    places = selection.places(graph)
    if not places:
        return ComparedModels(old, new)
    tensors = graph.tensors()
    fed = {name: element_type(tensors[place].dtype) for name, place in places.items()}
    kinds = {name: selection.types[name] for name in places}
    first = write_model.edited_copy(old, partial(_add_outputs, kinds=kinds))
    second = write_model.edited_copy(new, partial(_feed_tensors, places=places, kinds=fed))
    names = [repr(name) for name in places]
    note = (
        f"{', '.join(selection.nodes)} selects by values, which may differ: {' and '.join(names)} "
        f"{'is' if len(names) == 1 else 'are'} compared in front of it, and what follows is "
        "compared on the float model's selection"
    )
    return ComparedModels(first.path, second.path, fed, note, (first, second))


def _add_outputs(graph: onnx.GraphProto, kinds: Mapping[str, int]) -> None:
    present = {t.name for t in graph.output}
    graph.output.extend(_declared(n, kind) for n, kind in kinds.items() if n not in present)


def _feed_tensors(
    graph: onnx.GraphProto, places: Mapping[str, str], kinds: Mapping[str, int]
) -> None:
    """Make tensors inputs, named after the reference's, and what the graph has there outputs."""
    names = {place: name for name, place in places.items()}
    fed = {place: name + _FED for name, place in places.items()}
    for node in graph.node:
        _rename_reads(node, fed)
        node.output[:] = [names[n] + _OWN if n in names else n for n in node.output]
    kept = [t for t in graph.output if t.name not in names]
    known = [t for t in graph.value_info if t.name not in names]
    del graph.output[:], graph.value_info[:]
    graph.value_info.extend(known)
    graph.output.extend((*kept, *(_declared(n + _OWN, kind) for n, kind in kinds.items())))
    graph.input.extend(_declared(n + _FED, kind) for n, kind in kinds.items())


def _rename_reads(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    node.input[:] = [names.get(n, n) for n in node.input]
    for body in bodies(node):
        for inner in body.node:
            _rename_reads(inner, names)


def _declared(name: str, kind: int) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, kind, None)
