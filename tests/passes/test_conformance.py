"""Laws that every registered pass obeys on a small corpus, and proof that each check can fail.

Verified: the graph is valid after the pass, and changed exactly where the pass says so. Idempotent:
a second run changes nothing. Deterministic: same graph in, same graph out, in every process.
Numerics: as declared. ``insert-qdq`` carries a plan out; it is idempotent because uses that read a
dequantized tensor already are not carried out again.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import pytest

from qcompile.api import Context, Numerics, Pass, Stage
from qcompile.errors import PassError
from qcompile.export import serialize
from qcompile.graph import Graph, array, is_constant
from qcompile.qtypes import Array, Range, sqnr_db
from qcompile.registry import passes
from qcompile.runtime import Session, SessionOptions, with_outputs
from qcompile.testing import context, normal, outputs, parse, plan_text, run_pass
from qcompile.text import dump

ROOT = Path(__file__).resolve().parents[2]
Feed = dict[str, Array]
F32 = np.float32


def linear() -> Graph:
    """A linear with what exporters leave around it, in an opset that is to be raised."""
    return parse(
        """<ir_version: 8, opset_import: ["": 14]>
        g (float[B,S,8] x, float[8,6] w, float[6] b, float[6,8] v, int64[2] rows)
            => (float[B,S,6] y, float[R,6] z) {
            i = Identity(x)
            m = MatMul(i, w)
            n = Neg(b)
            y = Add(m, n)
            j = Relu(x)
            k = Relu(x)
            l = Add(j, k)
            f = Reshape(l, rows)
            z = Gemm<transB = 1>(f, v, )
        }""",
        w=normal(8, 6),
        b=normal(6),
        v=normal(6, 8),
        rows=np.array([-1, 8]),
    )


def attention() -> Graph:
    """Two heads, shapes computed at run time, a mask made of integers, a residual sum."""
    return parse(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[B,S,8] x, int64[B,S] mask, float[8,8] wq, float[8] bq, float[8,8] wk,
            float[8,8] wv, float[8,8] wo, float[8] bo, float root, float one, float low,
            int64 zero, int64 first, int64[1] axes, int64[2] heads, int64[1] width, int64[2] inner)
            => (float[B,S,8] y) {
            s = Shape(x)
            d0 = Gather(s, zero)
            d1 = Gather(s, first)
            v0 = Unsqueeze(d0, axes)
            v1 = Unsqueeze(d1, axes)
            split = Concat<axis = 0>(v0, v1, heads)
            joined = Concat<axis = 0>(v0, v1, width)
            qm = MatMul(x, wq)
            qb = Add(qm, bq)
            qr = Reshape(qb, split)
            q = Transpose<perm = [0, 2, 1, 3]>(qr)
            km = MatMul(x, wk)
            kr = Reshape(km, split)
            k = Transpose<perm = [0, 2, 3, 1]>(kr)
            vm = MatMul(x, wv)
            vr = Reshape(vm, split)
            v = Transpose<perm = [0, 2, 1, 3]>(vr)
            qk = MatMul(q, k)
            scores = Div(qk, root)
            float_mask = Cast<to = 1>(mask)
            wide = Unsqueeze(float_mask, inner)
            hidden = Sub(one, wide)
            bias = Mul(hidden, low)
            masked = Add(scores, bias)
            p = Softmax(masked)
            c = MatMul(p, v)
            ct = Transpose<perm = [0, 2, 1, 3]>(c)
            cr = Reshape(ct, joined)
            om = MatMul(cr, wo)
            o = Add(om, bo)
            y = Add(o, x)
        }""",
        **{name: normal(8, 8, seed=i) for i, name in enumerate(("wq", "wk", "wv", "wo"))},
        bq=normal(8),
        bo=normal(8, seed=1),
        root=np.array(2, F32),
        one=np.array(1, F32),
        low=np.array(-3.4e38, F32),
        zero=np.array(0),
        first=np.array(1),
        axes=np.array([0]),
        heads=np.array([2, 4]),
        width=np.array([8]),
        inner=np.array([1, 2]),
    )


