"""The oldest onnxruntime that runs a file, by the forms of weights that are in it.

Found by trying: ``python -m tools.first_runtime`` writes a file for each form, and runs these files
with any version. Forms that all supported versions run are not in the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx

from qcompile.ir.operators import op_name
from qcompile.ir.subgraph import bodies

Version = tuple[int, int]

SUPPORTED: Version = (1, 22)  # the oldest one that qcompile itself runs with, as in setup.cfg
_NIBBLES = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
_TWO_BITS = (onnx.TensorProto.INT2, onnx.TensorProto.UINT2)
_INTEGER_DATA = 4  # the accuracy_level of MatMulNBits at which it rounds its data


@dataclass(frozen=True)
class Form:
    """What an operator reads, and the first version that does.

    ``types``: of the constant that is its first input, empty for any. ``bits``: its attribute, None
    for any. ``float_data``: only where its accuracy_level keeps data float. ``provider``: where
    only the kernels of that provider differ between versions; ``""`` where the version is that of
    the operator or the file format.
    """

    op: str
    name: str
    since: Version
    types: tuple[int, ...] = ()
    bits: int | None = None
    float_data: bool = False
    provider: str = ""


_CPU = "CPUExecutionProvider"
FORMS = (
    Form("Cast", "INT4 and UINT4 that a Cast unpacks", (1, 23), _NIBBLES, provider=_CPU),
    Form("DequantizeLinear", "INT2 and UINT2 of opset 25", (1, 24), _TWO_BITS),
    Form("com.microsoft.MatMulNBits", "MatMulNBits of 2 bits", (1, 24), bits=2, provider=_CPU),
    Form(
        "com.microsoft.MatMulNBits",
        "MatMulNBits of 8 bits with float data",
        (1, 23),
        bits=8,
        float_data=True,
        provider=_CPU,
    ),
    Form("com.microsoft.GatherBlockQuantized", "GatherBlockQuantized", (1, 23)),
    Form(
        "com.microsoft.GatherBlockQuantized",
        "GatherBlockQuantized of 2 bits",
        (1, 27),
        bits=2,
        provider=_CPU,
    ),
)


def newest_form(model: onnx.ModelProto, provider: str) -> Form | None:
    """The form in a model that the newest onnxruntime is needed for, None without such forms."""
    types = {t.name: t.data_type for t in model.graph.initializer}
    nodes = list(_nodes(model.graph))
    found = (
        form
        for form in FORMS
        if form.provider in ("", provider) and any(_has(node, form, types) for node in nodes)
    )
    return max(found, key=lambda form: form.since, default=None)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Those in bodies too."""
    for node in graph.node:
        yield node
        for body in bodies(node):
            yield from _nodes(body)


def _has(node: onnx.NodeProto, form: Form, types: dict[str, int]) -> bool:
    if op_name(node) != form.op:
        return False
    values = {a.name: a.i for a in node.attribute}
    if form.types and types.get(node.input[0]) not in form.types:
        return False
    if form.float_data and values.get("accuracy_level", 0) >= _INTEGER_DATA:
        return False
    return form.bits is None or values.get("bits") == form.bits
