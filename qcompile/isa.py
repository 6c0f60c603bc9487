"""What the integer kernels of a processor can add up: a table by instruction set, for recipes.

x86 without VNNI multiplies u8 by s8 with vpmaddubsw, which adds two neighbouring products in int16
and saturates: 255 · 127 · 2 does not fit, 255 · 64 · 2 does. So weights get 7 bits there. All
others add in int32. The machine that builds need not be the one that serves, and a build must not
depend on where it ran: nothing here looks at the machine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qcompile.target import OpRule, Target


@dataclass(frozen=True)
class Isa:
    """One instruction set, and the bits of weights whose products it adds exactly."""

    name: str
    weight_bits: int
    why: str

    @property
    def saturates(self) -> bool:
        """True where sums of products of 8-bit weights need not fit."""
        return self.weight_bits < 8


_PAIRS = "vpmaddubsw adds two products in int16"
TABLE = {
    isa.name: isa
    for isa in (
        Isa("avx2", 7, _PAIRS),
        Isa("avx512", 7, _PAIRS),
        Isa("avx-vnni", 8, "vpdpbusd adds four products in int32"),
        Isa("avx512-vnni", 8, "vpdpbusd adds four products in int32"),
        Isa("amx", 8, "tdpbusd adds in int32"),
        Isa("arm64", 8, "udot, usmmla and smlal add in int32"),
    )
}


def fitted(target: Target, name: str) -> Target:
    """The target with integers that the instruction set adds exactly; itself for no name.

    Products of two activations are no default then: QuantizeLinear does not keep a value that lies
    outside of its range within 7 bits.
    """
    if not name or not TABLE[name].saturates:
        return target
    product = target.product and _reduced(target.product)
    rules = tuple(map(_reduced, target.rules))
    return replace(target, rules=rules, product=product, attention="float")


def _reduced(rule: OpRule) -> OpRule:
    """A rule of u8 by s8 with 7 bits on the right, any other as it is."""
    if rule.activation is None or rule.activation.dtype != "uint8":
        return rule
    changes = {}
    for side in ("weight", "right"):
        spec = getattr(rule, side)
        if spec is not None and spec.dtype == "int8":
            changes[side] = replace(spec, reduced=True)
    return replace(rule, **changes)
