"""What each weight costs at each width: its bytes, and the output error that it causes.

An item is a weight (a matrix of a linear layer, a table), with the switches of all operators that
read it. At a width it is measured on a model that was planned, calibrated and transformed with all
weights at that width, so with the integers that ``compile`` would write: the error of the outputs
where this item alone is quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TypeAlias, cast

from qcompile.compiler.config.recipe import Recipe
from qcompile.compiler.report.records import WeightDrops, WidthDrop
from qcompile.compiler.search.bit_allocation import packed_bytes
from qcompile.compiler.search.measurable import Measurable, PlannedWeight
from qcompile.compiler.search.measurements import Measurements, bit_mask
from qcompile.compiler.search.measuring_task import measured
from qcompile.compiler.search.precision_candidates import escaped
from qcompile.compiler.search.sensitivity import Score
from qcompile.ir.analysis.transformer_roles import Role
from qcompile.planning.context import Precision

WIDTHS: tuple[int, ...] = (6, 5, 4, 3, 2)
Plans: TypeAlias = Mapping[int, Mapping[str, PlannedWeight]]


@dataclass(frozen=True)
class WeightItem:
    """``tensors``: names in the plan, several where one operator has several weights. ``switches``
    and ``bits`` are those of the model before any width was chosen."""

    tensors: tuple[str, ...]
    switches: tuple[int, ...]
    bits: int
    role: str
    layer: int | None

    @property
    def name(self) -> str:
        """The first of its tensors."""
        return self.tensors[0]

    def bytes_in(self, plan: Mapping[str, PlannedWeight]) -> int:
        """Bytes of its integers in the file."""
        weights = [plan[t] for t in self.tensors]
        return sum(packed_bytes(w.elements, w.spec, w.stored) for w in weights)

    def has_width(self, bits: int, plan: Mapping[str, PlannedWeight]) -> bool:
        """True if the plan gives all of it this width: targets and patterns may not."""
        return all(t in plan and plan[t].spec.width == bits for t in self.tensors)


def weight_items(model: Measurable) -> list[WeightItem]:
    """The weights of a model, in the order of their operators."""
    groups: list[tuple[set[str], list[int]]] = []
    for i, switch in enumerate(model.meter.model.switches):
        names = {model.weights[u].name for u in switch.uses if u in model.weights}
        if not names:
            continue
        mine = [g for g in groups if g[0] & names]
        joined = set.union(names, *(g[0] for g in mine)), [*chain(*(g[1] for g in mine)), i]
        groups = [*(g for g in groups if not g[0] & names), joined]
    return [_item(model, names, switches) for names, switches in groups]


def _item(model: Measurable, names: set[str], switches: list[int]) -> WeightItem:
    planned = {w.name: (use, w) for use, w in model.weights.items() if w.name in names}
    use, weight = next(iter(planned.values()))
    role = model.origins[use].role if use in model.origins else Role(("other",))
    return WeightItem(tuple(planned), tuple(switches), weight.spec.bits, role.names[0], role.layer)


def with_widths(recipe: Recipe, widths: Iterable[tuple[WeightItem, int]]) -> Recipe:
    """A recipe that gives items these widths, unless one of its own patterns decides."""
    own: list[tuple[str, Precision]] = [
        (escaped(tensor), cast(Precision, bits)) for item, bits in widths for tensor in item.tensors
    ]
    return replace(recipe, precision=(*recipe.precision, *own))


@dataclass
class WidthMeter:
    """Measures items at widths, and keeps the results in ``state``.

    ``base``: the model whose weights have their own bits. ``measure``: makes the model of a recipe.
    One more model at a time is kept in memory.
    """

    base: Measurable
    items: Sequence[WeightItem]
    state: Measurements
    measure: Callable[[Recipe], Measurable]
    _made: dict[int, tuple[Measurable, dict[tuple[str, ...], WeightItem]]] = field(
        default_factory=dict
    )

    def has_width(self, item: WeightItem, bits: int) -> bool:
        """True if the target can store the item with ``bits``, and no pattern says otherwise."""
        model, _ = self._at(bits)
        return item.has_width(bits, {w.name: w for w in model.weights.values()})

    def each(
        self, items: Sequence[WeightItem], bits: int | None, samples: int = 0
    ) -> Generator[Score]:
        """The scores of items alone at ``bits``, None for their own, in their order."""
        if bits is None:
            return self.state.each([item.switches for item in items], samples)
        model, own = self._at(bits)
        # An operator that has no such width is the same in both models.
        switches = [own.get(item.tensors, item).switches for item in items]
        keys = [_key(item, bits, samples) for item in items]
        asked = [measured(on, samples) for on in switches]
        return self.state.remember_each(model.meter, keys, asked)

    def _at(self, bits: int) -> tuple[Measurable, dict[tuple[str, ...], WeightItem]]:
        if bits not in self._made:
            self._made.clear()
            recipe = self.base.prepared.recipe
            model = self.measure(with_widths(recipe, ((i, bits) for i in self.items)))
            self._made[bits] = model, {i.tensors: i for i in weight_items(model)}
        return self._made[bits]


def measured_widths(
    meter: WidthMeter, widths: Sequence[int], advance: Callable[[], None] = lambda: None
) -> list[WeightDrops]:
    """All items at their own bits and at ``widths``, the most sensitive first."""
    found: dict[str, list[WidthDrop]] = {i.name: [] for i in meter.items}
    for bits in (None, *sorted(set(widths), reverse=True)):
        has_it = [i for i in meter.items if bits is None or meter.has_width(i, bits)]
        with closing(meter.each(has_it, bits)) as scores:
            for item, score in zip(has_it, scores, strict=True):
                found[item.name].append(width_drop(bits or item.bits, score))
                advance()
        for _ in range(len(meter.items) - len(has_it)):
            advance()
    rows = [WeightDrops(i.name, i.role, i.layer, found[i.name]) for i in meter.items]
    return sorted(rows, key=lambda row: -row.measured[-1].error)


def _key(item: WeightItem, bits: int, samples: int) -> str:
    return f"{bits} bits:{samples}:{bit_mask(item.switches)}"


def width_drop(bits: int, found: Score) -> WidthDrop:
    """What reports say of a score at a width."""
    return WidthDrop(bits, found.error, found.worst_cosine)
