"""What is measured and raised together: a tensor, an operator, a role, a layer, weights or data.

A candidate (an "item" in reports) consists of switches (``fake_quantized.py``) and of the patterns
of ``precision`` that raise it. Patterns are matched against the names in the graph at the time of
the plan. So names are recorded then and looked up by use, since later passes may move a use to
another tensor.
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
_RAISED_BITS = 16


@dataclass(frozen=True)
class Origin:
    """One planned quantization as the plan's passes saw it.

    ``own``: names to write into a pattern, best first. ``names``: all names that a pattern matches.
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
    """Switches that are measured together, and the entries of ``precision`` that raise them.

    ``raised``: pattern and 16 bits, or "float" where the target has no 16 bits; 8 for weights of
    fewer bits.
    """

    name: str
    switches: tuple[int, ...]
    raised: tuple[tuple[str, Precision], ...]
    roles: str
    layer: int | None
    kinds: str


def record_origins(graph: Graph, ctx: Context) -> dict[Use, Origin]:
    """Names and roles of all planned quantizations; call it right after the plan."""
    role_of = roles(graph)
    origins: dict[Use, Origin] = {}
    for decision in ctx.plan.quantized():
        for use in decision.uses:
            if ctx.target.quantize_interior:
                origins[use] = _tensor_origin(graph, decision, role_of)
            else:
                operator = _operator_of(graph, use)
                origins[use] = _operator_origin(graph, ctx, decision, operator, role_of)
    return origins


def _operator_of(graph: Graph, use: Use) -> str:
    """The operator that uses the tensor, looking through layout operators."""
    node = graph.find(use.node)
    while is_layout(node) and (reader := graph.only_consumer(node.outputs[0])) is not None:
        node = reader
    return str(node.name)


def _tensor_origin(graph: Graph, decision: Decision, role_of: Mapping[str, Role]) -> Origin:
    """A tensor that is quantized separately; the names of an activation's copies count too."""
    name, nodes = decision.tensor, [u.node for u in decision.uses]
    tensors = [name]
    if decision.kind == "activation":
        tensors, nodes = aliases(graph, graph.tensors()[name])
    names = frozenset(names_to_match(role_of, tensors, nodes))
    role = next((role_of[t] for t in tensors if t in role_of), Role(("other",)))
    return Origin(tuple(tensors), names, decision.kind, role, decision.spec)


def _operator_origin(
    graph: Graph, ctx: Context, decision: Decision, node: str, role_of: Mapping[str, Role]
) -> Origin:
    """An operator that is quantized as a whole: raising its weight raises its data."""
    quantized = list(ctx.plan.quantized())
    own = [d for d in quantized if any(_operator_of(graph, u) == node for u in d.uses)]
    tensors = [d.tensor for d in own]
    weights = [d.tensor for d in own if d.kind == "weight"]
    narrow = (d.spec for d in own if d.spec is not None and d.spec.width is not None)
    role = next((role_of[t] for t in [*weights, *tensors] if t in role_of), Role(("other",)))
    names = frozenset(names_to_match(role_of, tensors, [node]))
    return Origin((node, *weights), names, "weight", role, next(narrow, decision.spec))


def group_switches(
    ctx: Context,
    switches: Sequence[FakeQuantSwitch],
    recorded: Mapping[Use, Origin],
    by: By = "tensor",
) -> list[PrecisionCandidate]:
    """All switches, grouped. Raises RecipeError where the target has no such groups."""
    if by == "kind" and not ctx.target.quantize_interior:
        raise RecipeError(
            f"--by kind: target {ctx.target.name!r} quantizes weight and data of an operator "
            "together, expected tensor, role or layer"
        )
    origins = [_origin(s, recorded) for s in switches]
    groups: dict[str, list[int]] = {}
    for i, origin in enumerate(origins):
        groups.setdefault(_group(origin, by), []).append(i)
    return [_candidate(ctx, name, members, origins, by) for name, members in groups.items()]


def _origin(switch: FakeQuantSwitch, recorded: Mapping[Use, Origin]) -> Origin:
    """The record of its first known use; a use that a later pass added is named by its tensor."""
    for use in switch.uses:
        if use in recorded:
            return recorded[use]
    part = switch.parts[0]
    names = frozenset([part.tensor])
    return Origin((part.tensor,), names, part.kind, Role(("other",)), part.spec)


def _group(origin: Origin, by: By) -> str:
    if by == "role":
        return origin.role.names[0]
    if by == "layer":
        return "no layer" if origin.role.layer is None else f"layer {origin.role.layer}"
    return f"{origin.kind}s" if by == "kind" else origin.name


def _candidate(
    ctx: Context, name: str, members: list[int], origins: Sequence[Origin], by: By
) -> PrecisionCandidate:
    own = [origins[i] for i in members]
    layers = {o.role.layer for o in own}
    role_names = [*dict.fromkeys(o.role.names[0] for o in own)]
    return PrecisionCandidate(
        name=name,
        switches=tuple(members),
        raised=tuple(dict.fromkeys(_raised_precision(ctx, members, origins, by))),
        roles=", ".join(role_names[:3]) + (", …" if len(role_names) > 3 else ""),
        layer=layers.pop() if len(layers) == 1 else None,
        kinds=", ".join(sorted({_kind(ctx, o) for o in own})),
    )


def _kind(ctx: Context, origin: Origin) -> str:
    return origin.kind if ctx.target.quantize_interior else "operator"


def _raised_precision(
    ctx: Context, members: list[int], origins: Sequence[Origin], by: By
) -> list[tuple[str, Precision]]:
    """One pattern for the whole group where there is one; else one for each member."""
    first = origins[members[0]]
    bits = {_raised_bits(ctx, origins[i]) for i in members}
    whole = {
        "role": f"role:{first.role.names[0]}",
        "layer": f"role:*@{first.role.layer}",
        "kind": "role:*-weight",
        "tensor": "",
    }[by]
    if whole and len(bits) == 1 and _matches_of(whole, origins) == members:
        return [(whole, bits.pop())]
    return [(_pattern(origins, i), _raised_bits(ctx, origins[i])) for i in members]


def _pattern(origins: Sequence[Origin], member: int) -> str:
    """A glob for a name that only this member has; for its first name if there is none."""
    own = origins[member].own
    same = [i for i, o in enumerate(origins) if o.own == own]
    unique = (n for n in own if [i for i, o in enumerate(origins) if n in o.names] == same)
    return escaped(next(unique, own[0]))


def _matches_of(pattern: str, origins: Sequence[Origin]) -> list[int]:
    return [i for i, o in enumerate(origins) if matches(pattern, o.names)]


def escaped(name: str) -> str:
    """A glob that matches this name alone."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _raised_bits(ctx: Context, origin: Origin) -> Precision:
    """What the tensor becomes when raised: 16 bits if it has fewer and the target has them.

    A weight of few bits becomes one of 8.
    """
    if origin.spec is not None and origin.spec.width is not None:
        return 8
    wide = ctx.target.wide if origin.kind == "activation" else ctx.target.wide_weight
    has_wide = origin.spec is not None and origin.spec.dtype.endswith(str(_RAISED_BITS))
    # 16-bit activations need calibrated ranges; operators quantized as a whole have no 16 bits.
    can_raise = wide is not None and not has_wide and ctx.target.quantize_interior
    return 16 if can_raise and ctx.choices.mode == "static" else "float"
