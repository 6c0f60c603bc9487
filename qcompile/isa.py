"""What the integer kernels of a processor can add up: a table by instruction set, for recipes.

x86 without VNNI multiplies u8 by s8 with vpmaddubsw, which adds two neighbouring products in int16
and saturates: 255 · 127 · 2 does not fit, 255 · 64 · 2 does. So weights get 7 bits there. All
others add in int32. The machine that builds need not be the one that serves, and a build must not
depend on where it ran: nothing here looks at the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qcompile.target import OpRule, Target


@dataclass(frozen=True)
class Isa:
    """One instruction set, and the bits of weights whose products it adds exactly.

    ``gain``: products of u8 by s8 for each of float32 in the same time, at best; ``seen``: what
    ``machine.instruction_sets`` calls it.
    """

    name: str
    weight_bits: int
    why: str
    gain: float
    seen: tuple[str, ...]

    @property
    def saturates(self) -> bool:
        """True where sums of products of 8-bit weights need not fit."""
        return self.weight_bits < 8


_PAIRS = "vpmaddubsw adds two products in int16"
# Four times as many values in a vector, and three instructions (multiply, widen, add) for one.
_THREE_STEPS = 4 / 3
TABLE = {
    isa.name: isa
    for isa in (
        Isa("avx2", 7, _PAIRS, _THREE_STEPS, ("AVX2",)),
        Isa("avx512", 7, _PAIRS, _THREE_STEPS, ("AVX512F",)),
        Isa("avx-vnni", 8, "vpdpbusd adds four products in int32", 4, ("AVX-VNNI",)),
        Isa("avx512-vnni", 8, "vpdpbusd adds four products in int32", 4, ("AVX512-VNNI",)),
        # A tile does 32 times as many as two ports of AVX512, but memory does not feed it so fast.
        Isa("amx", 8, "tdpbusd adds in int32", 8, ("AMX-INT8",)),
        Isa("arm64", 8, "udot, usmmla and smlal add in int32", 4, ("I8MM", "DOTPROD")),
    )
}


def of_machine(sets: Sequence[str]) -> Isa | None:
    """The row of the first, which is the fastest, of a machine's instruction sets."""
    return next((isa for isa in TABLE.values() if sets and sets[0] in isa.seen), None)


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
