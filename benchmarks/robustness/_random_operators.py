"""Operators of random graphs. Each takes a tensor and adds nodes, or returns None if unsuitable."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper

from benchmarks.robustness._random_graphs import OPSETS, Dim, Net, Value, finish, start

Op = Callable[[Net, Value], "Value | None"]
OPS: list[tuple[float, Op]] = []


def op(weight: float) -> Callable[[Op], Op]:
    """Register an operator with the weight with which it is drawn."""

    def register(grow: Op) -> Op:
        OPS.append((weight, grow))
        return grow

    return register


def build(seed: int, count: int = 12) -> onnx.ModelProto:
    """The model of a seed, of at most ``count`` operators beyond its inputs."""
    rng = np.random.default_rng([seed, 0])
    net = Net(rng, OPSETS[int(rng.integers(len(OPSETS)))])
    length = int(rng.integers(1, 13))
    start(net)
    shares = np.array([weight for weight, _ in OPS], float)
    shares /= shares.sum()
    for _ in range(min(length, count)):
        grow = OPS[int(rng.choice(len(OPS), p=shares))][1]
        recent = min(len(net.values), 3)  # mostly one of the last tensors, so that graphs are deep
        back = int(rng.integers(1, recent + 1)) if net.chance(0.9) else len(net.values)
        grow(net, net.values[-back])
    return finish(net)


@op(6)
def linear(net: Net, x: Value) -> Value | None:
    if x.last is None or len(x.shape) < 2:
        return None
    width = int(net.pick(4, 6, 8, 16, 24))
    made = net.add("MatMul", [x.name, net.constant(net.weight(x.last, width), "w")])
    if net.chance(0.7):
        bias = net.constant(net.weight(width), "b")
        made = net.add("Add", net.pick([made, bias], [bias, made]))
    return net.keep(made, (*x.shape[:-1], width))


@op(3)
def siblings(net: Net, x: Value) -> Value | None:
    """Linear layers that read one tensor, as Q, K and V do; sometimes with a shared weight."""
    if x.last is None or len(x.shape) < 2:
        return None
    shared = net.constant(net.weight(x.last, 8), "w")
    made = [
        net.add(
            "MatMul",
            [x.name, shared if net.chance(0.3) else net.constant(net.weight(x.last, 8), "w")],
        )
        for _ in range(3)
    ]
    total = net.add("Add", [net.add("Mul", made[:2]), made[2]])
    return net.keep(total, (*x.shape[:-1], 8))


@op(3)
def gemm(net: Net, x: Value) -> Value | None:
    if x.last is None or len(x.shape) != 2:
        return None
    width = int(net.pick(4, 6, 8))
    attrs: dict[str, float] = {"transB": int(net.chance(0.5))}
    if net.chance(0.2):
        attrs |= {"alpha": 0.5, "beta": 2.0}
    shape = (width, x.last) if attrs["transB"] else (x.last, width)
    inputs = [x.name, net.constant(net.weight(*shape), "w")]
    if net.opset < 11 or net.chance(0.8):
        inputs.append(net.constant(net.weight(*net.pick((width,), (1, width), (1,))), "b"))
    return net.keep(net.add("Gemm", inputs, **attrs), (x.shape[0], width))


@op(1)
def left_weight(net: Net, x: Value) -> Value | None:
    """The constant is the left operand."""
    if len(x.shape) != 2 or not isinstance(x.shape[0], int):
        return None
    made = net.add("MatMul", [net.constant(net.weight(5, x.shape[0]), "w"), x.name])
    return net.keep(made, (5, x.shape[1]))


@op(1)
def batched_weight(net: Net, x: Value) -> Value | None:
    if x.last is None or len(x.shape) != 3:
        return None
    made = net.add("MatMul", [x.name, net.constant(net.weight(1, x.last, 6), "w")])
    return net.keep(made, (*x.shape[:-1], 6))


@op(3)
def layer_norm(net: Net, x: Value) -> Value | None:
    if x.last is None or len(x.shape) < 2:
        return None
    gain = net.constant(np.float32(1) + net.weight(x.last), "g")
    bias = net.constant(net.weight(x.last), "b")
    if net.opset >= 17 and net.chance(0.5):
        return net.keep(net.add("LayerNormalization", [x.name, gain, bias], axis=-1), x.shape)
    mean = net.axes("ReduceMean", 18, x.name, -1, keepdims=1)
    off = net.add("Sub", [x.name, mean])
    square = net.add("Pow", [off, net.constant(np.array(2, np.float32))])
    spread = net.axes("ReduceMean", 18, square, -1, keepdims=1)
    root = net.add("Sqrt", [net.add("Add", [spread, net.constant(np.array(1e-5, np.float32))])])
    scaled = net.add("Mul", [net.add("Div", [off, root]), gain])
    return net.keep(net.add("Add", [scaled, bias]), x.shape)


@op(2)
def gelu(net: Net, x: Value) -> Value | None:
    half = net.constant(np.array(0.5, np.float32))
    root = net.constant(np.array(np.sqrt(2), np.float32))
    one = net.constant(np.array(1, np.float32))
    inner = net.add("Add", [net.add("Erf", [net.add("Div", [x.name, root])]), one])
    made = net.add("Mul", [net.add("Mul", [x.name, inner]), half])
    return net.keep(made, x.shape)


@op(2)
def attention(net: Net, x: Value) -> Value | None:
    if x.last is None or len(x.shape) != 3 or x.last % 2:
        return None
    heads, size = 2, x.last // 2
    parts = []
    for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]):
        made = net.add("MatMul", [x.name, net.constant(net.weight(x.last, x.last), "w")])
        made = net.add("Add", [made, net.constant(net.weight(x.last), "b")])
        made = net.add("Reshape", [made, net.ints(0, 0, heads, size)])
        parts.append(net.add("Transpose", [made], perm=perm))
    scores = net.add("MatMul", parts[:2])
    scores = net.add("Div", [scores, net.constant(np.array(np.sqrt(size), np.float32))])
    context = net.add("MatMul", [net.add("Softmax", [scores], axis=-1), parts[2]])
    context = net.add("Transpose", [context], perm=[0, 2, 1, 3])
    made = net.add("Reshape", [context, net.ints(0, 0, x.last)])
    return net.keep(net.add("Add", [made, x.name]) if net.chance(0.5) else made, x.shape)


@op(3)
def unary(net: Net, x: Value) -> Value | None:
    name = net.pick(
        "Relu", "Tanh", "Sigmoid", "Abs", "Neg", "Identity", "Softplus", "LeakyRelu", "Elu"
    )
    return net.keep(net.add(name, [x.name]), x.shape)


@op(1)
def dropout(net: Net, x: Value) -> Value | None:
    return net.keep(net.add_many("Dropout", [x.name], net.pick(1, 2))[0], x.shape)


@op(1)
def clip(net: Net, x: Value) -> Value | None:
    low = net.constant(np.array(-1, np.float32)) if net.chance(0.7) else ""
    return net.keep(net.add("Clip", [x.name, low, net.constant(np.array(2, np.float32))]), x.shape)


@op(1)
def softmax(net: Net, x: Value) -> Value | None:
    return net.keep(net.add("Softmax", [x.name], axis=-1), x.shape) if x.shape else None


@op(3)
def with_constant(net: Net, x: Value) -> Value | None:
    last = x.last or 1
    values = net.weight(*net.pick((), (1,), (last,))) if x.shape else net.weight(1)[0]
    name = net.pick("Add", "Sub", "Mul", "Div")
    values = np.asarray(values, np.float32)
    if name == "Div":
        values = np.where(np.abs(values) < 0.25, np.float32(1.5), values).astype(np.float32)
    pair = [x.name, net.constant(values)]
    return net.keep(
        net.add(name, pair if net.chance(0.7) or name == "Div" else pair[::-1]), x.shape
    )


@op(3)
def with_other(net: Net, x: Value) -> Value | None:
    others = [v for v in net.values if v.shape == x.shape]
    other = others[int(net.rng.integers(len(others)))]
    return net.keep(net.add(net.pick("Add", "Sub", "Mul", "Max"), [x.name, other.name]), x.shape)


@op(2)
def reduction(net: Net, x: Value) -> Value | None:
    if len(x.shape) < 2:
        return None
    axis = int(net.rng.integers(len(x.shape)))
    name, keep = net.pick("ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum"), net.chance(0.5)
    since = 13 if name == "ReduceSum" else 18
    made = net.axes(name, since, x.name, axis - len(x.shape) * net.chance(0.5), keepdims=int(keep))
    rest = (*x.shape[:axis], *((1,) if keep else ()), *x.shape[axis + 1 :])
    return net.keep(made, rest)


@op(2)
def transpose(net: Net, x: Value) -> Value | None:
    if not x.shape:
        return None
    perm = [int(i) for i in net.rng.permutation(len(x.shape))]
    made = net.add("Transpose", [x.name], perm=perm)
    return net.keep(made, tuple(x.shape[i] for i in perm))


@op(2)
def split_last(net: Net, x: Value) -> Value | None:
    """[…, 2 n] to […, 2, n], or back."""
    if x.last is None or len(x.shape) < 2 or "B" in x.shape[1:-1]:
        return None
    zeros = [0] * (len(x.shape) - 1)
    if len(x.shape) == 4 and isinstance(x.shape[2], int):
        made = net.add("Reshape", [x.name, net.ints(0, 0, -1)])
        return net.keep(made, (*x.shape[:2], x.shape[2] * x.last))
    if x.last % 2 or len(x.shape) > 3:
        return None
    made = net.add("Reshape", [x.name, net.ints(*zeros, 2, x.last // 2)])
    return net.keep(made, (*x.shape[:-1], 2, x.last // 2))


@op(1)
def computed_reshape(net: Net, x: Value) -> Value | None:
    """As exporters write it: the target is concatenated from entries of the input's shape."""
    if x.last is None or len(x.shape) != 3:
        return None
    shape = net.add("Shape", [x.name])
    dims = [net.add("Gather", [shape, net.constant(np.array(i, np.int64))]) for i in (0, 1)]
    parts = [net.axes("Unsqueeze", 13, d, 0) for d in dims]
    target = net.add("Concat", [*parts, net.ints(x.last)], axis=0)
    return net.keep(net.add("Reshape", [x.name, target]), x.shape)


