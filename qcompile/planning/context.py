"""What a pass and a calibrator are, and what they share while a model is compiled.

Passes and calibrators import this module and those below it, never each other, never the runtime.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from qcompile.ir import HalfType, Node, Refusal
from qcompile.ir.analysis.constant_evaluation import Evaluator
from qcompile.ir.analysis.name_patterns import matches
from qcompile.planning.plan import Plan
from qcompile.quant import Array, ChannelStats, QSpec, Ranges, Rounded, StatRequest
from qcompile.quant.types import FEW_BITS
from qcompile.targets.target import Mode, Target

MODES: tuple[Mode, ...] = ("static", "dynamic", "weight-only", "float")
# Bits of the integers that a tensor becomes, or float; 2 to 7 are for weights.
Precision = Literal[2, 3, 4, 5, 6, 7, 8, 16, "float"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
# Bits of a weight, 8 at most.
WeightBits = Literal[2, 3, 4, 5, 6, 7, 8]
WEIGHT_BITS: tuple[WeightBits, ...] = get_args(WeightBits)
# Weights that can have few bits: of linear layers, and tables whose rows are looked up.
WeightKind = Literal["linear", "table"]
TOKEN_TABLE = "role:token-embedding-weight"
# Which products of attention run in integers.
Attention = Literal["float", "scores", "all"]
ATTENTIONS: tuple[Attention, ...] = ("float", "scores", "all")
# Pattern of a recipe's ``precision`` -> why it is there, where no user wrote it.
Reasons: TypeAlias = Mapping[str, str]


@dataclass(frozen=True)
class Skip:
    """A refusal: which pass left what alone, and why."""

    pass_name: str
    node: str
    reason: str


@dataclass(frozen=True)
class PrecisionRule:
    """What tensors become whose names match ``pattern``; ``reason`` where no user wrote it.

    setting: the key of the recipe that says so for all weights of a kind, in place of a pattern.
    """

    pattern: str
    precision: Precision
    reason: str | None = None
    setting: str = ""

    @property
    def has_few_bits(self) -> bool:
        return self.precision in FEW_BITS

    @property
    def origin(self) -> str:
        """What users wrote, for messages."""
        return self.setting or f"precision pattern {self.pattern!r}"


@dataclass(frozen=True)
class PassSettings:
    """What the user asked for, as far as passes look at it.

    Patterns are globs over names of nodes and tensors, or over roles: ``role:NAME[@LAYER]``.
    ``may_widen``: 16 bits may yet be asked for. ``weight_bits`` and ``embedding_bits``: of weights
    that no pattern matches. ``weight_block``: how many values of a weight of few bits share a
    multiplier, 0 all of a channel, None as the bits suggest.
    """

    mode: Mode = "static"
    keep_float: tuple[str, ...] = ()
    seed: int = 0
    precision: tuple[PrecisionRule, ...] = ()
    may_widen: bool = False
    attention: Attention = "float"
    weight_bits: WeightBits | None = None
    embedding_bits: WeightBits | None = None
    weight_block: int | None = None

    def kept_by(self, names: Iterable[str]) -> Refusal | None:
        """That the user wants what goes by these names float; None where no pattern matches any."""
        found = list(names)
        pattern = next((p for p in self.keep_float if matches(p, found)), None)
        return None if pattern is None else Refusal(f"kept float by pattern {pattern!r}")

    def precision_of(self, names: Iterable[str]) -> PrecisionRule | None:
        """The first rule of ``precision`` whose pattern matches any of these names."""
        found = list(names)
        return next((r for r in self.precision if matches(r.pattern, found)), None)

    def precision_of_data(self, names: Iterable[str]) -> PrecisionRule | None:
        """The same for an activation: rules of few bits are for weights, so that they give None."""
        rule = self.precision_of(names)
        return None if rule is None or rule.has_few_bits else rule

    def precision_of_weight(
        self, names: Iterable[str], kind: WeightKind | None
    ) -> PrecisionRule | None:
        """The same for a weight: where no pattern matches, the bits for all weights of its kind.

        Tables other than that of the tokens, such as of positions, get 8 bits at least: they are
        small, and each of their rows is read by many texts.
        """
        found = list(names)
        rule = self.precision_of(found)
        if rule is not None or kind is None:
            return rule
        setting, bits = self.bits_of(kind)
        if bits is None:
            return None
        small = kind == "table" and not matches(TOKEN_TABLE, found)
        return PrecisionRule("", 8 if small else bits, setting=setting)

    def bits_of(self, kind: WeightKind) -> tuple[str, WeightBits | None]:
        """The recipe's key for the bits of all weights of a kind, and its value."""
        if kind == "table":
            return "embedding_bits", self.embedding_bits
        return "weight_bits", self.weight_bits

    @property
    def few_bits(self) -> set[int]:
        """All numbers of bits under 8 that are asked for."""
        asked = (self.weight_bits, self.embedding_bits, *(r.precision for r in self.precision))
        return {bits for bits in asked if isinstance(bits, int) and bits in FEW_BITS}

    @property
    def asks_wide(self) -> bool:
        """True where some tensor is to have 16 bits, or may be."""
        return self.may_widen or any(r.precision == 16 for r in self.precision)


