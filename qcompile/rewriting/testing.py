"""Helpers for tests of passes: graphs from text, FileCheck on dumps, differential runs."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx.parser

from qcompile.ir import Graph
from qcompile.ir.analysis import shape_inference
from qcompile.ir.model_io.from_proto import from_proto
from qcompile.ir.model_io.to_proto import serialize
from qcompile.ir.printer import dump
from qcompile.planning import Context, PassSettings, PrecisionRule
from qcompile.planning.context import Precision
from qcompile.quant import Array
from qcompile.rewriting import graph_verifier, registry
from qcompile.rewriting.instruments import Verify
from qcompile.rewriting.pass_base import Pass
from qcompile.rewriting.pass_manager import PassManager
from qcompile.runtime.session import Session, SessionOptions, evaluate

# The directives of filecheck, which silently ignores everything else.
_DIRECTIVE = re.compile(r"CHECK(-(NEXT|NOT|DAG|SAME|LABEL|COUNT-[1-9]\d*))?(\{LITERAL\})?:")

# The domain of an operator in the text of a graph: ``y = com.microsoft.Gelu(x)``.
_DOMAIN = re.compile(r"= ?([a-z][\w.]*)\.\w+ ?[<(]")

# Sizes of symbolic dimensions in differential runs: all one, and odd ones.
_DIMS = ((1, 1), (2, 5), (3, 17))


def normal(*shape: int, seed: int = 0) -> Array:
    """Standard normal float32 values, the same in every run."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def model_proto(text: str, opset: int = 17, /, **weights: Array) -> onnx.ModelProto:
    """A model from ONNX text; ``weights`` become initializers of those names.

    Text that begins with its graph gets a header: ``opset``, and version 1 of other domains whose
    operators it names. A weight needs no declaration; an input of its name gives way to it.

    Raises:
        onnx.parser.ParseError: The text is no model.
    """
    if not text.lstrip().startswith("<"):
        domains = {"": opset, **dict.fromkeys(_DOMAIN.findall(text), 1)}
        imports = ", ".join(f'"{name}": {version}' for name, version in domains.items())
        text = f"<ir_version: 8, opset_import: [{imports}]> {text}"
    model = onnx.parser.parse_model(text)
    inputs = [i for i in model.graph.input if i.name not in weights]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    for name, values in weights.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
    return model


def parse(text: str, opset: int = 17, /, **weights: Array) -> Graph:
    """A graph from ONNX text, as ``model_proto`` reads it; valid, and with inferred shapes."""
    model = model_proto(text, opset, **weights)
    onnx.checker.check_model(model)
    graph = from_proto(model)
    shape_inference.infer(graph)
    return graph


def context(
    target: str = "cpu", precision: Iterable[tuple[str, Precision]] = (), **choices: Any
) -> Context:
    """A context as in a compilation, with ``precision`` as in a recipe."""
    rules = tuple(PrecisionRule(*pair) for pair in precision)
    return Context(registry.target(target), evaluate, PassSettings(precision=rules, **choices))


def run_pass(graph: Graph, *items: Pass, ctx: Context | None = None) -> Context:
    """Run passes with the verifier on; returns the context with its skips."""
    ctx = ctx or context()
    PassManager(items, (Verify(),)).run(graph, ctx)
    graph_verifier.verify_graph(graph)
    return ctx


def assert_refused(graph: Graph, item: Pass, reason: str, ctx: Context | None = None) -> Context:
    """Assert that a pass leaves the graph unchanged and reports this reason (a part of it)."""
    before = dump(graph)
    ctx = run_pass(graph, item, ctx=ctx)
    reasons = [s.reason for s in ctx.skips if s.pass_name == item.name]
    assert dump(graph) == before, f"{item.name} changed the graph:\n{dump(graph)}"
    assert any(reason in r for r in reasons), f"no reason with {reason!r} in {reasons}"
    return ctx


def differential(
    graph: Graph,
    *items: Pass,
    atol: float,
    rtol: float = 0.0,
    feeds: Sequence[Mapping[str, Array]] = (),
    ctx: Context | None = None,
) -> Context:
    """Run passes, which must change the graph, and compare outputs before and after, unoptimized.

    Without ``feeds``: random ones of several sizes, batch and sequence of one among them.
    """
    feeds = feeds or [random_feed(graph, i, dims) for i, dims in enumerate(_DIMS)]
    text = dump(graph)
    before = [outputs(graph, feed) for feed in feeds]
    ctx = run_pass(graph, *items, ctx=ctx)
    assert dump(graph) != text, "nothing changed: this would compare the graph with itself"
    for feed, expected in zip(feeds, before, strict=True):
        assert_equivalent(expected, outputs(graph, feed), atol=atol, rtol=rtol)
    return ctx


