"""The gate on size: weights must not take more bytes than in the input model.

Only constants count, and growth of more than 1 KiB: nodes, names and metadata are no weights,
quantizers add a few bytes each, and masks or positions that are computed at compile time from a few
numbers are no copies of anything. A file that is not larger passes in any case.
"""

from __future__ import annotations

from qcompile.compiler.stages.rewrite import Rewritten

_ROOM = 1 << 10  # bytes
_NAMED = 3  # tensors in a message


def size_failures(rewritten: Rewritten) -> tuple[str, ...]:
    """Why the gate fails, with the tensors that grew; empty where it passes or is off."""
    prepared = rewritten.prepared
    limit = prepared.gates.max_size_ratio
    before, after = prepared.float_model.weights, rewritten.weights
    ratio = rewritten.compiled.size / max(prepared.float_model.size, 1)
    old, new = sum(before.values()), sum(after.values())
    if limit is None or ratio <= limit or new <= limit * old + _ROOM:
        return ()
    growth = {name: size - before.get(name, 0) for name, size in after.items()}
    grown = sorted((n for n, more in growth.items() if more > 0), key=lambda n: (-growth[n], n))
    listed = ", ".join(f"{n} {before.get(n, 0):,} -> {after[n]:,}" for n in grown[:_NAMED])
    rest = f" and {len(grown) - _NAMED} more" if len(grown) > _NAMED else ""
    keep = "" if prepared.mode == "float" else "leave them float by --keep-float NAME, or "
    return (
        f"compiled is {ratio:.2f} times as large as float, over {limit:g} (--max-size-ratio): "
        f"weights take {new:,} bytes instead of {old:,}; larger in bytes: {listed}{rest} "
        f"({keep}allow it by --max-size-ratio {_rounded_up(ratio):g})",
    )


def _rounded_up(ratio: float) -> float:
    """The ratio with two decimals, so that it is not below what was found."""
    return -(-ratio * 100 // 1) / 100
