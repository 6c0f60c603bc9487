"""What a pass and a calibrator are, and what they share while a model is compiled.

Passes and calibrators import this module and those below it, never each other, never the runtime.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import ClassVar, Literal

from qcompile.analysis.constant_evaluation import Evaluator
from qcompile.analysis.transformer_roles import matches
from qcompile.ir.graph import Graph, Node
from qcompile.planning.plan import ChannelStats, Plan, Ranges, Rounded, StatRequest
from qcompile.quant.affine import Array, QSpec, Range
from qcompile.targets.target import Mode as Mode
from qcompile.targets.target import Target

MODES: tuple[Mode, ...] = ("static", "dynamic", "weight-only", "float")
# Bits of the integers that a tensor becomes, or float.
Precision = Literal[8, 16, "float"]
PRECISIONS: tuple[Precision, ...] = (8, 16, "float")
# Which products of attention run in integers.
Attention = Literal["float", "scores", "all"]
ATTENTIONS: tuple[Attention, ...] = ("float", "scores", "all")


class Stage(IntEnum):
    """The order in which data flows; a pipeline never goes back."""

    SIMPLIFY = 0
    PLAN = 1
    TRANSFORM = 2
    INSERT = 3
    LOWER = 4


class Numerics(Enum):
    """What a pass may do to the model's answers."""

    EXACT = "bit-equal"
    ROUNDING = "equal up to float rounding"
    LOSSY = "quantizing"


@dataclass(frozen=True)
class Skip:
    """A refusal: which pass left what alone, and why."""

    pass_name: str
    node: str
    reason: str


@dataclass(frozen=True)
class Choices:
    """What the user asked for, as far as passes look at it.

    Patterns are globs over names of nodes and tensors, or over roles: ``role:NAME[@LAYER]``.
    ``reasons`` says of patterns of ``precision`` why they are there, where no user wrote them;
    ``may_widen`` that 16 bits may yet be asked for.
    """

    mode: Mode = "static"
    keep_float: tuple[str, ...] = ()
    seed: int = 0
    precision: tuple[tuple[str, Precision], ...] = ()
    reasons: tuple[tuple[str, str], ...] = ()
    may_widen: bool = False
    attention: Attention = "float"

    def kept_by(self, names: Iterable[str]) -> str | None:
        """The first pattern of ``keep_float`` that matches any of these names."""
        found = list(names)
        return next((p for p in self.keep_float if matches(p, found)), None)

    def precision_of(self, names: Iterable[str]) -> tuple[str, Precision] | None:
        """The first entry of ``precision`` whose pattern matches any of these names."""
        found = list(names)
        return next(((p, bits) for p, bits in self.precision if matches(p, found)), None)

    @property
    def asks_wide(self) -> bool:
        """True where some tensor is to have 16 bits, or may be."""
        return self.may_widen or any(bits == 16 for _, bits in self.precision)


@dataclass
class Context:
    """All that passes share: no globals, no imports of each other."""

    target: Target
    evaluate: Evaluator
    choices: Choices = field(default_factory=Choices)
    plan: Plan = field(default_factory=Plan)
    ranges: Ranges = field(default_factory=Ranges)
    requests: list[StatRequest] = field(default_factory=list)
    # what was seen of the channels of tensors that passes asked for with ``wants``
    channels: MutableMapping[str, ChannelStats] = field(default_factory=dict)
    # weights that a pass has rounded; all others are rounded to nearest
    rounded: dict[str, Rounded] = field(default_factory=dict)
    skips: list[Skip] = field(default_factory=list)
    # quantized constant -> (original constant, SQNR in dB), for the ledger
    origins: dict[str, tuple[str, float | None]] = field(default_factory=dict)
    # names of the model as it came in: a fusion must not turn a pattern into a mistake
    original_names: frozenset[str] = frozenset()
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

    def request(self, tensor: str, spec: QSpec) -> None:
        """Ask for the range of a tensor; equal requests are merged."""
        wanted = StatRequest(tensor, spec)
        if wanted not in self.requests:
            self.requests.append(wanted)


class Pass(ABC):
    """One rewrite. Subclasses are frozen dataclasses; their fields are the options.

    The graph is valid before and after ``run``, not necessarily during it. ``run`` returns True
    exactly where it changed the graph: the manager checks that claim. A pass that cannot handle a
    node says so through ``ctx.skip`` and leaves it as it is.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage]
    numerics: ClassVar[Numerics]
    after: ClassVar[tuple[str, ...]] = ()

    def wants(self, graph: Graph, ctx: Context) -> Iterable[str]:
        """Tensors whose channels the pass will look at in ``ctx.channels``; asked once planned."""
        return ()

    @abstractmethod
    def run(self, graph: Graph, ctx: Context) -> bool:
        """Rewrite ``graph`` in place; True where anything changed."""


class Observer(ABC):
    """Running statistics of one tensor: ``update`` and ``merge`` form a monoid.

    Batches may be split over processes: merging two observers, in order, gives the same range as
    one observer that saw all batches. Memory does not grow with the number of batches.
    """

    @abstractmethod
    def update(self, values: Array) -> None:
        """See one batch of finite float values: any shape, or (n, channels) where per channel."""

    @abstractmethod
    def merge(self, later: Observer) -> None:
        """Take in what another observer of the same kind saw after this one."""

    @abstractmethod
    def range(self) -> Range:
        """The range to quantize; raises ValueError where nothing was seen."""

    def state(self) -> dict[str, Array] | None:
        """All that was seen, for a checkpoint; None, the default, where it cannot be kept."""
        return None

    def restore(self, state: Mapping[str, Array]) -> None:
        """Have seen what the observer had that gave ``state``; this one is fresh and of its kind.

        Raises ValueError or KeyError where that is no such state.
        """
        raise ValueError(f"{type(self).__name__} keeps no state")


class Calibrator(ABC):
    """Makes observers. Subclasses are frozen dataclasses; their fields are the options.

    ``needs`` is "extrema" where an observer's state depends on each batch only through its minimum
    and maximum: then these are reduced inside the graph and activations never leave the runtime.
    """

    name: ClassVar[str]
    needs: ClassVar[Literal["extrema", "values"]]

    @abstractmethod
    def observer(self, spec: QSpec) -> Observer:
        """A fresh observer for a tensor that will be quantized as ``spec``."""