@dataclass
class Context:
    """All that passes share: no globals, no imports of each other."""

    target: Target
    evaluate: Evaluator
    choices: PassSettings = field(default_factory=PassSettings)
    plan: Plan = field(default_factory=Plan)
    ranges: Ranges = field(default_factory=Ranges)
    # tensors whose ranges training must not change -> why, as other nodes depend on them
    fixed_ranges: dict[str, str] = field(default_factory=dict)
    requests: list[StatRequest] = field(default_factory=list)
    # what was seen of the channels of tensors that passes asked for with ``wants``
    channels: MutableMapping[str, ChannelStats] = field(default_factory=dict)
    # weights that a pass has rounded; all others are rounded to nearest
    rounded: dict[str, Rounded] = field(default_factory=dict)
    # factors by which the rows of a weight of few bits were multiplied, and its data divided
    row_factors: dict[str, Array] = field(default_factory=dict)
    skips: list[Skip] = field(default_factory=list)
    # what a pass did that users should know: code -> sentence, notes of the report
    remarks: dict[str, str] = field(default_factory=dict)
    # quantized constant -> (original constant, SQNR in dB), for the ledger
    origins: dict[str, tuple[str, float | None]] = field(default_factory=dict)
    # dB by which a bound on int8 sums raises a weight's rounding noise, by its name, for the ledger
    bound_costs: dict[str, float | None] = field(default_factory=dict)
    # 16-bit float types of the weights that became float32
    stored_as: set[HalfType] = field(default_factory=set)
    # constants that were computed from small ones, such as masks: no form of a weight
    generated: set[str] = field(default_factory=set)
    # names of the model as it came in: a fusion must not turn a pattern into a mistake
    original_names: frozenset[str] = frozenset()
    # the If, Loop or Scan whose body is compiled: patterns for the model need not match in it
    body_of: str = ""
    running: str = ""

    def skip(self, node: Node | str, reason: str) -> None:
        """Record that the running pass leaves a node alone; each refusal counts once."""
        name = node if isinstance(node, str) else node.name
        refusal = Skip(self.running, name, reason)
        if refusal not in self.skips:
            self.skips.append(refusal)

    def rounded_as(self, weight: str, spec: QSpec) -> Rounded | None:
        """The integers that a pass has chosen for a weight, None where not for this spec.

        One weight may be read along both axes: then its integers are chosen for one of them.
        """
        found = self.rounded.get(weight)
        return found if found is not None and found.params.spec == spec else None

    def rename(self, old: str, new: str, *, same_channels: bool = True) -> None:
        """What is known of a tensor holds for the one that its readers read in its place now.

        That is decisions, its range and what was seen of its channels. same_channels: False where
        the new tensor has further ones, so that nothing that is known by channel holds for it.
        """
        self.plan.rename(old, new)
        span = self.ranges.get(old)
        if span is not None and (same_channels or span.axis is None):
            self.ranges.set(new, span)
        if old in self.fixed_ranges:
            self.fixed_ranges[new] = self.fixed_ranges[old]
        if old in self.ranges.missing:
            self.ranges.missing[new] = self.ranges.missing[old]
        if same_channels and old in self.channels:
            self.channels[new] = self.channels[old]

    def release_all(self, reason: str) -> None:
        """Keep everything float that was planned to be quantized."""
        for use in [u for d in self.plan.quantized() for u in d.uses]:
            self.plan.release(use.node, reason)
        self.requests.clear()

    def request(self, tensor: str, spec: QSpec, *, extrema: bool = False) -> None:
        """Ask for the range of a tensor, or its extrema; equal requests are merged."""
        wanted = StatRequest(tensor, spec, extrema)
        if wanted not in self.requests:
            self.requests.append(wanted)
