"""Random noise in place of rounding: whether a difference is more than what any rounding would do.

Float16 rounds a number with mantissa m by up to 2^-11/m of its size, which for mantissas of even
logarithms has a root mean square of .7355 · 2^-11/√3. Here each float16 result is left in float32
and gets noise of that size, uniform and independent. Where integers follow, both move values that
lie near the middle between two integers to the other one.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator

import onnx
from onnx import helper

from qcompile.runtime.evaluation.float16_emulation import rounding_form

FLOAT16, FLOAT32 = 11, 24  # bits of mantissa, with the first one
_SIZE = math.sqrt(3 / (8 * math.log(2)))  # root mean square of 1/m


def with_noise(model: bytes, bits: int, seed: int = 0) -> bytes:
    """The model in float32, with noise of a float of ``bits`` bits where it rounds to float16."""
    proto = onnx.ModelProto.FromString(rounding_form(model))
    rounded = {node.output[0] for node in proto.graph.node if _rounds(node)}
    nodes = [new for node in proto.graph.node for new in _noisy(node, bits, seed)]
    kept = [value for value in proto.graph.value_info if value.name not in rounded]
    del proto.graph.node[:], proto.graph.value_info[:]
    proto.graph.node.extend(nodes)
    proto.graph.value_info.extend(kept)
    data: bytes = proto.SerializeToString()
    return data


def _rounds(node: onnx.NodeProto) -> bool:
    """True of the Cast to float16 that ``rounding_form`` adds after an operator."""
    return node.op_type == "Cast" and node.name.endswith("/round")


def _noisy(node: onnx.NodeProto, bits: int, seed: int) -> Iterator[onnx.NodeProto]:
    if not _rounds(node):
        yield node
        return
    exact, result = node.input[0], node.output[0]
    noise, added = f"{result}/noise", f"{result}/added"
    most = _SIZE * 2.0**-bits
    drawn = helper.make_node("RandomUniformLike", [exact], [noise], low=-most, high=most)
    drawn.attribute.append(helper.make_attribute("seed", float(_seed(seed, result))))
    yield drawn
    yield helper.make_node("Mul", [exact, noise], [added])
    yield helper.make_node("Add", [exact, added], [result])


def _seed(seed: int, tensor: str) -> int:
    """Another one for each tensor, the same in each run."""
    return zlib.crc32(f"{seed} {tensor}".encode()) >> 8
