"""The nodes of a graph as a list of steps, resolved before anything runs.

All values of a run are in one list; a step is a function with the places of its inputs and results
in that list. So a run looks nothing up by name and walks no graph. A tensor has a place for each
form in which it is read:

| form | is |
|---|---|
| device | a tensor where the parameters are |
| host | a tensor on the CPU: what is computed from shapes alone |
| numbers | Python numbers, for the shapes, axes and bounds that torch takes as such |
| a slot | what this slot makes of the tensor; a Gather of a table asks for its rows alone |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch

from qcompile.errors import TrainingError
from qcompile.ir import Graph, Node, Tensor, array, has_subgraph, is_constant, op_name
from qcompile.planning import Use
from qcompile.training.operators import OPERATORS, Function, Operator, Site, as_tensor

Slot: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
_DEVICE, _HOST, _NUMBERS = "device", "host", "numbers"
_OF_SHAPES = ("Shape", "Size")  # their results are on the host, whatever they read
_OMITTED = 0  # the place of inputs that are omitted: None
_FIRST = 1  # the place of the first stored constant


@runtime_checkable
class TableSlot(Protocol):
    """A slot that can give single rows of what it makes of a matrix."""

    is_table: bool

    def rows(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Rows of the result."""


@dataclass(frozen=True)
class Step:
    """``function`` of the values at ``inputs`` gives those at ``outputs``, in a tuple or alone.

    last: places that no later step reads. what: for messages.
    """

    function: Function
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    what: str
    last: tuple[int, ...] = ()


@dataclass(frozen=True)
class StepPlan:
    """``start``: the values before the first step, without those of stored constants, whose places
    start at 1, and of ``inputs``. ``tensors``: the place of each tensor as its node computes it.
    """

    steps: tuple[Step, ...]
    start: tuple[Any, ...]
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]
    tensors: Mapping[str, int]


def plan_steps(graph: Graph, slots: Mapping[Use, Slot], stored: Sequence[str]) -> StepPlan:
    """The steps that compute all tensors of a graph.

    slots: what the uses read in place of their tensors, computed once per tensor and slot.
    stored: names of all constants, in the order of their places. Raises TrainingError: an operator
    without a function, a body of If, Loop or Scan, a slot where the graph has no such input.
    """
    _check_slots(graph, slots)
    return _Builder(graph, slots, stored).plan()


def _check_slots(graph: Graph, slots: Mapping[Use, Slot]) -> None:
    known = {Use(n.name, i) for n in graph.nodes for i, t in enumerate(n.inputs) if t.name}
    strange = next((use for use in slots if use not in known), None)
    if strange is not None:
        raise TrainingError(
            f"node {strange.node!r}: a quantizer stands at input {strange.index}, which the graph "
            "does not have"
        )


