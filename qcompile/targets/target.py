"""What a target can run, as tables without code.

Each target is one table in ``qcompile/targets``; passes ask the table, never for its name.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from qcompile.errors import TargetError
from qcompile.ir import HalfType
from qcompile.quant import QSpec
from qcompile.quant.types import DType
from qcompile.targets.half_types import TypeTable
from qcompile.targets.requirements import Requirement

Mode = Literal["static", "dynamic", "weight-only", "float"]
# QuantizeLinear and DequantizeLinear take 16-bit integers from this ONNX opset on.
QDQ_SINCE = 13  # the first opset in which DequantizeLinear has an axis
WIDE_SINCE = 21
# Without rounding noise in the data, rounding of weights may rely more on what was seen of it.
ROUND_FOR_FLOAT_DATA = "round-weights{few-bits-damping=0.03}"
INT4_SINCE, INT2_SINCE = 21, 25  # the first opsets with these types
MODES = ("static", "dynamic", "weight-only")  # those that quantize


@dataclass(frozen=True)
class OpRule:
    """One operator that the target runs quantized.

    ``activation`` and ``weight`` say how the data and the constant operand are quantized; None is
    an operand that stays float. ``output`` is set where the result is quantized as well, ``right``
    where the second operand is data too.
    ``min_bytes``: smaller constants stay float, for the reason in ``small``; if a recipe asks for
    their bits, only those that are under ``min_bytes_asked`` too. ``min_summed``: so do
    convolutions with groups, or with fewer products summed per value, unless their input is
    quantized already. ``modes``: where the rule applies.
    """

    op: str
    activation: QSpec | None = None
    weight: QSpec | None = None
    output: QSpec | None = None
    right: QSpec | None = None
    min_bytes: int = 0
    min_bytes_asked: int = 1 << 14
    min_summed: int = 0
    small: str = ""
    why: str = ""
    modes: tuple[str, ...] = MODES


@dataclass(frozen=True)
class StoredRule:
    """An operator without an integer kernel, whose constants may still be integers in the file.

    ``slots``: inputs that may be such constants. ``rows``: how many of their leading axes have a
    scale for each index, counted from the end where negative. ``min_rank``, ``min_bytes``: smaller
    constants stay float, for the reason in ``small``. ``modes``: where the rule applies.
    """

    op: str
    slots: tuple[int, ...]
    weight: QSpec
    rows: int
    why: str
    min_rank: int = 3
    min_bytes: int = 1
    small: str = "the weight is empty"
    modes: tuple[str, ...] = MODES


@dataclass(frozen=True)
class FewBits:
    """How a target stores weights of a number of bits under 8.

    ``stored``: bits of one code in the file, if the opset is at least ``since``. In opset 21 and
    later, codes of up to 4 bits take at most 4.
    """

    stored: int
    since: int

    @property
    def needs(self) -> int:
        """The first opset in which such a weight is smaller than one of 8 bits, if at all."""
        return min(self.since, INT4_SINCE)


@dataclass(frozen=True)
class LoweringChoice:
    """One alternative of a lowering option.

    ``instead``: passes of ``lower``, each with the pipeline that replaces it. ``attention``: which
    of attention's matrix multiplications are int8 then, None for no change. ``modes``: where this
    differs from the target's own way.
    """

    instead: dict[str, str] = field(default_factory=dict)
    attention: Literal["float", "scores", "all"] | None = None
    modes: tuple[str, ...] = ("static", "dynamic", "weight-only", "float")


@dataclass(frozen=True)
class LoweringOption:
    """A choice between operator patterns with the same outputs, up to rounding.

    ``own``: name of the target's default, ``others``: the alternatives; ``why``: when they can be
    faster.
    """

    name: str
    own: str
    others: dict[str, LoweringChoice]
    why: str


@dataclass(frozen=True)
class HalfForm:
    """How a target computes in float16.

    ``table``: the operators that take float16. ``plan``: further passes of that stage. ``lower``:
    passes of that stage by mode where a recipe asks for float16; empty: all modes compute in
    float16 without being asked. ``emulated``: the provider runs it in float32, so outputs are
    compared with every result rounded to float16.
    """

    table: TypeTable
    plan: tuple[str, ...] = ()
    lower: dict[str, tuple[str, ...]] = field(default_factory=dict)
    emulated: bool = False


@dataclass(frozen=True)
class Target:
    """A runtime and what it does well.

    ``rules``: quantized operators in modes static and dynamic; ``weight_only``: in that mode.
    ``chained``: operators that run in int8 where all their inputs are int8 results of convolutions.
    ``stored``: operators whose weights are integers in the file alone, and computed with in float.
    ``product``: int8 matrix multiplication of two activations, None without such a kernel;
    ``attention``: which ones of attention use it unless the recipe says otherwise.
    ``float_ops``: operators that stay float although they could be quantized, with the reason.
    ``gelu``: operators that compute GELU, best first, as (domain, op, minimal opset).
    ``transform`` and ``lower``: passes of those stages by mode. ``gate_latency``: whether
    slower than float is a fault. ``quantize_interior``: every tensor has its own quantizer; else an
    operator is quantized where all its operands are. ``wide`` and ``wide_weight``: 16-bit types of
    activations and weights; None: no such kernels. ``few_bits``: weights of under 8 bits that it
    takes, by bits; ``few_bits_run``: what they are in a run, by mode. ``ties_tables``: rows can be
    looked up in a layer's weight of few bits. ``with_data`` and ``without_data``: the default mode,
    None where there is none without data. ``halves``: the 16-bit float types that it computes in
    where a model does, in mode float; others become float32. ``half_form``: None without float16,
    for the reason in ``no_half``. ``plan``: passes of that stage that only this target needs.
    ``no_modes``: why a mode is missing. ``requires``: requirements on the emitted graph. ``forms``:
    lowering options that ``--tune`` times.
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
    stored: tuple[StoredRule, ...] = ()
    product: OpRule | None = None
    attention: Literal["float", "scores", "all"] = "float"
    gelu: tuple[tuple[str, str, int], ...] = ()
    tanh_gelu: tuple[tuple[str, str, int], ...] = ()
    opset: int = 17
    gate_latency: bool = True
    quantize_interior: bool = False
    wide: QSpec | None = None
    wide_weight: DType | None = None
    few_bits: dict[int, FewBits] = field(default_factory=dict)
    few_bits_run: dict[str, str] = field(default_factory=dict)
    ties_tables: bool = False
    halves: tuple[HalfType, ...] = ()
    half_form: HalfForm | None = None
    no_half: str = ""
    plan: tuple[str, ...] = ()
    with_data: Mode = "static"
    without_data: Mode | None = "dynamic"
    no_modes: dict[Mode, str] = field(default_factory=dict)
    requires: tuple[Requirement, ...] = ()
    forms: tuple[LoweringOption, ...] = ()

    def rule(self, op: str, mode: str) -> OpRule | None:
        """The rule for an operator in a mode, None where the target has none."""
        rules = self.weight_only if mode == "weight-only" else self.rules
        return next((r for r in rules if r.op == op and mode in r.modes), None)

    def in_float16(self) -> Target:
        """The target where float16 is asked for. Raises TargetError where it has none."""
        form = self.half_form
        if form is None:
            why = f" ({self.no_half})" if self.no_half else ""
            raise TargetError(
                f"target {self.name!r} has no float16{why}: leave out --float16, or choose "
                "--target cuda, tensorrt or qdq"
            )
        if not form.lower:
            return self
        return replace(
            self,
            rules=tuple(map(_with_half_scales, self.rules)),
            weight_only=tuple(map(_with_half_scales, self.weight_only)),
            chained=tuple(map(_with_half_scales, self.chained)),
            product=self.product and _with_half_scales(self.product),
            stored=tuple(replace(r, weight=_half_scale(r.weight)) for r in self.stored),
            wide=self.wide and _half_scale(self.wide),
            plan=form.plan,
            lower={**self.lower, **form.lower},
        )


def _with_half_scales(rule: OpRule) -> OpRule:
    return replace(
        rule,
        activation=rule.activation and _half_scale(rule.activation),
        weight=rule.weight and _half_scale(rule.weight),
        output=rule.output and _half_scale(rule.output),
        right=rule.right and _half_scale(rule.right),
    )


def _half_scale(spec: QSpec) -> QSpec:
    return replace(spec, half_scale=True)
