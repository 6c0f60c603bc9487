"""Loading: one normal form out of whatever exporters write, one clear line for what is no model."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompile.data.synthetic import synthetic_feeds
from qcompile.errors import ModelError, QCompileError
from qcompile.ir import Graph, array, is_constant
from qcompile.ir.analysis import shape_inference
from qcompile.ir.lazy_values import stored_proto
from qcompile.ir.model_io.from_proto import from_proto
from qcompile.ir.model_io.read_model import load
from qcompile.ir.model_io.to_proto import serialize
from qcompile.ir.printer import dump
from qcompile.rewriting.testing import model_proto, outputs
from qcompile.runtime.session import Session, SessionOptions

SMALL = "g (float[N,2] x) => (float[N,2] y) <float[2] w = {1, 2}> { y = Add(x, w) }"
X = {"x": np.array([[3.0, 4.0]], np.float32)}


def graph_of(text: str) -> Graph:
    return from_proto(model_proto(text))


def truncated(path: Path) -> None:
    path.write_bytes(model_proto(SMALL).SerializeToString()[:-9])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.mkdir(), "is a folder, not an .onnx file"),
        (lambda p: p.write_bytes(b""), r"no graph in it \(0 bytes\)"),
        (lambda p: p.write_text("# a README\n"), "not a readable ONNX model"),
        (lambda p: p.write_bytes(random.Random(0).randbytes(999)), "not a readable ONNX model"),
        (truncated, "not ONNX, or truncated"),
        (lambda p: onnx.save(onnx.ModelProto(ir_version=8), p), "no graph in it"),
    ],
)
def test_no_model(tmp_path: Path, make: Callable[[Path], object], said: str) -> None:
    make(tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=rf"m\.onnx'.*{said}"):
        load(tmp_path / "m.onnx")


def test_damaged_files_are_model_errors_or_models() -> None:
    """Every prefix, and bytes changed at random: never another exception."""
    text = """g (float[N,2] x, bool c) => (float[N,2] y) <float[2] w = {1, 2}> {
        k = Constant<value_ints=[1, 2]>() r = ReduceMax<axes=[-1]>(x) s = Sub(x, r)
        y = If (c) <
            then_branch = t () => (float[N,2] p) { p = Add(s, w) },
            else_branch = e () => (float[N,2] q) { q = Tile(s, k) }
        >
    }"""
    data, rng = model_proto(text).SerializeToString(), random.Random(0)
    cases = [data[:i] for i in range(len(data))]
    for _ in range(500):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] = rng.randrange(256)
        cases.append(bytes(damaged))
    fine = 0
    for case in cases:
        try:
            graph = load(case)
            shape_inference.infer(graph)
            dump(graph)
            fine += bool(serialize(graph))
        except QCompileError as e:
            assert "\n" not in str(e)
    assert 0 < fine < len(cases) / 2


@pytest.mark.parametrize("field", ["producer_name", "producer_version", "domain", "doc_string"])
def test_what_the_model_says_of_itself_is_text(field: str) -> None:
    proto = model_proto("g (float[N] x) => (float[N] y) { y = Neg(x) }")
    setattr(proto, field, "someone")
    damaged = proto.SerializeToString().replace(b"someone", b"some\xa0ne")
    with pytest.raises(ModelError, match=r"the model is damaged: b'some.*' is no name"):
        load(damaged)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("{ y = Add(x, gone) }", r"node '' \(Add\) reads tensor 'gone', which nothing produces"),
        ("{ z = Neg(x) }", "graph output 'y' is produced by nothing"),
        ("{ y = Neg(x) y = Abs(x) }", "tensor 'y' is made twice"),
        ("{ x = Neg(x) y = Abs(x) }", "tensor 'x' is made twice"),
        ("{ y = Neg(z) z = Abs(y) }", "the graph has a cycle through node"),
        (
            "{ y = If (x) <then_branch = t () => (float p) { p = Neg(gone) }> }",
            r"node '' \(If\) reads tensor 'gone', which nothing produces",
        ),
    ],
)
def test_malformed_graphs(body: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        graph_of(f"g (float[2] x) => (float[2] y) {body}")


@pytest.mark.parametrize("what", ["input", "initializer"])
def test_doubled_names(what: str) -> None:
    model = model_proto(SMALL)
    field = getattr(model.graph, what)
    field.append(field[0])
    with pytest.raises(ModelError, match=f"two {what}s called"):
        from_proto(model)


def test_names_that_are_no_text() -> None:
    data = model_proto(SMALL).SerializeToString().replace(b"Add", b"A\xff\xfe")
    with pytest.raises(ModelError, match="the model is damaged"):
        load(data)


def test_weights_that_do_not_fill_their_shape() -> None:
    model = model_proto(SMALL)
    model.graph.initializer[0].dims[0] = 3
    with pytest.raises(ModelError, match=r"'w' of shape \[3\] has 2 bytes or values, expected 3"):
        from_proto(model)


def test_the_callers_model_stays_as_it_was() -> None:
    model = model_proto(
        "g (float[2] x) => (float[2] y) { k = Constant<value_float=2.0>() y = Mul(x, k) }"
    )
    model.opset_import.extend([helper.make_opsetid("ai.onnx", 17)])
    before = model.SerializeToString()
    serialize(load(model))
    assert model.SerializeToString() == before


@pytest.mark.parametrize(
    ("imports", "expected"),
    [
        ([("", 17), ("", 13)], {"": 17}),
        ([("ai.onnx", 17), ("", 13)], {"": 17}),
        ([("ai.onnx", 13)], {"": 13}),
        ([], {"": 1}),
        ([("com.microsoft", 1)], {"com.microsoft": 1, "": 21}),
    ],
)
def test_imports_are_unique_and_complete(
    imports: list[tuple[str, int]], expected: dict[str, int]
) -> None:
    model = model_proto(SMALL)
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(d, v) for d, v in imports)
    graph = from_proto(model)
    assert graph.domains() == expected
    written = onnx.ModelProto.FromString(serialize(graph)).opset_import
    assert {o.domain: o.version for o in written} == expected and len(written) == len(expected)


def test_missing_imports_of_used_domains_are_added() -> None:
    text = """g (float[N,2] x, bool c) => (float[N,2] y) {
        a = com.microsoft.Gelu(x)
        y = If (c) <
            then_branch = t () => (float[N,2] p) { p = com.other.Thing(a) },
            else_branch = e () => (float[N,2] q) { q = Neg(a) }
        >
    }"""
    assert graph_of(text).domains() == {"": 17, "com.microsoft": 1, "com.other": 1}


def test_the_long_spelling_of_onnxs_domain_runs() -> None:
    model = model_proto(SMALL)
    model.graph.node[0].domain = "ai.onnx"
    assert outputs(from_proto(model), X)["y"].tolist() == [[4, 6]]


def test_nodes_are_sorted_and_named() -> None:
    model = model_proto(
        "g (float[2] x) => (float[2] y) { y = Neg(b) b = Abs(a) a = Exp(x) c = Neg(x) }"
    )
    for node, name in zip(model.graph.node, ("n", "n", "", "Exp:a"), strict=True):
        node.name = name
    names = {n.name: n.outputs[0].name for n in from_proto(model).nodes}
    assert list(names.items()) == [("Exp:a_", "a"), ("Abs:b", "b"), ("n", "y"), ("Exp:a", "c")]


def test_constant_nodes_of_every_kind() -> None:
    model = model_proto(
        """g (float[2] x) => (float[2] y) {
            a = Constant<value_float = 2.0>() b = Constant<value_int = 3>()
            c = Constant<value_floats = [1.0, 2.0]>() d = Constant<value_ints = [4, 5]>()
            e = Constant<value = float[2] {6, 7}>() f = Constant<value_string = "s">()
            h = Constant<value_strings = ["s", "t"]>() none = Constant<value_ints: ints = []>()
            t = Mul(x, a) u = Add(t, c) v = Add(u, e)
            m = Cast<to = 1>(d) n = Mul(v, m) o = Cast<to = 1>(b) y = Add(n, o)
            p = Identity(f) q = Identity(h) r = Reshape(a, none)
        }"""
    )
    graph = from_proto(model)
    found = {
        name: (array(t).tolist(), array(t).dtype.name) for name, t in graph.constants().items()
    }
    assert found == {
        "a": (2.0, "float32"),
        "b": (3, "int64"),
        "c": ([1.0, 2.0], "float32"),
        "d": ([4, 5], "int64"),
        "e": ([6.0, 7.0], "float32"),
        "none": ([], "int64"),
    }
    assert [n.outputs[0].name for n in graph.nodes if n.op == "Constant"] == ["f", "h"]
    x = np.array([1, 10], np.float32)
    assert outputs(graph, {"x": x})["y"].tolist() == [39.0, 148.0]


def test_constants_that_are_outputs_stay_nodes_and_subgraphs_read_the_others() -> None:
    graph = graph_of(
        """g (float[2] x, bool c) => (float[2] y, float k) {
            k = Constant<value_float = 2.0>() w = Constant<value_float = 3.0>()
            y = If (c) <
                then_branch = t () => (float[2] p) { i = Constant<value_int=1>() p = Mul(x, w) },
                else_branch = e () => (float[2] q) { q = Neg(x) }
            >
        }"""
    )
    assert sorted(n.op for n in graph.nodes) == ["Constant", "If"]
    assert sorted(graph.constants()) == ["w"]
    feed = {"x": np.ones(2, np.float32), "c": np.array(True)}
    found = outputs(graph, feed)
    assert found["y"].tolist() == [3, 3] and found["k"] == 2


def test_an_initializer_that_is_also_an_input_is_a_constant() -> None:
    model = model_proto(SMALL)
    model.ir_version = 3
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [2]))
    graph = from_proto(model)
    assert [t.name for t in graph.inputs] == ["x"]
    assert is_constant(graph.nodes[0].inputs[1])
    assert outputs(graph, X)["y"].tolist() == [[4, 6]]


@pytest.mark.parametrize("flat", [True, False])
def test_sparse_initializers_become_dense(flat: bool) -> None:
    values = numpy_helper.from_array(np.array([5, 7], np.float32), "w")
    places = np.array([1, 2]) if flat else np.array([[0, 1], [1, 0]])
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(places), [2, 2])
    model = model_proto("g (float[N,2] x) => (float[N,2] y) { y = MatMul(x, v) v = Identity(w) }")
    model.graph.sparse_initializer.append(sparse)
    graph = from_proto(model)
    assert array(graph.constants()["w"]).tolist() == [[0, 5], [7, 0]]
    assert array(graph.constants()["w"]).dtype == np.float32
    assert outputs(graph, X)["y"].tolist() == [[28, 15]]


@pytest.mark.parametrize(
    ("dims", "said"), [([2, 2], "out of bounds"), ([1 << 20, 1 << 20], "too large")]
)
def test_sparse_initializers_that_cannot_be(dims: list[int], said: str) -> None:
    values = numpy_helper.from_array(np.ones(1, np.float32), "w")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([[5, 5]])), dims)
    model = model_proto("g (float[N,2] x) => (float[N,2] y) { y = MatMul(x, w) }")
    model.graph.sparse_initializer.append(sparse)
    with pytest.raises(ModelError, match=rf"sparse tensor 'w' of shape .*{said}"):
        from_proto(model)


def test_weights_stay_in_the_file_until_read() -> None:
    graph = load(model_proto(SMALL).SerializeToString())
    weight = graph.constants()["w"]
    assert array(weight).tolist() == [1, 2]
    assert stored_proto(weight) is not None


BATTERY = os.environ.get("QCOMPILE_BATTERY", "")


def battery() -> list[Path]:
    """Every eighth file of a folder of ONNX models, which the environment may name."""
    root = Path(BATTERY)
    lines = (root / "index.jsonl").read_text().splitlines() if BATTERY else []
    rows = [json.loads(line) for line in lines]
    return [root / r["file"] for r in rows if r["runs"] and r["nodes"] < 200][::8]


@pytest.mark.skipif(not BATTERY, reason="QCOMPILE_BATTERY names no folder with an index.jsonl")
@pytest.mark.parametrize("path", battery(), ids=lambda p: p.stem)
def test_battery_models_run_as_before(path: Path) -> None:
    graph = load(path)
    shape_inference.infer(graph)
    data = serialize(graph)
    assert serialize(load(data)) == data
    plain = SessionOptions(threads=1, optimize=False)
    old, new = Session(path, plain), Session(data, plain)
    assert (old.inputs, old.outputs) == (new.inputs, new.outputs)
    try:
        feed = synthetic_feeds(graph, {}, 1, seed=0)[0]
        expected = old.run(feed)
    except QCompileError as e:
        pytest.skip(f"made-up inputs do not run: {e}")
    found = new.run(feed)
    for name, value in expected.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5)


def test_a_question_mark_is_no_name_of_a_dimension() -> None:
    """PaddlePaddle's exporter calls all of them so, whatever their sizes."""
    model = model_proto("g (float[N,3,N] x) => (float[N,3,N] y) { y = Relu(x) }")
    for tensor in (*model.graph.input, *model.graph.output):
        for dim in tensor.type.tensor_type.shape.dim:
            dim.dim_param = "?" if dim.HasField("dim_param") else dim.dim_param
    graph = load(model)
    assert list(graph.inputs[0].shape)[::2] == [None, None]
    written = onnx.ModelProto.FromString(serialize(graph))
    assert written.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "?"