class _Builder:
    """Places are given out in the order in which they are needed."""

    def __init__(self, graph: Graph, slots: Mapping[Use, Slot], stored: Sequence[str]) -> None:
        self._graph, self._slots = graph, slots
        self._host = _host_tensors(graph, slots)
        self._places: dict[tuple[str, Hashable], int] = {}
        self._start: list[Any] = [None]
        self._steps: list[Step] = []
        for name in (*stored, *(t.name for t in graph.inputs)):
            self._new_place(name, _DEVICE)

    def plan(self) -> StepPlan:
        graph = self._graph
        for node in graph.nodes:
            self._add_node(node)
        outputs = {t.name: self._place(t, _DEVICE) for t in graph.outputs}
        tensors = {name: self._places[name, self._form(t)] for name, t in graph.tensors().items()}
        inputs = {t.name: tensors[t.name] for t in graph.inputs}
        return StepPlan(_with_last_reads(self._steps), tuple(self._start), inputs, outputs, tensors)

    def _add_node(self, node: Node) -> None:
        operator, look_up = _operator_of(node), self._look_up(node)
        if look_up is not None:
            function = look_up
            inputs = tuple(self._place(tensor, _DEVICE) for tensor in node.inputs)
        else:
            readers = frozenset(op_name(n) for n in self._graph.consumers(node.outputs[0]))
            function = operator.make(Site(node, self._graph.opset, readers))
            given = max((i + 1 for i, t in enumerate(node.inputs) if t.name), default=0)
            inputs = tuple(self._read(node, i, operator) for i in range(given))
        outputs = tuple(self._new_place(t.name, self._form(t)) for t in node.outputs)
        self._steps.append(Step(function, inputs, outputs, _named(node)))

    def _look_up(self, node: Node) -> Function | None:
        """What gives a Gather its rows of a table, if the slot can do so without all the others."""
        slot = self._slots.get(Use(node.name, 0))
        if not isinstance(slot, TableSlot) or not slot.is_table:
            return None
        is_gather = op_name(node) == "Gather" and node.attrs.get("axis", 0) in (0, -2)
        return slot.rows if is_gather and Use(node.name, 1) not in self._slots else None

    def _read(self, node: Node, index: int, operator: Operator) -> int:
        """The place of an input, in the form in which the node reads it."""
        tensor, slot = node.inputs[index], self._slots.get(Use(node.name, index))
        if not tensor.name:
            return _OMITTED
        if slot is not None:
            return self._quantized(tensor, slot)
        if index in operator.numbers:
            return self._place(tensor, _NUMBERS)
        if _reads_shape(node):
            return self._place(tensor, self._form(tensor))
        return self._place(tensor, self._form(node.outputs[0]))

    def _form(self, tensor: Tensor) -> str:
        """In which form a tensor is computed."""
        return _HOST if tensor.name in self._host else _DEVICE

    def _place(self, tensor: Tensor, form: str) -> int:
        """The place of a tensor in a form; it is converted where it is first needed."""
        known = self._places.get((tensor.name, form))
        if known is not None:
            return known
        if is_constant(tensor):
            values = as_tensor(array(tensor), tensor.name)
            return self._new_place(
                tensor.name, form, values.tolist() if form == _NUMBERS else values
            )
        source = self._places[tensor.name, self._form(tensor)]
        if form == _NUMBERS:
            return self._convert(tensor, form, torch.Tensor.tolist, source)
        return self._convert(tensor, form, _moved, source, _FIRST)

    def _quantized(self, tensor: Tensor, slot: Slot) -> int:
        known = self._places.get((tensor.name, slot))
        if known is not None:
            return known
        return self._convert(tensor, slot, slot, self._place(tensor, _DEVICE))

    def _convert(self, tensor: Tensor, form: Hashable, function: Function, *inputs: int) -> int:
        place = self._new_place(tensor.name, form)
        what = f"tensor {tensor.name!r}" + ("" if isinstance(form, str) else ", quantized")
        self._steps.append(Step(function, inputs, (place,), what))
        return place

    def _new_place(self, name: str, form: Hashable, value: Any = None) -> int:
        """A place that later reads find, unless its tensor is an omitted result."""
        self._start.append(value)
        place = len(self._start) - 1
        if name:
            self._places[name, form] = place
        return place


def _reads_shape(node: Node) -> bool:
    """True where a node reads only the shape of its input."""
    return op_name(node) in _OF_SHAPES


def _moved(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return x.to(like.device)


def _named(node: Node) -> str:
    return f"node {node.name!r} ({op_name(node)})"


def _operator_of(node: Node) -> Operator:
    if has_subgraph(node):
        raise TrainingError(
            f"{_named(node)}: bodies of If, Loop and Scan cannot be trained; export the model "
            "without control flow"
        )
    operator = OPERATORS.get(op_name(node))
    if operator is None:
        raise TrainingError(
            f"{_named(node)}: this operator cannot be trained; docs/training.md has those that can"
        )
    return operator


def _host_tensors(graph: Graph, slots: Mapping[Use, Slot]) -> set[str]:
    """Names of tensors that are computed on the CPU: from shapes and numbers, without weights."""
    found: set[str] = set()

    def is_free(node: Node, index: int, tensor: Tensor) -> bool:
        if Use(node.name, index) in slots:
            return False
        if is_constant(tensor):
            return _is_small(tensor)
        return not tensor.name or tensor.name in found

    for node in graph.nodes:
        operator = OPERATORS.get(op_name(node))
        numbers = () if operator is None else operator.numbers
        read = [(i, t) for i, t in enumerate(node.inputs) if i not in numbers]
        if _reads_shape(node) or all(is_free(node, i, t) for i, t in read):
            found |= {t.name for t in node.outputs if t.name}
    return found


def _is_small(constant: Tensor) -> bool:
    """True for integers and for a single number; other floats are parameters."""
    return math.prod(constant.shape) == 1 or array(constant).dtype.kind in "iub"


def _with_last_reads(steps: Sequence[Step]) -> tuple[Step, ...]:
    """The steps, each with the places that no later one reads."""
    seen: set[int] = set()
    found = []
    for step in reversed(steps):
        last = {*step.inputs, *step.outputs} - seen
        seen |= last
        found.append(replace(step, last=tuple(sorted(last))))
    return tuple(reversed(found))
