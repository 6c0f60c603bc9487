"""Laws that every registered pass obeys on a small corpus, and proof that each check can fail.

Verified: the graph is valid after the pass, and changed exactly where the pass says so. Idempotent:
a second run changes nothing. Deterministic: same graph in, same graph out, in every process.
Numerics: as declared. ``insert-qdq`` carries a plan out; it is idempotent because uses that read a
dequantized tensor already are not carried out again.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from qcompile.errors import PassError
from qcompile.ir import Graph, array, is_constant
from qcompile.ir.printer import dump
from qcompile.passes.lower.insert_qdq import InsertQdq
from qcompile.planning import Context
from qcompile.quant import Array, QSpec, sqnr_db
from qcompile.rewriting import Numerics, Pass, Stage
from qcompile.rewriting.registry import passes
from qcompile.rewriting.testing import context, outputs, plan_text, run_pass
from qcompile.targets.target import INT4_SINCE, OpRule, Target
from tests.passes.corpus import CORPUS, F32, Feed, calibrate, embedding, feeds

ROOT = Path(__file__).resolve().parents[2]

# Passes that have something to do on another target, or in another mode.
TARGETS = dict.fromkeys(("plan-interior", "group-scales", "guard-rows", "shield-groups"), "qdq")
TARGETS |= {"halve-floats": "cuda", "narrow-qdq": "qdq"}
# They have something to do where weights have few bits: so many. Transforms are held to the noise
# of 8 bits.
FEW_BITS = {"store-few-bits": 4, "narrow-qdq": 4, "tie-tables": 7}
MODES = {"lower-weight-only": "weight-only"}
# What must have run before a pass has something to do, beside what its ``after`` says. Passes of
# the transform stage need a plan.
_CONVOLUTIONS = ("plan-operands", "plan-convolutions")
NEEDS = {
    "move-dequantize": ("fold-constants",),
    "shift-integers": ("fold-constants", "move-dequantize"),
    "sink-dequantize": ("fold-constants", "move-dequantize"),
    "insert-qdq": ("plan-operands",),
    "cancel-requantize": (*_CONVOLUTIONS, "share-ranges", "insert-qdq"),
    "lower-convolutions": (*_CONVOLUTIONS, "insert-qdq"),
    "lower-sums": (*_CONVOLUTIONS, "insert-qdq"),
    "share-ranges": _CONVOLUTIONS,
    "trim-ranges": _CONVOLUTIONS,
    "fit-biases": (*_CONVOLUTIONS, "insert-qdq"),
    "store-few-bits": ("raise-opset", *_CONVOLUTIONS, "insert-qdq"),
    "narrow-qdq": ("raise-opset", *_CONVOLUTIONS, "insert-qdq"),
    "group-scales": ("plan-operands", "plan-interior"),
    "guard-joins": (*_CONVOLUTIONS, "plan-joins"),
    "guard-rows": ("plan-operands", "plan-interior"),
    "plan-joins": _CONVOLUTIONS,
    "shield-floats": (*_CONVOLUTIONS, "insert-qdq"),
    "guard-scores": ("plan-operands", "plan-products"),
    "lower-recurrent": ("plan-recurrent", "insert-qdq"),
    "dequantize-at-load": ("plan-stored", "insert-qdq"),
    "lower-products": ("plan-operands", "plan-products", "insert-qdq"),
    "fuse-requantize": ("plan-operands", "plan-products", "insert-qdq"),
    "fuse-bias-gelu": ("fuse-gelu",),
    "approximate-gelu": ("fuse-gelu", "plan-operands", "insert-qdq"),
    "shield-groups": ("plan-operands", "plan-interior", "group-scales", "insert-qdq"),
}
# Passes that take the place of some that come after them: those find nothing left to do.
INSTEAD = ("split-groups",)
# Passes that a second run takes further, and why that is meant.
FURTHER = {
    "widen-ranges": "so many doublings more",
    "correct-bias": "the mean error is that of the products, which no bias changes",
}


def prepared(item: Pass, make: Callable[[], Graph]) -> tuple[Graph, Context]:
    """A fresh graph on which all has run that comes before the pass, and what it looks at."""
    mode = MODES.get(item.name, "static")
    ctx = context(TARGETS.get(item.name, "cpu"), mode=mode, attention="all")
    if item.name in FEW_BITS:
        ctx.target = with_few_bits(ctx.target, FEW_BITS[item.name])
    graph = make()
    for earlier in before(item):
        run_pass(graph, earlier, ctx=calibrate(graph, ctx, earlier))
    return graph, calibrate(graph, ctx, item)


def with_few_bits(target: Target, bits: int) -> Target:
    """The target with weights of so many bits, as if a recipe asked for them."""
    rules = [r if r.weight is None else _of_few_bits(r, r.weight, bits) for r in target.rules]
    return replace(target, rules=tuple(rules), wide_weight=None, opset=INT4_SINCE)


def _of_few_bits(rule: OpRule, weight: QSpec, bits: int) -> OpRule:
    return replace(rule, weight=replace(weight, paired=False, width=bits), min_bytes=0)


def before(item: Pass) -> list[Pass]:
    """Passes that come before, each once, in an order that fits them all."""
    found: dict[str, Pass] = {}
    planned = ("plan-operands",) if item.stage is Stage.TRANSFORM else ()
    for name in (*NEEDS.get(item.name, planned), *item.after):
        if name in INSTEAD:
            continue
        needed = passes()[name]()
        found |= {p.name: p for p in (*before(needed), needed)}
    return sorted(found.values(), key=lambda p: p.stage)


def work(graph: Graph, ctx: Context) -> str:
    """All that a pass may change: the graph, or what later passes make of it."""
    ranges = [f"{n} in {s.lo} {s.hi} {s.axis}\n" for n, s in ctx.ranges.found.items()]
    rounded = [f"{n} as {digest(r.values)}\n" for n, r in ctx.rounded.items()]
    seen = [f"{n} from {digest(c.lo, c.hi, c.rows)}\n" for n, c in ctx.channels.items()]
    asked = [f"{r} asked\n" for r in ctx.requests]
    return dump(graph) + plan_text(ctx) + "".join([*ranges, *rounded, *seen, *asked])


def digest(*values: Array) -> str:
    """A short hash of the bytes of arrays."""
    data = b"".join(np.ascontiguousarray(v).tobytes() for v in values)
    return hashlib.sha256(data).hexdigest()[:12]


def state(graph: Graph, ctx: Context) -> str:
    """What a pass did, and what it refused."""
    return work(graph, ctx) + "".join(f"{s}\n" for s in ctx.skips)


# The laws -------------------------------------------------------------------------------------


def violations(item: Pass, make: Callable[[], Graph]) -> list[str]:
    """The laws that a pass breaks on one graph."""
    graph, ctx = prepared(item, make)
    expected = [outputs(graph, feed) for feed in feeds(graph)]
    try:
        run_pass(graph, item, ctx=ctx)
    except PassError as e:
        return [str(e)]
    once = state(graph, ctx)
    found = departures(graph, expected, item.numerics)
    other, other_ctx = prepared(item, make)
    run_pass(other, item, ctx=other_ctx)
    if state(other, other_ctx) != once:
        found.append("not deterministic")
    if item.stage is Stage.TRANSFORM:  # what it does to answers shows once carried out
        run_pass(other, InsertQdq(), ctx=other_ctx)
        found += departures(other, expected, Numerics.LOSSY)
    # A transform that has been made is often refused by name when tried again: nothing would help.
    transform, done = item.stage is Stage.TRANSFORM, work(graph, ctx)
    run_pass(graph, item, ctx=ctx)
    if work(graph, ctx) != done if transform else state(graph, ctx) != once:
        found.append("not idempotent")
    return found


def departures(graph: Graph, expected: Sequence[Feed], declared: Numerics) -> list[str]:
    """Outputs that are further from what is expected than declared."""
    found = []
    for feed, old in zip(feeds(graph), expected, strict=True):
        new = outputs(graph, feed)
        reasons = ((name, noise(declared, old[name], new[name])) for name in old)
        found += [f"{name}: {why}" for name, why in reasons if why]
    return found


def noise(declared: Numerics, old: Array, new: Array) -> str:
    """How an output breaks the declared numerics, "" where it keeps them.

    Rounding: a few dozen operators round by 2^-24 of values as large as the largest output, say 64
    times. Lossy: a tensor in 255 steps of its range, about 8 sigma, has 40 dB; noise of 100 such
    tensors adds up to 20 dB.
    """
    if (old.shape, old.dtype) != (new.shape, new.dtype):
        return f"{new.dtype}{list(new.shape)}, expected {old.dtype}{list(old.shape)}"
    worst = float(np.abs(new - old).max())
    if declared is Numerics.EXACT and not np.array_equal(old, new):
        return f"not bit-equal, off by {worst:.3g}"
    if declared is Numerics.ROUNDING and worst > 64 * 2.0**-24 * np.abs(old).max():
        return f"off by {worst:.3g}, more than rounding"
    if declared is Numerics.LOSSY and sqnr_db(old, new) < 20:
        return f"SQNR is {sqnr_db(old, new):.1f} dB, less than 20"
    return ""


def untested(code: Path, tests: Path) -> list[str]:
    """Modules of a folder that have no test file in the same place."""
    modules = sorted(p.relative_to(code) for p in code.rglob("*.py") if p.stem[0] != "_")
    return [m.stem for m in modules if not (tests / m.with_name(f"test_{m.name}")).is_file()]


def states(items: Sequence[Pass]) -> str:
    """What all passes make of the corpus."""
    made = []
    for item in items:
        for name, make in CORPUS.items():
            graph, ctx = prepared(item, make)
            run_pass(graph, item, ctx=ctx)
            made.append(f"--- {item.name} on {name}\n{state(graph, ctx)}")
    return "".join(made)


def states_in_a_process(hash_seed: int, *arguments: str) -> str:
    """The same in a process of its own, where sets of strings have another order."""
    command = [sys.executable, "-W", "error", __file__, *arguments]
    env = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout


# Every pass obeys them ------------------------------------------------------------------------


@pytest.mark.parametrize("graph", CORPUS)
@pytest.mark.parametrize("name", passes())
def test_every_pass_obeys_the_laws(name: str, graph: str) -> None:
    found = violations(passes()[name](), CORPUS[graph])
    assert [f for f in found if name not in FURTHER or f != "not idempotent"] == []


@pytest.mark.parametrize("name", passes())
def test_every_pass_has_something_to_do_in_the_corpus(name: str) -> None:
    """Without this the laws might hold because nothing happens."""
    item = passes()[name]()
    assert any(acts(item, make) for make in CORPUS.values())


def acts(item: Pass, make: Callable[[], Graph]) -> bool:
    """True where a pass changes a graph or a plan."""
    graph, ctx = prepared(item, make)
    old = work(graph, ctx)
    run_pass(graph, item, ctx=ctx)
    return work(graph, ctx) != old


@pytest.mark.parametrize("name", FURTHER)
def test_what_is_excused_from_a_law_does_break_it(name: str) -> None:
    assert "not idempotent" in violations(passes()[name](), CORPUS["linear"])


def test_hash_order_shows_in_no_output() -> None:
    with ThreadPoolExecutor() as together:
        first, second = together.map(states_in_a_process, (1, 2))
    assert first == second
    assert first.count("---") == len(passes()) * len(CORPUS)


def test_every_pass_has_a_test_file() -> None:
    assert untested(ROOT / "passes", Path(__file__).parent) == []


# Each check can fail --------------------------------------------------------------------------


@dataclass(frozen=True)
class Broken(Pass):
    """Breaks one law at a time."""

    name: ClassVar[str] = "broken"
    stage: ClassVar[Stage] = Stage.SIMPLIFY
    numerics: ClassVar[Numerics] = Numerics.EXACT


class DoesNothing(Broken):
    def run(self, graph: Graph, ctx: Context) -> bool:
        return False


class ClaimsAChange(Broken):
    def run(self, graph: Graph, ctx: Context) -> bool:
        return True


class HidesAChange(Broken):
    def run(self, graph: Graph, ctx: Context) -> bool:
        append_identity(graph, "y/same")
        return False


class LeavesADanglingInput(Broken):
    def run(self, graph: Graph, ctx: Context) -> bool:
        node = graph.nodes[-1]
        node.inputs[0] = type(graph.inputs[0])("nowhere")
        return True


class Scales(Broken):
    """Multiplies each large constant by a factor, once."""

    factor: ClassVar[float] = 1 + 2.0**-20

    def run(self, graph: Graph, ctx: Context) -> bool:
        changed = False
        for node in graph.nodes:
            for i, tensor in enumerate(node.inputs):
                if is_constant(tensor) and len(tensor.shape) == 2 and "/" not in tensor.name:
                    scaled = (array(tensor) * self.factor).astype(F32)
                    graph.set_constant(node, i, scaled, f"{tensor.name}/scaled")
                    changed = True
        return changed


class RoundsTooMuch(Scales):
    numerics: ClassVar[Numerics] = Numerics.ROUNDING
    factor: ClassVar[float] = 1.001


class LosesTooMuch(Scales):
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    factor: ClassVar[float] = 1.2


class Repeats(Broken):
    def run(self, graph: Graph, ctx: Context) -> bool:
        append_identity(graph, "y/same")
        return True


class Counts(Broken):
    """Names depend on how often the pass ran in this process."""

    count: ClassVar[itertools.count[int]] = itertools.count()

    def run(self, graph: Graph, ctx: Context) -> bool:
        if any("/run" in n.name for n in graph.nodes):
            return False
        append_identity(graph, f"y/run{next(self.count)}")
        return True


class WalksASet(Broken):
    def run(self, graph: Graph, ctx: Context) -> bool:
        for name in {f"{n.op}/set" for n in graph.nodes}:
            append_identity(graph, name)
        return True


def append_identity(graph: Graph, name: str) -> None:
    """y becomes a copy of what it was."""
    output = graph.outputs[0]
    maker = graph.producer(output)
    assert maker is not None
    inner = graph.add("Identity", [maker.inputs[0]], [name]).outputs[0]
    graph.set_input(maker, 0, inner)


@pytest.mark.parametrize(
    ("item", "found"),
    [
        (ClaimsAChange(), ["pass 'broken' returned True, but the graph did not change"]),
        (HidesAChange(), ["pass 'broken' returned False, but the graph changed"]),
        (
            LeavesADanglingInput(),
            ["after pass 'broken': inputs-come-first: node 'MatMul:y' (MatMul) reads tensor "
             "'nowhere', produced later or not at all"],
        ),
        (Repeats(), ["not idempotent"]),
        (Counts(), ["not deterministic"]),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_a_pass_that_breaks_a_law_is_found(item: Pass, found: list[str]) -> None:
    assert violations(item, embedding) == found


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (Scales(), "y: not bit-equal, off by"),
        (RoundsTooMuch(), "more than rounding"),
        (LosesTooMuch(), "dB, less than 20"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_pass_that_changes_more_than_declared_is_found(item: Pass, reason: str) -> None:
    found = violations(item, embedding)
    assert len(found) == 2  # one for each feed
    assert all(reason in f for f in found)


def test_a_pass_that_does_nothing_is_found() -> None:
    assert not acts(DoesNothing(), embedding)
    assert acts(Repeats(), embedding)


def test_numerics_know_shape_and_type() -> None:
    old = np.zeros((2, 3), F32)
    assert (
        noise(Numerics.EXACT, old, np.zeros((3, 2), F32)) == "float32[3, 2], expected float32[2, 3]"
    )
    assert "float64" in noise(Numerics.EXACT, old, np.zeros((2, 3)))


def test_a_pass_that_walks_a_set_is_found() -> None:
    assert states_in_a_process(1, "--broken") != states_in_a_process(2, "--broken")


def test_a_module_without_a_test_is_found(tmp_path: Path) -> None:
    code, tests = tmp_path / "passes", tmp_path / "tests"
    for path in (code / "fuse.py", code / "fold.py", code / "__init__.py", tests / "test_fold.py"):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert untested(code, tests) == ["fuse"]


if __name__ == "__main__":
    registered = [cls() for cls in passes().values()]
    sys.stdout.write(states([WalksASet()] if "--broken" in sys.argv else registered))
