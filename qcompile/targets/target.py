"""What a target can run, as data: rows of claims, no code paths.

Each target is one table in ``qcompile/targets``; passes ask the table, never for its name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qcompile.quant import QSpec
from qcompile.quant.types import DType
from qcompile.targets.requirements import Requirement

Mode = Literal["static", "dynamic", "weight-only", "float"]
# QuantizeLinear and DequantizeLinear take 16-bit integers from this ONNX opset on.
QDQ_SINCE = 13  # the first opset in which DequantizeLinear has an axis
WIDE_SINCE = 21


@dataclass(frozen=True)
class OpRule:
    """One operator that the target runs in integers.

    ``activation`` and ``weight`` say how the data and the constant operand are quantized; None is
    an operand that stays float. ``output`` is set where the result is quantized as well, ``right``
    where the second operand is data too.
    ``min_bytes``: constants smaller than this stay float, for the reason in ``small``.
    ``min_summed``: so do convolutions with groups, or with fewer products summed for each value,
    unless what they read is integers already.
    ``modes``: the modes that it holds in.
    """

    op: str
    activation: QSpec | None = None
    weight: QSpec | None = None
    output: QSpec | None = None
    right: QSpec | None = None
    min_bytes: int = 0
    min_summed: int = 0
    small: str = ""
    why: str = ""
    modes: tuple[str, ...] = ("static", "dynamic", "weight-only")


@dataclass(frozen=True)
class LoweringChoice:
    """One way to lower something: passes of ``lower`` by what stands in their place, a pipeline.

    ``attention``: which of its products run in integers then; None leaves that alone. ``modes``:
    where it is another way than the target's own.
    """

    instead: dict[str, str] = field(default_factory=dict)
    attention: Literal["float", "scores", "all"] | None = None
    modes: tuple[str, ...] = ("static", "dynamic", "weight-only", "float")


@dataclass(frozen=True)
class LoweringOption:
    """Something that can be run in several ways with the same answers, up to rounding.

    ``own`` names the target's own way, ``others`` the rest; ``why`` says when they can be faster.
    """

    name: str
    own: str
    others: dict[str, LoweringChoice]
    why: str


@dataclass(frozen=True)
class Target:
    """A runtime and what it does well.

    ``rules``: integer operators in static and dynamic mode; ``weight_only``: in weight-only mode.
    ``chained``: operators that run in integers where all they read is integers that a convolution
    has written.
    ``product``: a product of two activations in integers, None where there is no such kernel;
    ``attention``: which of attention's products run so unless the recipe says otherwise.
    ``float_ops``: operators that stay float although they could be quantized, with the reason.
    ``gelu``: operators that compute GELU, best first, as (domain, op, minimal opset).
    ``transform`` and ``lower``: passes of those stages by mode. ``gate_latency``: whether
    slower than float is a fault. ``quantize_interior``: every tensor has a quantizer of its own;
    without it an operator runs in integers where all its operands are. ``wide``: what activations
    become where 16 bits are asked for, ``wide_weight``: what weights do; None: no such kernels.
    ``with_data`` and ``without_data``: the default mode, None where there is none without data.
    ``no_modes``: why a mode is missing. ``requires``: what the emitted graph is held to.
    ``forms``: what can be lowered otherwise, for ``--tune`` to time.
    """

    name: str
    summary: str
    provider: str
    rules: tuple[OpRule, ...]
    weight_only: tuple[OpRule, ...]
    modes: tuple[str, ...]
    lower: dict[str, tuple[str, ...]]
    float_ops: dict[str, str]
    transform: dict[str, tuple[str, ...]] = field(default_factory=dict)
    chained: tuple[OpRule, ...] = ()
    product: OpRule | None = None
    attention: Literal["float", "scores", "all"] = "float"
    gelu: tuple[tuple[str, str, int], ...] = ()
    tanh_gelu: tuple[tuple[str, str, int], ...] = ()
    opset: int = 17
    gate_latency: bool = True
    quantize_interior: bool = False
    wide: QSpec | None = None
    wide_weight: DType | None = None
    with_data: Mode = "static"
    without_data: Mode | None = "dynamic"
    no_modes: dict[Mode, str] = field(default_factory=dict)
    requires: tuple[Requirement, ...] = ()
    forms: tuple[LoweringOption, ...] = ()

    def rule(self, op: str, mode: str) -> OpRule | None:
        """The rule for an operator in a mode, None where the target has none."""
        rules = self.weight_only if mode == "weight-only" else self.rules
        return next((r for r in rules if r.op == op and mode in r.modes), None)
