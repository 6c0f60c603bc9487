"""Random valid models and feeds for them: shapes are tracked while the graph grows.

A dimension is a number or one of the symbols B and S, whose sizes vary between feeds. The same seed
gives the same model, and with fewer operators, a prefix of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

Array = npt.NDArray[Any]
Dim = int | str
OPSETS = (11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21)
FEED_SIZES = ((2, 5), (1, 1), (3, 7), (1, 9), (4, 2), (2, 3))  # of B and S
WORDS = 40


@dataclass(frozen=True)
class Value:
    """A float tensor of the graph."""

    name: str
    shape: tuple[Dim, ...]

    @property
    def last(self) -> int | None:
        """The size of the last axis where it is fixed."""
        found = self.shape[-1] if self.shape else None
        return found if isinstance(found, int) else None


@dataclass
class Net:
    """A graph under construction."""

    rng: np.random.Generator
    opset: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    count: int = 0

    def fresh(self, base: str) -> str:
        self.count += 1
        return f"{base}{self.count}"

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def pick(self, *options: Any) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def constant(self, values: Array, base: str = "c") -> str:
        """An initializer, sometimes a Constant node."""
        name = self.fresh(base)
        tensor = onnx.numpy_helper.from_array(np.asarray(values), name)
        if self.chance(0.2):
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        else:
            self.constants.append(tensor)
        return name

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64), "i")

    def add(self, op: str, inputs: list[str], **attrs: Any) -> str:
        """A node with one output; its name."""
        (made,) = self.add_many(op, inputs, 1, **attrs)
        return made

    def add_many(self, op: str, inputs: list[str], outputs: int, **attrs: Any) -> list[str]:
        names = [self.fresh("t") for _ in range(outputs)]
        label = "" if self.chance(0.2) else self.fresh(op)
        self.nodes.append(helper.make_node(op, inputs, names, name=label, **attrs))
        return names

    def keep(self, name: str, shape: tuple[Dim, ...]) -> Value:
        """Register a tensor, so that later operators may read it."""
        value = Value(name, shape)
        self.values.append(value)
        return value

    def axes(self, op: str, since: int, data: str, *axes: int, **attrs: Any) -> str:
        """An operator whose axes became an input in opset ``since``."""
        if self.opset >= since:
            return self.add(op, [data, self.ints(*axes)], **attrs)
        return self.add(op, [data], axes=list(axes), **attrs)

    def weight(self, *shape: int) -> Array:
        """Values as in trained layers, sometimes with a channel of zeros or of large values."""
        values = np.asarray(self.rng.standard_normal(shape), np.float32)
        kind = self.rng.random()
        if not shape:
            return values
        values = values / np.float32(np.sqrt(shape[0]))
        if kind < 0.05:
            values[..., 0] = 0
        elif kind < 0.10:
            values[..., -1] = 0.5
        elif kind < 0.15:
            values[..., 0] *= 30
        elif kind < 0.17:
            values[:] = 0
        elif kind < 0.19:
            values *= np.float32(1e-30)
        return values


def start(net: Net) -> None:
    """The inputs: a float tensor, sometimes tokens looked up in a table."""
    width = int(net.pick(4, 6, 8, 12, 16))
    if net.chance(0.3):
        net.inputs.append(helper.make_tensor_value_info("ids", TensorProto.INT64, ["B", "S"]))
        table = net.constant(net.weight(WORDS, width) * np.float32(6), "table")
        net.keep(net.add("Gather", [table, "ids"]), ("B", "S", width))
    shape: tuple[Dim, ...] = net.pick(
        ("B", "S", width), ("B", "S", width), ("B", width), ("S", width)
    )
    if not net.values or net.chance(0.5):
        net.inputs.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape)))
        net.keep("x", shape)
    if net.chance(0.05):
        net.inputs.append(helper.make_tensor_value_info("level", TensorProto.FLOAT, []))
        net.keep("level", ())


def finish(net: Net) -> onnx.ModelProto:
    """The model whose outputs are the last tensor and up to two others."""
    computed = [v for v in net.values if not any(v.name == i.name for i in net.inputs)]
    if not computed:
        computed = [net.keep(net.add("Relu", [net.values[-1].name]), net.values[-1].shape)]
    chosen = [computed[-1]]
    for _ in range(int(net.rng.integers(3))):
        chosen.append(computed[int(net.rng.integers(len(computed)))])
    outputs = [
        helper.make_tensor_value_info(v.name, TensorProto.FLOAT, list(v.shape))
        for v in dict.fromkeys(chosen)
    ]
    graph = helper.make_graph(net.nodes, "random", net.inputs, outputs, net.constants)
    imports = [helper.make_opsetid("", net.opset)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8)
    onnx.checker.check_model(model)
    return model


def feeds(model: onnx.ModelProto, seed: int, spread: float = 1.0) -> list[dict[str, Array]]:
    """One feed for each of ``FEED_SIZES``, in a random order."""
    rng = np.random.default_rng([seed, 1])
    found = []
    for batch, length in rng.permutation(np.array(FEED_SIZES)):
        sizes = {"B": int(batch), "S": int(length)}
        feed = {}
        for info in model.graph.input:
            kind = info.type.tensor_type
            shape = [sizes.get(d.dim_param, d.dim_value) for d in kind.shape.dim]
            if kind.elem_type == TensorProto.INT64:
                feed[info.name] = rng.integers(0, WORDS, shape)
            else:
                values = np.asarray(rng.standard_normal(shape) * spread, np.float32)
                feed[info.name] = values.reshape(shape)
        found.append(feed)
    return found
