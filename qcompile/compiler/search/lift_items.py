"""What is measured and lifted together: a tensor, a linear, a role, a layer, weights or data.

Items are made of switches (``fake_quantized.py``). Each knows by which patterns of ``precision`` it
is lifted; patterns are held against names in the graph as the passes of the plan saw it, so these
are noted then, and found again by the uses: later passes may move a use to another tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from qcompile.compiler.search.fake_quantized import FakeQuantSwitch
from qcompile.errors import RecipeError
from qcompile.ir import Graph, is_layout
from qcompile.ir.analysis.data_path import aliases
from qcompile.ir.analysis.name_patterns import matches
from qcompile.ir.analysis.transformer_roles import Role, names_to_match, roles
from qcompile.planning import Context, Decision, Kind, Use
from qcompile.planning.context import Precision
from qcompile.quant import QSpec

By = Literal["tensor", "role", "layer", "kind"]
BY: tuple[By, ...] = ("tensor", "role", "layer", "kind")
_WIDE_BITS = 16


@dataclass(frozen=True)
class Origin:
    """One planned quantization as the plan's passes saw it.

    ``own`` are the names to write into a pattern, best first; ``names`` all that it goes by.
    """

    own: tuple[str, ...]
    names: frozenset[str]
    kind: Kind
    role: Role
    spec: QSpec | None

    @property
    def name(self) -> str:
        return self.own[0]


@dataclass(frozen=True)
class PrecisionCandidate:
    """Switches that are measured together, and what lifts them.

    ``lifts`` are entries of ``precision``: 16 bits where the target has them, else float.
    """

    name: str
    switches: tuple[int, ...]
    lifts: tuple[tuple[str, Precision], ...]
    roles: str
    layer: int | None
    kinds: str


def origins(graph: Graph, ctx: Context) -> dict[Use, Origin]:
    """Names and roles of all planned quantizations, to be asked right after the plan."""
    found = roles(graph)
    made: dict[Use, Origin] = {}
    for decision in ctx.plan.quantized():
        for use in decision.uses:
            if ctx.target.quantize_interior:
                made[use] = _tensor(graph, decision, found)
            else:
                made[use] = _operator(graph, ctx, decision, _operator_of(graph, use), found)
    return made


def _operator_of(graph: Graph, use: Use) -> str:
    """The operator whose operand it is, where layout operators lie between."""
    node = graph.find(use.node)
    while is_layout(node) and (reader := graph.only_consumer(node.outputs[0])) is not None:
        node = reader
    return str(node.name)


def _tensor(graph: Graph, decision: Decision, found: Mapping[str, Role]) -> Origin:
    """A tensor that is quantized by itself; data goes by the names of its copies too."""
    name, nodes = decision.tensor, [u.node for u in decision.uses]
    tensors = [name]
    if decision.kind == "activation":
        tensors, nodes = aliases(graph, graph.tensors()[name])
    names = frozenset(names_to_match(found, tensors, nodes))
    role = next((found[t] for t in tensors if t in found), Role(("other",)))
    return Origin(tuple(tensors), names, decision.kind, role, decision.spec)


def _operator(
    graph: Graph, ctx: Context, decision: Decision, node: str, found: Mapping[str, Role]
) -> Origin:
    """An operator that runs in integers as a whole: lifting its weight lifts its data."""
    quantized = list(ctx.plan.quantized())
    own = [d for d in quantized if any(_operator_of(graph, u) == node for u in d.uses)]
    tensors = [d.tensor for d in own]
    weights = [d.tensor for d in own if d.kind == "weight"]
    role = next((found[t] for t in [*weights, *tensors] if t in found), Role(("other",)))
    names = frozenset(names_to_match(found, tensors, [node]))
    return Origin((node, *weights), names, "weight", role, decision.spec)


def items(
    ctx: Context,
    switches: Sequence[FakeQuantSwitch],
    known: Mapping[Use, Origin],
    by: By = "tensor",
) -> list[PrecisionCandidate]:
    """All switches, grouped. Raises RecipeError where the target cannot tell the groups apart."""
    if by == "kind" and not ctx.target.quantize_interior:
        raise RecipeError(
            f"--by kind: target {ctx.target.name!r} quantizes weight and data of an operator "
            "together, expected tensor, role or layer"
        )
    found = [_origin(s, known) for s in switches]
    groups: dict[str, list[int]] = {}
    for i, origin in enumerate(found):
        groups.setdefault(_group(origin, by), []).append(i)
    return [_item(ctx, name, members, found, by) for name, members in groups.items()]


def _origin(switch: FakeQuantSwitch, known: Mapping[Use, Origin]) -> Origin:
    """What was noted of its uses; a use that a pass has added goes by its tensor."""
    for use in switch.uses:
        if use in known:
            return known[use]
    part = switch.parts[0]
    names = frozenset([part.tensor])
    return Origin((part.tensor,), names, part.kind, Role(("other",)), part.spec)


def _group(origin: Origin, by: By) -> str:
    if by == "role":
        return origin.role.names[0]
    if by == "layer":
        return "no layer" if origin.role.layer is None else f"layer {origin.role.layer}"
    return f"{origin.kind}s" if by == "kind" else origin.name


def _item(
    ctx: Context, name: str, members: list[int], found: Sequence[Origin], by: By
) -> PrecisionCandidate:
    mine = [found[i] for i in members]
    layers = {o.role.layer for o in mine}
    shown = dict.fromkeys(o.role.names[0] for o in mine)
    return PrecisionCandidate(
        name=name,
        switches=tuple(members),
        lifts=tuple(dict.fromkeys(_lifts(ctx, members, found, by))),
        roles=", ".join([*shown][:3]) + (", …" if len(shown) > 3 else ""),
        layer=layers.pop() if len(layers) == 1 else None,
        kinds=", ".join(sorted({_kind(ctx, o) for o in mine})),
    )


def _kind(ctx: Context, origin: Origin) -> str:
    return origin.kind if ctx.target.quantize_interior else "operator"


def _lifts(
    ctx: Context, members: list[int], found: Sequence[Origin], by: By
) -> list[tuple[str, Precision]]:
    """One pattern for the whole group where there is one; else one for each member."""
    first = found[members[0]]
    bits = {_bits(ctx, found[i]) for i in members}
    whole = {
        "role": f"role:{first.role.names[0]}",
        "layer": f"role:*@{first.role.layer}",
        "kind": "role:*-weight",
        "tensor": "",
    }[by]
    if whole and len(bits) == 1 and _matched(whole, found) == members:
        return [(whole, bits.pop())]
    return [(_pattern(found, i), _bits(ctx, found[i])) for i in members]


def _pattern(found: Sequence[Origin], member: int) -> str:
    """A name of this one and no other, as a pattern; its first name where all stand for more."""
    own = found[member].own
    mine = [i for i, o in enumerate(found) if o.own == own]
    alone = (n for n in own if [i for i, o in enumerate(found) if n in o.names] == mine)
    return escaped(next(alone, own[0]))


def _matched(pattern: str, found: Sequence[Origin]) -> list[int]:
    return [i for i, o in enumerate(found) if matches(pattern, o.names)]


def escaped(name: str) -> str:
    """A glob that matches this name alone."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _bits(ctx: Context, origin: Origin) -> Precision:
    """What the tensor becomes when lifted: 16 bits if it has fewer and the target has them."""
    wide = ctx.target.wide if origin.kind == "activation" else ctx.target.wide_weight
    has_wide = origin.spec is not None and origin.spec.dtype.endswith(str(_WIDE_BITS))
    # Ranges of wide data are calibrated, and an operator as a whole has no wide form.
    can = wide is not None and not has_wide and ctx.target.quantize_interior
    return 16 if can and ctx.choices.mode == "static" else "float"
