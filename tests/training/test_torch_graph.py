"""A graph as a torch module: results, slots, gradients, memory, and what is refused."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest

from qcompile.errors import TrainingError
from qcompile.ir import Graph
from qcompile.planning import Use
from qcompile.rewriting.testing import encoder, normal, outputs, parse, random_feed

torch = pytest.importorskip("torch")
torch_graph = pytest.importorskip("qcompile.training.torch_graph")

LOWEST = float(np.finfo(np.float32).min)


def tensors(feed: Any) -> dict[str, Any]:
    return {name: torch.from_numpy(np.array(values)) for name, values in feed.items()}


def linear(extra: str = "") -> Graph:
    """y = x·w + b, and z = x·w2."""
    return parse(
        f"""g (float[B,3] x) => (float[B,2] y, float[B,2] z)
        {{ m = MatMul(x, w) y = Add(m, b) z = MatMul(x, w2) {extra} }}""",
        w=normal(3, 2),
        w2=normal(3, 2, seed=1),
        b=normal(2, seed=2),
    )


def masked(value: float, where_nan: bool = False) -> Graph:
    """Attention over two keys, of which row 1 masks both."""
    safe = "n = IsNaN(s) o = Where(n, zero, s)" if where_nan else "o = Identity(s)"
    return parse(
        f"""g (float[2,4] x, bool[2,2] seen) => (float[2,4] y)
        {{ q = MatMul(x, w) k = Transpose(q) t = MatMul(q, k) m = Where(seen, zero, low)
           a = Add(t, m) s = Softmax(a) {safe} y = MatMul(o, q) }}""",
        w=normal(4, 4),
        zero=np.array(0, np.float32),
        low=np.array(value, np.float32),
    )


def test_all_tensors_of_an_encoder_are_those_of_onnx_runtime() -> None:
    graph = encoder(layers=2)
    names = [t for node in graph.nodes for t in (o.name for o in node.outputs)]
    feed = random_feed(graph)
    found = torch_graph.TorchGraph(graph)(tensors(feed), watch=names)
    assert set(names) <= set(found)
    watched = graph.tensors()
    graph.set_outputs([watched[name] for name in names])
    for name, expected in outputs(graph, feed).items():
        # Rounding of float32 over at most 64 summands in each of the matrix multiplications.
        top = float(np.abs(expected).max(initial=1))
        np.testing.assert_allclose(
            found[name].detach().numpy(), expected, rtol=0, atol=16 * 64 * 2.0**-24 * top
        )


def test_names_are_float_constants_and_values_are_copies() -> None:
    graph = linear()
    module = torch_graph.TorchGraph(graph)
    assert sorted(module.names()) == ["b", "w", "w2"]
    with torch.no_grad():
        module.parameter("w").zero_()
    np.testing.assert_array_equal(graph.constants()["w"].values, normal(3, 2))
    with pytest.raises(TrainingError, match="'m' is not a float constant"):
        module.parameter("m")


def test_a_slot_is_computed_once_per_tensor_and_callable() -> None:
    graph = linear()
    first, second = (next(n for n in graph.nodes if n.outputs[0].name == t) for t in ("m", "z"))
    calls: list[Any] = []

    def double(x: Any) -> Any:
        calls.append(x)
        return 2 * x

    slots = {Use(first.name, 0): double, Use(second.name, 0): double, Use(second.name, 1): double}
    feed = tensors({"x": normal(5, 3)})
    plain, slotted = torch_graph.TorchGraph(graph), torch_graph.TorchGraph(graph, slots)
    before, after = plain(feed, watch=["x", "m"]), slotted(feed, watch=["x", "m"])
    assert len(calls) == 2
    assert torch.equal(after["x"], before["x"])
    assert torch.equal(after["m"], 2 * before["m"])
    assert torch.equal(after["z"], 4 * before["z"])


def test_a_slot_at_no_input_is_refused() -> None:
    with pytest.raises(TrainingError, match="node 'none': a quantizer stands at input 3"):
        torch_graph.TorchGraph(linear(), {Use("none", 3): torch.neg})


def test_values_are_freed_after_their_last_reader() -> None:
    graph = linear("c = Neg(m) d = Neg(c) e = Neg(d)")
    nodes = {n.outputs[0].name: n for n in graph.nodes}
    seen: dict[str, Any] = {}

    def remember(x: Any) -> Any:
        seen["c"] = weakref.ref(x)
        return x + 0

    def is_gone(x: Any) -> Any:
        gc.collect()
        seen["gone"] = seen["c"]() is None
        return x

    slots = {Use(nodes["d"].name, 0): remember, Use(nodes["e"].name, 0): is_gone}
    module = torch_graph.TorchGraph(graph, slots)
    with torch.no_grad():
        module(tensors({"x": normal(1, 3)}))
        assert seen["gone"]
        module(tensors({"x": normal(1, 3)}), watch=["c"])
    assert not seen["gone"]


@pytest.mark.parametrize(("value", "where_nan"), [(LOWEST, False), (-np.inf, True)])
def test_masked_rows_leave_gradients_finite(value: float, where_nan: bool) -> None:
    graph = masked(value, where_nan)
    feed = tensors({"x": normal(2, 4, seed=1), "seen": np.array([[True, False], [False, False]])})
    module = torch_graph.TorchGraph(graph)
    module(feed)["y"].square().sum().backward()
    gradient = module.parameter("w").grad
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 0


def test_without_where_a_row_of_infinities_is_nan_as_in_onnx_runtime() -> None:
    graph = masked(-np.inf)
    feed = {"x": normal(2, 4, seed=1), "seen": np.array([[True, False], [False, False]])}
    found = torch_graph.TorchGraph(graph)(tensors(feed))["y"].detach().numpy()
    expected = outputs(graph, feed)["y"]
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    assert np.isnan(found[1]).all()


def test_shapes_follow_the_feed() -> None:
    graph = parse(
        """g (float[B,S,4] x) => (float[B,S,2,2] y, int64[S] p)
        { s = Shape(x) n = Gather(s, one) b = Gather(s, zero) u = Unsqueeze(b, axis)
          v = Unsqueeze(n, axis) r = Concat<axis = 0>(u, v, halves) y = Reshape(x, r)
          p = Range(zero, n, one) }""",
        zero=np.array(0),
        one=np.array(1),
        axis=np.array([0]),
        halves=np.array([2, 2]),
    )
    module = torch_graph.TorchGraph(graph)
    for batch, length in ((1, 1), (2, 5)):
        found = module(tensors({"x": normal(batch, length, 4)}))
        assert found["y"].shape == (batch, length, 2, 2)
        assert found["p"].tolist() == list(range(length))


def test_what_is_computed_from_shapes_stays_on_the_host() -> None:
    """Data on a device without values: torch refuses whatever would read one."""
    graph = parse(
        """g (int64[B,S] i) => (float[B,S,4] y)
        { s = Shape(i) n = Gather(s, one) p = Range(zero, n, one) e = Gather(table, p)
          w = Gather(words, i) t = Add(w, e) r = Concat<axis = 0>(s, four) y = Reshape(t, r) }""",
        zero=np.array(0),
        one=np.array(1),
        four=np.array([4]),
        table=normal(8, 4),
        words=normal(9, 4),
    )
    module = torch_graph.TorchGraph(graph).to("meta")
    found = module({"i": torch.zeros(2, 5, dtype=torch.int64, device="meta")})
    assert found["y"].shape == (2, 5, 4)


def test_only_weights_biases_and_tables_are_learned() -> None:
    graph = parse(
        """g (int64[B,S] i, float[B,S] attention_mask) => (float[B,S,4] y)
        { e = Gather(words, i) m = Sub(one, attention_mask) k = Mul(m, low)
          u = Unsqueeze(k, last) a = Add(e, u) c = Add(a, masked) b = MatMul(c, w)
          d = Add(b, bias) h = Div(d, root) f = Cast<to = 1>(i) g = Unsqueeze(f, last)
          p = MatMul(g, frequencies) s = Sin(p) y = Mul(h, s) }""",
        words=normal(9, 4),
        one=np.array(1, np.float32),
        low=np.array(LOWEST, np.float32),
        last=np.array([-1]),
        masked=np.full(4, LOWEST, np.float32),
        w=normal(4, 4),
        bias=normal(4),
        root=np.array(2, np.float32),
        frequencies=normal(1, 4),
    )
    module = torch_graph.TorchGraph(graph)
    learned = {name for name in module.names() if module.parameter(name).requires_grad}
    assert learned == {"words", "w", "bias"}


def test_gradients_of_a_linear_layer_are_the_formula() -> None:
    module = torch_graph.TorchGraph(linear())
    x = torch.from_numpy(normal(5, 3))
    module({"x": x})["y"].sum().backward()
    torch.testing.assert_close(module.parameter("w").grad, x.sum(0)[:, None].expand(3, 2))
    torch.testing.assert_close(module.parameter("b").grad, torch.full((2,), 5.0))
    assert module.parameter("w2").grad is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("y = Det(x)", r"node '.*' \(Det\): this operator cannot be trained"),
        (
            "c = Constant <value = bool {1}> () y = If (c) <then_branch = t () => (float[2,2] a) "
            "{ a = Identity(x) }, else_branch = e () => (float[2,2] b) { b = Neg(x) }>",
            r"node '.*' \(If\): bodies of If, Loop and Scan cannot be trained",
        ),
        ("y = Cast<to = 8>(x)", r"node '.*' \(Cast\): type 8 cannot be trained"),
    ],
)
def test_what_does_not_map_is_named(text: str, message: str) -> None:
    result = "string" if "Cast" in text else "float"
    graph = parse(f"g (float[2,2] x) => ({result} y) {{ {text} }}")
    with pytest.raises(TrainingError, match=message):
        torch_graph.TorchGraph(graph)


@pytest.mark.parametrize(
    ("feed", "watch", "message"),
    [
        ({}, [], "input 'x' is missing"),
        ({"x": normal(2, 3)}, ["none"], "watched tensor 'none' is not in the graph"),
        ({"x": normal(2, 4)}, [], r"node '.*' \(MatMul\): torch failed on inputs \[\[2, 4\], \[3"),
    ],
)
def test_bad_input_is_one_message(feed: Any, watch: list[str], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        torch_graph.TorchGraph(linear())(tensors(feed), watch=watch)


class Table:
    """A slot that doubles, and notes whether it was asked for all or for rows."""

    is_table = True

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, x: Any) -> Any:
        self.asked.append("all")
        return x * 2

    def rows(self, x: Any, index: Any) -> Any:
        self.asked.append("rows")
        return x[index] * 2


@pytest.mark.parametrize("axis", [0, 1])
def test_a_gather_asks_for_rows_of_a_table_alone(axis: int) -> None:
    """A tied head reads the whole table, and so does a Gather of columns."""
    graph = parse(
        f"""g (int64[B] i) => (float y, float z)
        {{ y = Gather<axis={axis}>(t, i) z = MatMul(u, t) }}""",
        t=normal(3, 4),
        u=normal(2, 3),
    )
    slot, gather, head = Table(), *(node.name for node in graph.nodes)
    feed = {"i": torch.tensor([2, 0])}
    plain = torch_graph.TorchGraph(graph)(feed)
    module = torch_graph.TorchGraph(graph, {Use(gather, 0): slot, Use(head, 1): slot})
    for name, values in module(feed).items():
        assert torch.equal(values, plain[name] * 2)
    assert slot.asked == (["rows", "all"] if axis == 0 else ["all"])
