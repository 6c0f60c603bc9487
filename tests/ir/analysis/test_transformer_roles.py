"""Roles are found by operators and dataflow: norms before or after, fused or not, gated or not."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from qcompile.commands.demo import model_path
from qcompile.compiler.stages.pipelines import SIMPLIFY
from qcompile.ir import Graph
from qcompile.ir.analysis.name_patterns import matches
from qcompile.ir.analysis.shape_inference import infer
from qcompile.ir.analysis.transformer_roles import Role, names_to_match, roles
from qcompile.ir.model_io.read_model import load
from qcompile.rewriting.pass_manager import PassManager
from qcompile.rewriting.pipeline_spec import parse as pipeline
from qcompile.rewriting.testing import context, encoder, normal, parse


def named(graph: Graph) -> dict[str, str]:
    """Roles as ``layernorm+ffn-in@0``, by tensor."""
    return {
        name: "+".join(sorted(role.names)) + ("" if role.layer is None else f"@{role.layer}")
        for name, role in roles(graph).items()
    }


# Tensors of one layer in ``testing.encoder``; whose roles do not depend on where the norms are.
LAYER = {
    "query": ("qm", "qb", "qr", "q"),
    "key": ("km", "kb", "kr", "k"),
    "value": ("vm", "vb", "vr", "v"),
    "scores": ("qk", "s"),
    "probabilities": ("p",),
    "context": ("c", "ct", "cr"),
    "attention-output": ("gm", "g"),
    "attention-sum+residual-sum": ("u",),
    "ffn-in+layernorm": ("x",),
    "ffn-expansion": ("fm", "f"),
    "ffn-hidden": ("r",),
    "ffn-out": ("hm", "h"),
    "ffn-sum+residual-sum": ("y",),
    "query-weight": ("wq",),
    "key-weight": ("wk",),
    "value-weight": ("wv",),
    "attention-output-weight": ("wg",),
    "ffn-in-weight": ("wf",),
    "ffn-out-weight": ("wh",),
}


@pytest.mark.parametrize("pre_norm", [False, True], ids=["post-LN", "pre-LN"])
def test_every_tensor_of_an_encoder_has_its_role(pre_norm: bool) -> None:
    found = named(encoder(2, pre_norm=pre_norm))
    expected = {f"{t}{i}": f"{r}@{i}" for r, ts in LAYER.items() for t in ts for i in (0, 1)}
    expected |= {"words": "embedding-weight+token-embedding-weight", "kinds": "embedding-weight"}
    expected |= dict.fromkeys(("t", "n", "e"), "embedding") | {"out": "other"}
    # A norm that the residual sum skips opens a layer, one that feeds it closes one.
    norms = ("layernorm@0", "layernorm@1") if pre_norm else ("layernorm", "layernorm@0")
    expected |= {"a": norms[0], "z0": norms[1], "z1": "layernorm@1"}
    assert found == expected


def test_the_demo_model_as_it_is_exported() -> None:
    graph = load(model_path())
    infer(graph)
    PassManager(pipeline(SIMPLIFY)).run(graph, context("qdq"))
    found = roles(graph)
    counts = Counter(n for role in found.values() for n in role.names)
    once = ("attention-sum", "ffn-sum", "ffn-in", "probabilities", "query-weight", "ffn-out-weight")
    assert {name: counts[name] for name in once} == dict.fromkeys(once, 3)
    assert counts["layernorm"] == 7 and counts["residual-sum"] == 6
    assert {role.layer for role in found.values()} == {None, 0, 1, 2}


def test_attention_in_one_operator_hides_scores_and_probabilities() -> None:
    graph = parse(
        """g (float[B,S,8] a) => (float[B,S,8] y) {
            q = MatMul(a, wq) k = MatMul(a, wk) v = MatMul(a, wv)
            c = com.microsoft.MultiHeadAttention<num_heads = 2>(q, k, v)
            g = MatMul(c, wg)
            u = Add(a, g)
            y = Relu(u)
        }""",
        **{n: normal(8, 8) for n in ("wq", "wk", "wv", "wg")},
    )
    typed(graph, "c", "g", "u", "y")
    found = named(graph)
    assert {n: found[n] for n in "qkvcgu"} == {
        "q": "query@0",
        "k": "key@0",
        "v": "value@0",
        "c": "context@0",
        "g": "attention-output@0",
        "u": "attention-sum+residual-sum@0",
    }
    assert found["wk"] == "key-weight@0"


def typed(graph: Graph, *names: str) -> None:
    """What a recorded run of the float model would tell."""
    for name in names:
        graph.tensors()[name].dtype = np.dtype(np.float32)


FUSED = """g (float[B,S,8] a) => (float[B,S,8] y) {
    qkv = MatMul(a, w)
    qm, km, v = Split<axis = -1, num_outputs = 3>(qkv)
    q = Mul(qm, scale)
    k = Transpose<perm = [0, 2, 1]>(km)
    s = MatMul(q, k)
    d = Softmax(s)
    p = Dropout(d)
    y = MatMul(p, v)
}"""


def test_one_linear_for_query_key_and_value_has_all_three_roles() -> None:
    graph = parse(FUSED, 18, w=normal(8, 24), scale=np.array(0.5, np.float32))
    found = named(graph)
    assert found["qkv"] == "key+query+value@0"
    assert found["w"] == "key-weight+query-weight+value-weight@0"
    assert (found["q"], found["k"], found["v"]) == ("query@0", "key@0", "value@0")
    assert (found["d"], found["p"]) == ("probabilities@0", "probabilities@0")
    assert (found["a"], found["y"]) == ("other", "context@0")


@pytest.mark.parametrize("activation", ["Relu", "Softsign", "ThresholdedRelu", "Celu"])
def test_an_ffn_has_any_activation_between(activation: str) -> None:
    graph = parse(
        f"""g (float[B,S,8] u) => (float[B,S,8] y) {{
            m = MatMul(u, w1) r = {activation}(m) h = MatMul(r, w2) y = Add(u, h)
        }}""",
        w1=normal(8, 16), w2=normal(16, 8),
    )  # fmt: skip
    found = named(graph)
    assert (found["u"], found["r"], found["h"]) == ("ffn-in@0", "ffn-hidden@0", "ffn-out@0")


def test_a_gated_ffn_has_two_first_linears() -> None:
    """silu(x w1) * (x w2), in two dimensions, with a Gemm and a bias at the end."""
    graph = parse(
        """g (float[B,S,8] u) => (float[B,S,8] y) {
            x = LayerNormalization<axis = -1>(u, g, b)
            f = Reshape(x, flat)
            m1 = MatMul(f, w1) a = Sigmoid(m1) silu = Mul(m1, a)
            m2 = MatMul(f, w2) r = Mul(silu, m2)
            h2 = Gemm(r, w3, b3)
            h = Reshape(h2, back)
            y = Add(u, h)
        }""",
        g=normal(8), b=normal(8), b3=normal(8), flat=np.array([-1, 8]), back=np.array([2, -1, 8]),
        w1=normal(8, 16), w2=normal(8, 16), w3=normal(16, 8),
    )  # fmt: skip
    assert named(graph) == {
        "u": "other",
        "x": "ffn-in+layernorm@0",
        "f": "ffn-in@0",
        **dict.fromkeys(("m1", "a", "silu", "m2"), "ffn-expansion@0"),
        "r": "ffn-hidden@0",
        "h2": "ffn-out@0",
        "h": "ffn-out@0",
        "y": "ffn-sum+residual-sum@0",
        "w1": "ffn-in-weight@0",
        "w2": "ffn-in-weight@0",
        "w3": "ffn-out-weight@0",
    }


OTHERS = {
    "a pooler and a classifier": "a = MatMul(x, w) t = Tanh(a) b = MatMul(t, v) y = Softmax(b)",
    "two towers": "a = MatMul(x, w) r = Relu(a) b = MatMul(r, v) c = MatMul(x, v) y = Add(b, c)",
    "no activation between": "a = MatMul(x, w) b = MatMul(a, v) y = Add(b, x)",
    "two inputs": "a = MatMul(x, w) k = Relu(x) b = MatMul(k, v) c = Mul(a, b) r = Relu(c)"
    "d = MatMul(r, w) y = Add(d, x)",
}


@pytest.mark.parametrize("body", OTHERS.values(), ids=OTHERS)
def test_what_is_no_transformer_is_other(body: str) -> None:
    graph = parse(f"g (float[N,8] x) => (float[N,8] y) {{{body}}}", w=normal(8, 8), v=normal(8, 8))
    assert set(named(graph).values()) == {"other", "other-weight"}


def test_a_model_without_data_has_no_roles() -> None:
    assert roles(parse("g (int64[N] x) => (int64[N] y) { y = Neg(x) }")) == {}


def test_layers_count_ffns_or_attentions_where_there_are_none() -> None:
    """Two attentions one after the other, without FFN."""
    block = "q{i} = MatMul({x}, w) k{i} = Transpose(q{i}) s{i} = MatMul(q{i}, k{i})"
    block += " p{i} = Softmax(s{i}) c{i} = MatMul(p{i}, {x})"
    body = block.format(i=0, x="x") + block.format(i=1, x="c0")
    graph = parse(f"g (float[N,8] x) => (float[N,8] c1) {{ {body} }}", w=normal(8, 8))
    found = named(graph)
    assert (found["p0"], found["p1"]) == ("probabilities@0", "probabilities@1")


def test_labels_and_patterns() -> None:
    found = {"t": Role(("ffn-in", "layernorm"), 3), "e": Role(("embedding",))}
    names = names_to_match(found, ["t", "e", "ffn"], ["node"])
    assert names == [
        "t", "e", "ffn", "node",
        "role:ffn-in", "role:ffn-in@3", "role:layernorm", "role:layernorm@3", "role:embedding",
    ]  # fmt: skip
    for pattern in ("t", "n*", "role:ffn-in", "role:ffn-*@3", "role:*@3", "role:embedding", "*"):
        assert matches(pattern, names), pattern
    for pattern in ("role:ffn", "role:ffn-in@4", "role:embedding@0", "role:t", "*@3", "*layernorm"):
        assert not matches(pattern, names), pattern


def test_nodes_that_are_named_like_tensors_lend_no_roles() -> None:
    assert names_to_match({"t": Role(("ffn-in",))}, ["u"], ["t"]) == ["u", "t"]
