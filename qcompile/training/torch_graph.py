"""A graph as a torch module: the same tensors and operators, differentiable."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import nn

from qcompile.ir import Graph
from qcompile.planning import Use

Slot = Callable[[torch.Tensor], torch.Tensor]


class TorchGraph(nn.Module):
    """A graph as a torch module.

    slots: what is applied to the tensor that a use reads, computed once per tensor, callable and
    forward. Slots are not submodules: whoever made them trains and saves them.
    """

    def __init__(self, graph: Graph, slots: Mapping[Use, Slot] | None = None) -> None:
        """Raises TrainingError where an operator has no counterpart in ``operators/``."""
        super().__init__()

    def names(self) -> list[str]:
        """Names of the float constants of the graph."""
        raise NotImplementedError

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter with the values of a float constant of the graph."""
        raise NotImplementedError

    def forward(
        self, feed: Mapping[str, torch.Tensor], watch: Collection[str] = ()
    ) -> dict[str, torch.Tensor]:
        """The outputs of the graph, and the tensors named in ``watch``, by name."""
        raise NotImplementedError