def plan_text(ctx: Context) -> str:
    """Decisions, one per line: ``weight w: int8:sym:channel[1] at MatMul:y.1 because ...``."""
    lines = []
    for d in ctx.plan.decisions:
        uses = ", ".join(f"{u.node}.{u.index}" for u in d.uses)
        lines.append(f"{d.kind} {d.tensor}: {d.spec or 'float'} at {uses} because {d.reason}\n")
    return "".join(lines)


def check(graph: Graph, directives: str) -> None:
    """FileCheck the dump of a graph. Raises AssertionError showing where it does not match."""
    filecheck(dump(graph), directives)


def filecheck(text: str, directives: str) -> None:
    """FileCheck any text. Each line must be a directive: ``CHECKNEXT:`` would check nothing."""
    from filecheck.finput import FInput
    from filecheck.matcher import Matcher
    from filecheck.options import Options
    from filecheck.parser import Parser

    _reject_near_misses(directives)
    options = Options(match_filename="<test>", reject_empty_vars=True)
    parser = Parser(options, io.StringIO(directives), *_pattern(options))
    matcher = Matcher(options, FInput("<dump>", text), parser)
    captured = io.StringIO()
    matcher.stderr = captured
    if matcher.run() != 0:
        raise AssertionError(f"{captured.getvalue()}\n--- dump ---\n{text}")


def _pattern(options: Any) -> tuple[Any, ...]:
    from filecheck.parser import pattern_for_opts

    return tuple(pattern_for_opts(options))


def _reject_near_misses(directives: str) -> None:
    lines = [line.strip() for line in directives.splitlines() if line.strip()]
    for line in lines:
        if not _DIRECTIVE.match(line):
            raise AssertionError(f"not a FileCheck directive, and it would check nothing: {line!r}")
    if not lines:
        raise AssertionError("no CHECK directive: this would check nothing")


def outputs(graph: Graph, feed: Mapping[str, Array], optimize: bool = False) -> dict[str, Array]:
    """Run a graph in ONNX Runtime as written."""
    options = SessionOptions(threads=1, optimize=optimize)
    return Session(serialize(graph), options).run(feed)


def assert_equivalent(
    before: Mapping[str, Array], after: Mapping[str, Array], *, atol: float, rtol: float = 0.0
) -> None:
    """Assert equal shapes and types, and values within the caller's tolerances."""
    assert list(before) == list(after), f"outputs {list(after)}, expected {list(before)}"
    for name, old in before.items():
        new = after[name]
        assert old.dtype == new.dtype, f"{name}: {new.dtype}, expected {old.dtype}"
        assert old.shape == new.shape, f"{name}: {new.shape}, expected {old.shape}"
        np.testing.assert_allclose(new, old, atol=atol, rtol=rtol, err_msg=name)


def random_feed(graph: Graph, seed: int = 0, dims: Sequence[int] = (2, 5)) -> dict[str, Array]:
    """Standard normal floats for every float input; symbolic dimensions get ``dims`` in order."""
    rng = np.random.default_rng(seed)
    sizes: dict[str, int] = {}
    feed: dict[str, Array] = {}
    for tensor in graph.inputs:
        shape = []
        for d in tensor.shape:
            if isinstance(d, str):
                d = sizes.setdefault(d, dims[len(sizes) % len(dims)])
            shape.append(d)
        values = rng.standard_normal(shape)
        feed[tensor.name] = values.astype(tensor.dtype)
    return feed