@op(1)
def flatten(net: Net, x: Value) -> Value | None:
    if len(x.shape) < 3 or not all(isinstance(d, int) for d in x.shape[1:]):
        return None
    rest = int(np.prod([int(d) for d in x.shape[1:]]))
    return net.keep(net.add("Flatten", [x.name], axis=1), (x.shape[0], rest))


@op(1)
def unsqueeze(net: Net, x: Value) -> Value | None:
    if len(x.shape) > 3:
        return None
    return net.keep(net.axes("Unsqueeze", 13, x.name, 0), (1, *x.shape))


@op(1)
def squeeze(net: Net, x: Value) -> Value | None:
    if 1 not in x.shape:
        return None
    axis = x.shape.index(1)
    made = net.axes("Squeeze", 13, x.name, axis)
    return net.keep(made, (*x.shape[:axis], *x.shape[axis + 1 :]))


@op(2)
def slice_last(net: Net, x: Value) -> Value | None:
    if x.last is None or x.last < 4:
        return None
    start, end = net.pick((0, 2), (1, 4), (-3, x.last))
    inputs = [x.name, net.ints(start), net.ints(end), net.ints(-1)]
    return net.keep(net.add("Slice", inputs), (*x.shape[:-1], end - start % x.last))


@op(1)
def first_token(net: Net, x: Value) -> Value | None:
    if len(x.shape) != 3:
        return None
    index = np.array(0, np.int64)
    return net.keep(
        net.add("Gather", [x.name, net.constant(index)], axis=1), (x.shape[0], x.shape[2])
    )


