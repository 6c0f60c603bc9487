"""Builds a convolutional network of ResNet-18's size with random weights, as ONNX.

Nothing is downloaded: He et al. 2015, table 1, basic blocks, 1000 classes, images of 224 x 224;
weights are drawn from --seed, normalization from a narrow range around the identity. It is for
measuring speed and size; its outputs mean nothing. Writes model.onnx into DEST.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from models._common import fail, make_folder, make_parser

_STAGES, _BLOCKS, _CLASSES, _IMAGE = 4, 2, 1000, 224


@dataclass
class Builder:
    """A graph under construction; each method returns the name of the tensor that it adds."""

    rng: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def constant(self, values: np.ndarray) -> str:
        """An initializer in float32."""
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        """A node with one output of the same name."""
        name = f"{op.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def convolution(self, x: str, inputs: int, outputs: int, size: int, stride: int) -> str:
        """Conv without a bias, normalized, as frameworks export it."""
        spread = np.sqrt(2 / (inputs * size * size))
        kernel = self.rng.standard_normal((outputs, inputs, size, size)) * spread
        shape = {"kernel_shape": [size, size], "strides": [stride, stride]}
        conv = self.node("Conv", x, self.constant(kernel), pads=[size // 2] * 4, **shape)
        scale, variance = (self.rng.uniform(0.5, 1.5, outputs) for _ in range(2))
        shift, mean = (self.rng.standard_normal(outputs) / 5 for _ in range(2))
        parameters = [self.constant(v) for v in (scale, shift, mean, variance)]
        return self.node("BatchNormalization", conv, *parameters)

    def block(self, x: str, inputs: int, outputs: int, stride: int) -> str:
        """Two convolutions and a shortcut, which is projected where its shape changes."""
        hidden = self.node("Relu", self.convolution(x, inputs, outputs, 3, stride))
        hidden = self.convolution(hidden, outputs, outputs, 3, 1)
        if inputs != outputs or stride != 1:
            x = self.convolution(x, inputs, outputs, 1, stride)
        return self.node("Relu", self.node("Add", hidden, x))


def build(width: int, seed: int) -> onnx.ModelProto:
    """The network; ``width`` channels after the first convolution."""
    builder = Builder(np.random.default_rng(seed))
    x = builder.node("Relu", builder.convolution("image", 3, width, 7, 2))
    x = builder.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    channels = width
    for stage in range(_STAGES):
        for block in range(_BLOCKS):
            outputs = width << stage
            x = builder.block(x, channels, outputs, 2 if stage and not block else 1)
            channels = outputs
    x = builder.node("Flatten", builder.node("GlobalAveragePool", x))
    weight = builder.rng.standard_normal((_CLASSES, channels)) / np.sqrt(channels)
    bias = np.zeros(_CLASSES)
    builder.node("Gemm", x, builder.constant(weight), builder.constant(bias), transB=1)
    builder.nodes[-1].output[0] = "logits"
    shapes: dict[str, list[str | int]] = {
        "image": ["batch_size", 3, _IMAGE, _IMAGE],
        "logits": ["batch_size", _CLASSES],
    }
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in shapes.items()]
    graph = helper.make_graph(builder.nodes, "resnet18", ends[:1], ends[1:], builder.constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def main() -> None:
    """Runs the recipe from the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.width < 1:
        fail("--width must be at least 1")
    folder = make_folder(args.dest)
    onnx.save(build(args.width, args.seed), folder / "model.onnx")
    print(folder / "model.onnx")


if __name__ == "__main__":
    main()
