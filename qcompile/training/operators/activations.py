"""Activation functions of ONNX and of ONNX Runtime's own domain."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qcompile.training.operators.site import Function, Operator, Operators, Site, always

_SELU = 1.67326319217681884765625, 1.05070102214813232421875  # alpha and gamma of ONNX Selu-6


def _gelu(site: Site) -> Function:
    form = site.attr("approximate", "none")
    return lambda x: functional.gelu(x, approximate=form)


def _fast_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.gelu(x if bias is None else x + bias, approximate="tanh")


def _swish(site: Site) -> Function:
    default = 1.702 if site.node.op == "QuickGelu" else 1.0
    alpha = site.attr("alpha", default)
    return functional.silu if alpha == 1 else lambda x: x * torch.sigmoid(alpha * x)


def _hard_sigmoid(site: Site) -> Function:
    alpha, beta = site.attr("alpha", 0.2), site.attr("beta", 0.5)
    return lambda x: torch.clamp(alpha * x + beta, 0, 1)


def _elu(site: Site) -> Function:
    alpha = site.attr("alpha", 1.0)
    return lambda x: functional.elu(x, alpha)


def _celu(site: Site) -> Function:
    alpha = site.attr("alpha", 1.0)
    return lambda x: functional.celu(x, alpha)


def _selu(site: Site) -> Function:
    alpha, gamma = site.attr("alpha", _SELU[0]), site.attr("gamma", _SELU[1])
    return lambda x: gamma * functional.elu(x, alpha)


def _leaky_relu(site: Site) -> Function:
    alpha = site.attr("alpha", 0.01)
    return lambda x: functional.leaky_relu(x, alpha)


def _thresholded_relu(site: Site) -> Function:
    alpha = site.attr("alpha", 1.0)
    return lambda x: torch.where(x > alpha, x, torch.zeros_like(x))


def _softplus(x: Tensor) -> Tensor:
    """torch's own is the identity above a threshold."""
    return torch.logaddexp(x, torch.zeros_like(x))


OPERATORS: Operators = {
    "Celu": Operator(_celu),
    "Elu": Operator(_elu),
    "Erf": always(torch.erf),
    "Gelu": Operator(_gelu),
    "HardSigmoid": Operator(_hard_sigmoid),
    "HardSwish": always(functional.hardswish),
    "LeakyRelu": Operator(_leaky_relu),
    "Mish": always(functional.mish),
    "PRelu": always(lambda x, slope: torch.where(x < 0, x * slope, x)),
    "Relu": always(torch.relu),
    "Selu": Operator(_selu),
    "Sigmoid": always(torch.sigmoid),
    "Softplus": always(_softplus),
    "Softsign": always(functional.softsign),
    "Swish": Operator(_swish),
    "Tanh": always(torch.tanh),
    "ThresholdedRelu": Operator(_thresholded_relu),
    "com.microsoft.BiasGelu": always(lambda x, bias: functional.gelu(x + bias)),
    "com.microsoft.FastGelu": always(_fast_gelu),
    "com.microsoft.Gelu": always(functional.gelu),
    "com.microsoft.QuickGelu": Operator(_swish),
}