@op(2)
def concat(net: Net, x: Value) -> Value | None:
    if x.last is None:
        return None
    others = [
        v for v in net.values if v.shape[:-1] == x.shape[:-1] and v.last is not None and v.shape
    ]
    other = others[int(net.rng.integers(len(others)))]
    made = net.add("Concat", [x.name, other.name], axis=net.pick(-1, len(x.shape) - 1))
    return net.keep(made, (*x.shape[:-1], x.last + (other.last or 0)))


@op(1)
def split(net: Net, x: Value) -> Value | None:
    if x.last is None or x.last % 2:
        return None
    attrs = {"num_outputs": 2} if net.opset >= 18 else {}
    first, second = net.add_many("Split", [x.name], 2, axis=-1, **attrs)
    net.keep(first, (*x.shape[:-1], x.last // 2))
    return net.keep(second, (*x.shape[:-1], x.last // 2))


@op(2)
def conv(net: Net, x: Value) -> Value | None:
    """Over tokens: [B, S, C] to [B, C, S], a convolution that keeps the length, maybe a norm."""
    if x.last is None or len(x.shape) != 3:
        return None
    groups = 2 if x.last % 2 == 0 and net.chance(0.3) else 1
    width = int(net.pick(1, 3))
    kernel = net.weight(8, x.last // groups, width)
    turned = net.add("Transpose", [x.name], perm=[0, 2, 1])
    inputs = [turned, net.constant(kernel, "k")]
    if net.chance(0.6):
        inputs.append(net.constant(net.weight(8), "b"))
    pads = [width // 2] * 2
    made = net.add("Conv", inputs, kernel_shape=[width], pads=pads, group=groups)
    if net.chance(0.4):
        spread = np.abs(net.weight(8)) + np.float32(0.5)
        norm = [net.weight(8) + np.float32(1), net.weight(8), net.weight(8), spread]
        made = net.add("BatchNormalization", [made, *(net.constant(v) for v in norm)])
    if net.chance(0.5):
        return net.keep(net.add("Transpose", [made], perm=[0, 2, 1]), (*x.shape[:2], 8))
    dims: tuple[Dim, ...] = (x.shape[0], 8, x.shape[1])
    return net.keep(made, dims)


@op(1)
def branch(net: Net, x: Value) -> Value | None:
    """If with a constant or computed condition; the branches read outer tensors."""
    if x.last is None or len(x.shape) < 2:
        return None
    weight = net.constant(net.weight(x.last, x.last), "w")
    graphs = []
    for name in ("MatMul", "Relu"):
        out = net.fresh("o")
        inputs = [x.name, weight] if name == "MatMul" else [x.name]
        node = helper.make_node(name, inputs, [out])
        info = helper.make_tensor_value_info(out, TensorProto.FLOAT, None)
        graphs.append(helper.make_graph([node], net.fresh("g"), [], [info]))
    if net.chance(0.5):
        condition = net.constant(np.array(net.chance(0.5)))
    else:
        size = net.add("Size", [x.name])
        condition = net.add("Less", [size, net.constant(np.array(40, np.int64))])
    made = net.add("If", [condition], then_branch=graphs[0], else_branch=graphs[1])
    return net.keep(made, x.shape)


@op(1)
def cast_there_and_back(net: Net, x: Value) -> Value | None:
    wide = net.add("Cast", [x.name], to=TensorProto.DOUBLE)
    return net.keep(net.add("Cast", [wide], to=TensorProto.FLOAT), x.shape)


@op(1)
def gather_last(net: Net, x: Value) -> Value | None:
    if x.last is None:
        return None
    places = net.rng.integers(0, x.last, 3)
    return net.keep(net.add("Gather", [x.name, net.constant(places)], axis=-1), (*x.shape[:-1], 3))


@op(1)
def table_of_constants(net: Net, x: Value) -> Value | None:
    """A lookup with constant indices, which may be folded."""
    if x.last is None or not x.shape:
        return None
    table = net.constant(net.weight(WIDE, x.last), "table")
    row = net.add("Gather", [table, net.constant(np.array(3, np.int64))])
    return net.keep(net.add("Add", [x.name, row]), x.shape)


WIDE = 20