def layernorm() -> Graph:
    """A decomposed layer normalization between two linears that share their weight."""
    return parse(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[B,S,8] x, float[8,8] w, float[8] g, float[8] b, float e, float two)
            => (float[B,S,8] y, float[B,S,8] a) {
            a = MatMul(x, w)
            m = ReduceMean<axes = [-1]>(a)
            d = Sub(a, m)
            q = Pow(d, two)
            v = ReduceMean<axes = [-1]>(q)
            s = Add(v, e)
            r = Sqrt(s)
            n = Div(d, r)
            h = Mul(n, g)
            o = Add(h, b)
            y = MatMul(o, w)
        }""",
        w=normal(8, 8),
        g=normal(8),
        b=normal(8, seed=1),
        e=np.array(1e-5, F32),
        two=np.array(2, F32),
    )


def gelu() -> Graph:
    """Both forms of GELU, one after a linear."""
    scalars = {"root": 2**0.5, "one": 1, "half": 0.5, "three": 3, "cubic": 0.044715}
    return parse(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[B,S,8] x, float[8,8] w, float root, float one, float half, float three,
            float cubic, float slope) => (float[B,S,8] y, float[B,S,8] z) {
            m = MatMul(x, w)
            d = Div(m, root)
            e = Erf(d)
            a = Add(e, one)
            p = Mul(m, a)
            y = Mul(p, half)
            c = Pow(x, three)
            f = Mul(c, cubic)
            g = Add(x, f)
            h = Mul(g, slope)
            t = Tanh(h)
            u = Add(t, one)
            v = Mul(x, half)
            z = Mul(v, u)
        }""",
        w=normal(8, 8),
        slope=np.array((2 / np.pi) ** 0.5, F32),
        **{name: np.array(value, F32) for name, value in scalars.items()},
    )


def embedding() -> Graph:
    """Two tables, one large enough to be quantized, their sum normalized."""
    return parse(
        """<ir_version: 8, opset_import: ["": 17]>
        g (int64[B,S] ids, float[65536,4] words, float[2,4] types, int64 zero, float[4] g,
            float[4] b, float[4,4] w) => (float[B,S,4] y) {
            e = Gather(words, ids)
            t = Gather(types, zero)
            s = Add(e, t)
            n = LayerNormalization<axis = -1>(s, g, b)
            y = MatMul(n, w)
        }""",
        words=normal(65536, 4),
        types=normal(2, 4),
        zero=np.array(0),
        g=normal(4),
        b=normal(4, seed=1),
        w=normal(4, 4),
    )


def branch() -> Graph:
    """An If whose bodies read outer tensors, among them a weight that a linear reads too."""
    return parse(
        """<ir_version: 8, opset_import: ["": 17]>
        g (bool c, float[B,S,8] x, float[8,8] w, float[8] b, float lo) => (float[B,S,8] y) {
            i = Clip(x, , lo)
            h = Identity(i)
            m = MatMul(h, w)
            a = Add(m, b)
            r = If (c) <
                then_branch = yes () => (float[B,S,8] p) { k = MatMul(h, w) p = Add(k, a) },
                else_branch = no () => (float[B,S,8] q) { q = Neg(m) }
            >
            n = Mul(a, b)
            v = MatMul(n, w)
            y = Add(r, v)
        }""",
        w=normal(8, 8),
        b=normal(8),
        lo=np.array(2, F32),
    )


CORPUS: dict[str, Callable[[], Graph]] = {
    "attention": attention,
    "branch": branch,
    "embedding": embedding,
    "gelu": gelu,
    "layernorm": layernorm,
    "linear": linear,
}


def feeds(graph: Graph) -> list[Feed]:
    """A batch of one token, and one of odd sizes with padding."""
    made: list[Feed] = []
    for seed, (batch, length) in enumerate(((1, 1), (2, 5))):
        mask = np.ones((batch, length), np.int64)
        mask[0, 3:] = 0
        values: Feed = {
            "x": normal(batch, length, 8, seed=seed),
            "ids": np.random.default_rng(seed).integers(0, 65536, (batch, length)),
            "mask": mask,
            "c": np.array(seed == 0),
        }
        made.append({t.name: values[t.name] for t in graph.inputs})
    return made


# What must have run before a pass has something to do, beside what its ``after`` says.
NEEDS = {"insert-qdq": ("plan-operands",)}


def prepared(item: Pass, make: Callable[[], Graph]) -> tuple[Graph, Context]:
    """A fresh graph on which all has run that comes before the pass, with calibrated ranges."""
    weight_only = item.name == "lower-weight-only"
    ctx = context(
        "qdq" if item.name == "plan-interior" else "cpu",
        mode="weight-only" if weight_only else "static",
    )
    graph = make()
    for earlier in before(item):
        run_pass(graph, earlier, ctx=ctx)
        calibrate(graph, ctx)
    return graph, ctx


def before(item: Pass) -> list[Pass]:
    """Passes that come before, each once, in an order that fits them all."""
    found: dict[str, Pass] = {}
    for name in (*NEEDS.get(item.name, ()), *item.after):
        needed = passes()[name]()
        found |= {p.name: p for p in (*before(needed), needed)}
    return list(found.values())


