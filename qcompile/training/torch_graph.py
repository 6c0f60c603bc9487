"""A graph as a torch module: the same tensors and operators, differentiable."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qcompile.errors import TrainingError
from qcompile.ir import Graph, array
from qcompile.planning import Use
from qcompile.training.graph_steps import Slot, Step, plan_steps
from qcompile.training.learnable_constants import learnable_constants
from qcompile.training.operators import as_tensor

__all__ = ["Slot", "TorchGraph"]


class TorchGraph(nn.Module):
    """The tensors of a graph, computed as ONNX defines its operators, with gradients.

    Float constants are parameters, others buffers. Those parameters have ``requires_grad`` that
    ``learnable_constants`` names: weights, biases and tables, not masks and scalars. Whoever trains
    may change that.
    """

    def __init__(self, graph: Graph, slots: Mapping[Use, Slot] | None = None) -> None:
        """Copy the constants and resolve all nodes; later changes of the graph have no effect.

        slots: what is applied to the tensor that a use reads, computed once per tensor, callable
        and forward. Slots are no submodules: whoever made them trains and saves them. Raises
        TrainingError: an operator without a function in ``operators/``, a body of If, Loop or Scan,
        a slot where the graph has no such input.
        """
        super().__init__()
        constants = {n: as_tensor(array(t), n) for n, t in graph.constants().items()}
        floats = {n: values for n, values in constants.items() if values.is_floating_point()}
        others = {n: values for n, values in constants.items() if n not in floats}
        self._plan = plan_steps(graph, slots or {}, [*floats, *others])
        learned = learnable_constants(graph)
        # torch allows no dots in names, which names of tensors are full of.
        self._numbered = {name: f"float_{i}" for i, name in enumerate(floats)}
        for name, values in floats.items():
            parameter = nn.Parameter(values, requires_grad=name in learned)
            self.register_parameter(self._numbered[name], parameter)
        for i, values in enumerate(others.values()):
            self.register_buffer(f"constant_{i}", values, persistent=False)

    def names(self) -> list[str]:
        """Names of the float constants of the graph."""
        return list(self._numbered)

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter with the values of a float constant of the graph, of its shape and type.

        Raises TrainingError where the graph has no such constant.
        """
        if name not in self._numbered:
            raise TrainingError(f"{name!r} is not a float constant of the graph")
        parameter: nn.Parameter = self.get_parameter(self._numbered[name])
        return parameter

    def forward(
        self, feed: Mapping[str, torch.Tensor], watch: Collection[str] = ()
    ) -> dict[str, torch.Tensor]:
        """The outputs of the graph, and the tensors named in ``watch``, by name.

        Inputs of the feed that the graph does not have are ignored. A watched tensor is given as
        its node computes it, without slots. Raises TrainingError: an input is missing, a watched
        name is unknown, or torch fails at a node, as on inputs of the wrong shape.
        """
        plan = self._plan
        values = list(plan.start)
        stored = (*self._parameters.values(), *self._buffers.values())
        values[1 : 1 + len(stored)] = stored
        for name, place in plan.inputs.items():
            if name not in feed:
                raise TrainingError(f"input {name!r} is missing: the feed has {sorted(feed)}")
            values[place] = feed[name]
        wanted = {**plan.outputs, **_found(plan.tensors, watch)}
        _run(plan.steps, values, frozenset(wanted.values()))
        return {name: values[place] for name, place in wanted.items()}


def _found(tensors: Mapping[str, int], watch: Collection[str]) -> dict[str, int]:
    unknown = next((name for name in watch if name not in tensors), None)
    if unknown is not None:
        raise TrainingError(f"watched tensor {unknown!r} is not in the graph")
    return {name: tensors[name] for name in watch}


def _run(steps: Sequence[Step], values: list[Any], kept: frozenset[int]) -> None:
    """Fill ``values``. Those that no later step reads are freed, except for ``kept``; autograd
    keeps what gradients need."""
    for step in steps:
        try:
            result = step.function(*[values[i] for i in step.inputs])
        except (RuntimeError, ValueError, IndexError, TypeError) as e:
            read = [values[i] for i in step.inputs]
            raise TrainingError(f"{step.what}: torch failed on {_shown(read)}: {e}") from e
        if type(result) is tuple:
            for place, part in zip(step.outputs, result, strict=False):
                values[place] = part
        else:
            values[step.outputs[0]] = result
        for place in step.last:
            if place not in kept:
                values[place] = None


def _shown(read: Sequence[Any]) -> str:
    shapes = [list(v.shape) if isinstance(v, torch.Tensor) else v for v in read]
    return f"inputs {shapes}"