_BLOCK = """
    qm{i} = MatMul({read}, wq{i}) qb{i} = Add(qm{i}, bq{i})
    qr{i} = Reshape(qb{i}, heads) q{i} = Transpose<perm = [0, 2, 1, 3]>(qr{i})
    km{i} = MatMul({read}, wk{i}) kb{i} = Add(km{i}, bk{i})
    kr{i} = Reshape(kb{i}, heads) k{i} = Transpose<perm = [0, 2, 3, 1]>(kr{i})
    vm{i} = MatMul({read}, wv{i}) vb{i} = Add(vm{i}, bv{i})
    vr{i} = Reshape(vb{i}, heads) v{i} = Transpose<perm = [0, 2, 1, 3]>(vr{i})
    qk{i} = MatMul(q{i}, k{i}) s{i} = Add(qk{i}, bias) p{i} = Softmax<axis = -1>(s{i})
    c{i} = MatMul(p{i}, v{i}) ct{i} = Transpose<perm = [0, 2, 1, 3]>(c{i})
    cr{i} = Reshape(ct{i}, joined) gm{i} = MatMul(cr{i}, wg{i}) g{i} = Add(gm{i}, bg{i})
    u{i} = Add(g{i}, {stream})
    x{i} = LayerNormalization<axis = -1>(u{i}, gx{i}, bx{i})
    fm{i} = MatMul(x{i}, wf{i}) f{i} = Add(fm{i}, bf{i}) r{i} = Relu(f{i})
    hm{i} = MatMul(r{i}, wh{i}) h{i} = Add(hm{i}, bh{i})
    y{i} = Add(h{i}, {skip})
    z{i} = LayerNormalization<axis = -1>(y{i}, gz{i}, bz{i})
"""


def encoder(
    layers: int = 2, *, width: int = 8, pre_norm: bool = False, outlier: float = 1.0
) -> Graph:
    """A transformer encoder, two heads, Relu, padding mask; ``ids`` below 64 to ``out``.

    Letters are those of Bondarenko et al. 2021. ``outlier`` multiplies one channel of the FFN input
    x; the row of the weight that reads it and the norm after the FFN are divided by it.
    """
    text, stream, read = "", "e", "a"
    for i in range(layers):
        skip = f"u{i}" if pre_norm else f"x{i}"
        text += _BLOCK.format(i=i, read=read, stream=stream if pre_norm else read, skip=skip)
        stream, read = f"y{i}", f"z{i}"
    values = _encoder_weights(layers, width, outlier)
    declared = "".join(f", float{list(v.shape)} {n}" for n, v in values.items())
    return parse(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (int64[B,S] ids, int64[B,S] attention_mask{declared}, int64[4] heads, int64[3] joined,
            int64[2] inner, float one, float low) => (float[B,S,{width}] out) {{
            t = Gather(words, ids) n = Gather(kinds, attention_mask) e = Add(t, n)
            a = LayerNormalization<axis = -1>(e, ga, ba)
            cast = Cast<to = 1>(attention_mask) spread = Unsqueeze(cast, inner)
            hidden = Sub(one, spread) bias = Mul(hidden, low)
            {text}
            out = Identity({read})
        }}""",
        **values,
        heads=np.array([0, 0, 2, width // 2]),
        joined=np.array([0, 0, width]),
        inner=np.array([1, 2]),
        one=np.array(1, np.float32),
        low=np.array(-1e9, np.float32),
    )


def _encoder_weights(layers: int, width: int, outlier: float) -> dict[str, Array]:
    """Matrices that preserve the magnitude of activations, and vectors as after training."""
    shapes = {"words": (64, width), "kinds": (2, width), "ga": (width,), "ba": (width,)}
    for i in range(layers):
        square = {f"w{n}{i}": (width, width) for n in "qkvg"}
        wide = {f"wf{i}": (width, 4 * width), f"wh{i}": (4 * width, width), f"bf{i}": (4 * width,)}
        vectors = {f"{n}{i}": (width,) for n in ("bq", "bk", "bv", "bg", "bh")}
        norms = {f"{n}{i}": (width,) for n in ("gx", "bx", "gz", "bz")}
        shapes |= {**square, **wide, **vectors, **norms}
    made: dict[str, Array] = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        spread = shape[0] ** -0.5 if name[0] == "w" and len(shape) == 2 else 0.1
        drawn = normal(*shape, seed=seed) * np.float32(
            1.0 if name in ("words", "kinds") else spread
        )
        made[name] = 1 + drawn if name[0] == "g" else drawn
    for i in range(layers):
        made[f"gx{i}"][0] *= outlier
        made[f"bx{i}"][0] *= outlier
        made[f"wf{i}"][0] /= outlier
        made[f"gz{i}"][0] /= outlier
    return made
