"""Table of instruction sets: in how many bits their int8 kernels add, for a recipe's ``isa``.

x86 without VNNI multiplies uint8 by int8 with vpmaddubsw, which adds two neighbouring products in
int16 and saturates: 255 · 127 · 2 does not fit. All others add in int32. By default targets bound
int8 values so that both give the same; a recipe with an isa without that limit gets all 8 bits. The
machine that builds need not be the one that serves, and a build must not depend on where it ran:
only the name ``native`` reads the machine's instruction sets, and the resolved name is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qcompile.errors import RecipeError
from qcompile.targets.target import OpRule, Target

# Names for a recipe's isa that are not in the table.
ANY, NATIVE = "any", "native"


@dataclass(frozen=True)
class Isa:
    """One instruction set, and whether it adds products of 8-bit integers in too few bits.

    ``saturates``: the sum of two products may not fit. ``gain``: best speed-up of a linear layer of
    uint8 by int8 over float32, with its quantizer. ``seen``: names in ``kernels.instruction_sets``.
    """

    name: str
    saturates: bool
    why: str
    gain: float
    seen: tuple[str, ...]


_PAIRS = "vpmaddubsw adds two products in int16"
_FOURS = "vpdpbusd adds four products in int32"
# Measured by benchmarks/kernel_forms.py on AMD EPYC (Zen 4) with 128 tokens: docs/processors.md. An
# instruction set that was not measured has the gain of the one with the same instructions.
_WITH_PAIRS, _WITH_FOURS = 2.0, 3.5
TABLE = {
    isa.name: isa
    for isa in (
        Isa("avx2", True, _PAIRS, _WITH_PAIRS, ("AVX2",)),
        Isa("avx512", True, _PAIRS, _WITH_PAIRS, ("AVX512F",)),
        Isa("avx-vnni", False, _FOURS, _WITH_FOURS, ("AVX-VNNI",)),
        Isa("avx512-vnni", False, _FOURS, _WITH_FOURS, ("AVX512-VNNI",)),
        # A tile does 32 times as many as two ports of AVX512, but memory does not feed it so fast.
        Isa("amx", False, "tdpbusd adds in int32", 8, ("AMX-INT8",)),
        Isa("arm64", False, "udot, usmmla and smlal add in int32", 4, ("I8MM", "DOTPROD")),
    )
}


def of_machine(sets: Sequence[str]) -> Isa | None:
    """The row of the first (fastest) of a machine's instruction sets, None if not in the table."""
    return next((isa for isa in TABLE.values() if sets and sets[0] in isa.seen), None)


def resolved(name: str, here: Callable[[], Sequence[str]]) -> str:
    """A name as a recipe keeps it: ``native`` becomes this machine's, ``any`` becomes ""

    ``here`` gives the machine's instruction sets, fastest first. Raises RecipeError where the table
    has none of them.
    """
    if not isinstance(name, str):
        raise RecipeError(f"isa is {name!r}, expected a name")
    name = name.lower()
    if name == ANY:
        return ""
    if name != NATIVE:
        return name
    found = of_machine(sets := here())
    if found is None:
        seen = ", ".join(sets) or "none of them"
        known = ", ".join(TABLE)
        raise RecipeError(f"isa native: this machine has {seen}, expected one of {known}")
    return found.name


def saturating(name: str) -> bool:
    """True where a model with this isa in its recipe may run where sums saturate."""
    return not name or TABLE[name].saturates


def exact(name: str) -> bool:
    """True where a model with this isa in its recipe may run where sums are exact."""
    return not name or not TABLE[name].saturates


def fitted(target: Target, name: str) -> Target:
    """The target with int8 bounds for the instruction set.

    Where sums may saturate, that is the target itself; else its rules with all 8 bits, unbounded.
    """
    if saturating(name):
        return target
    product = target.product and _unbounded(target.product)
    return replace(target, rules=tuple(map(_unbounded, target.rules)), product=product)


def _unbounded(rule: OpRule) -> OpRule:
    """A rule of uint8 by int8 with all 8 bits; any other unchanged."""
    if not _is_u8_s8(rule):
        return rule
    unbounded = {
        side: replace(spec, reduced=False, paired=False)
        for side in ("weight", "right")
        if (spec := getattr(rule, side)) is not None
    }
    return replace(rule, **unbounded)


def _is_u8_s8(rule: OpRule) -> bool:
    sides = [s.dtype for s in (rule.weight, rule.right) if s is not None]
    return rule.activation is not None and rule.activation.dtype == "uint8" and "int8" in sides
