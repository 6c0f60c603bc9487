"""A module that maps feeds to outputs, run on numpy arrays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from qcompile.data.feeds import Feed
from qcompile.quant import Array
from qcompile.training.fake_quantizers import ActivationQuantizer

# Of the largest value of a tensor: float32 sums of n terms in another order differ by about
# sqrt(n) 2^-24 of their size, which is less for the 4096 terms of a large feed-forward layer.
_ROUNDING = 2.0**-18


def torch_version() -> str:
    """As torch spells it, with the devices that it was built for."""
    return str(torch.__version__)


def run_module(module: nn.Module, feed: Feed) -> dict[str, Array]:
    """Outputs by name, on the device of the module."""
    parameter = next(module.parameters(), None)
    device = None if parameter is None else parameter.device
    with torch.no_grad():
        given = {name: torch.tensor(values, device=device) for name, values in feed.items()}
        return {name: found.cpu().numpy() for name, found in module(given).items()}


@contextmanager
def rounded_elsewhere(quantizers: nn.Module, seed: int) -> Iterator[None]:
    """What is quantized differs as if another program had added the same floats in another order.

    Outputs then show how much of a difference between two programs rounding explains: values next
    to the boundary between two integers become the other one.
    """
    generator = torch.Generator().manual_seed(seed)

    def moved(_module: nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        (x,) = given
        noise = torch.rand(x.shape, generator=generator).to(x.device) * 2 - 1
        return (x + noise * (x.abs().max() * _ROUNDING),)

    hooks = [
        m.register_forward_pre_hook(moved)
        for m in quantizers.modules()
        if isinstance(m, ActivationQuantizer)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