def calibrate(graph: Graph, ctx: Context) -> None:
    """The ranges asked for, from one run of the float graph on all feeds."""
    wanted = [r.tensor for r in ctx.requests if ctx.ranges.get(r.tensor) is None]
    if not wanted:
        return
    tapped = with_outputs(onnx.ModelProto.FromString(serialize(graph)), wanted)
    session = Session(tapped.SerializeToString(), SessionOptions(threads=1, optimize=False))
    seen = [session.run(feed) for feed in feeds(graph)]
    for name in wanted:
        values = np.concatenate([s[name].reshape(-1) for s in seen])
        ctx.ranges.set(name, Range(values.min(), values.max()))


def state(graph: Graph, ctx: Context) -> str:
    """All that a pass may change."""
    return dump(graph) + plan_text(ctx) + "".join(f"{s}\n" for s in ctx.skips)


# The laws -------------------------------------------------------------------------------------


def violations(item: Pass, make: Callable[[], Graph]) -> list[str]:
    """The laws that a pass breaks on one graph."""
    graph, ctx = prepared(item, make)
    expected = [outputs(graph, feed) for feed in feeds(graph)]
    try:
        run_pass(graph, item, ctx=ctx)
    except PassError as e:
        return [str(e)]
    found = []
    once = state(graph, ctx)
    for feed, old in zip(feeds(graph), expected, strict=True):
        new = outputs(graph, feed)
        found += [f"{name}: {why}" for name in old if (why := noise(item, old[name], new[name]))]
    other, other_ctx = prepared(item, make)
    run_pass(other, item, ctx=other_ctx)
    if state(other, other_ctx) != once:
        found.append("not deterministic")
    run_pass(graph, item, ctx=ctx)
    if state(graph, ctx) != once:
        found.append("not idempotent")
    return found


def noise(item: Pass, old: Array, new: Array) -> str:
    """How an output breaks the declared numerics, "" where it keeps them.

    Rounding: a few dozen operators round by 2^-24 of values as large as the largest output, say 64
    times. Lossy: a tensor in 255 steps of its range, about 8 sigma, has 40 dB; noise of 100 such
    tensors adds up to 20 dB.
    """
    if (old.shape, old.dtype) != (new.shape, new.dtype):
        return f"{new.dtype}{list(new.shape)}, expected {old.dtype}{list(old.shape)}"
    worst = float(np.abs(new - old).max())
    if item.numerics is Numerics.EXACT and not np.array_equal(old, new):
        return f"not bit-equal, off by {worst:.3g}"
    if item.numerics is Numerics.ROUNDING and worst > 64 * 2.0**-24 * np.abs(old).max():
        return f"off by {worst:.3g}, more than rounding"
    if item.numerics is Numerics.LOSSY and sqnr_db(old, new) < 20:
        return f"SQNR is {sqnr_db(old, new):.1f} dB, less than 20"
    return ""


def untested(code: Path, tests: Path) -> list[str]:
    """Modules of a folder that have no test file."""
    names = sorted(p.stem for p in code.glob("*.py") if not p.stem.startswith("_"))
    return [name for name in names if not (tests / f"test_{name}.py").is_file()]


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
    assert violations(passes()[name](), CORPUS[graph]) == []


@pytest.mark.parametrize("name", passes())
def test_every_pass_has_something_to_do_in_the_corpus(name: str) -> None:
    """Without this the laws might hold because nothing happens."""
    item = passes()[name]()
    acted = []
    for make in CORPUS.values():
        graph, ctx = prepared(item, make)
        old = dump(graph) + plan_text(ctx)
        run_pass(graph, item, ctx=ctx)
        acted.append(dump(graph) + plan_text(ctx) != old)
    assert any(acted)


def test_hash_order_shows_in_no_output() -> None:
    first, second = (states_in_a_process(seed) for seed in (1, 2))
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
        (ClaimsAChange(), ["pass 'broken' said changed=True, but the graph is as it was"]),
        (HidesAChange(), ["pass 'broken' said changed=False, but the graph changed"]),
        (
            LeavesADanglingInput(),
            ["after pass 'broken': inputs-come-first: node 'MatMul:y' (MatMul) reads tensor "
             "'nowhere', made later or by nothing"],
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


def test_numerics_know_shape_and_type() -> None:
    old = np.zeros((2, 3), F32)
    assert noise(Repeats(), old, np.zeros((3, 2), F32)) == "float32[3, 2], expected float32[2, 3]"
    assert "float64" in noise(Repeats(), old, np.zeros((2, 3)))


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
