"""The oldest onnxruntime that runs a file, by its file format and the forms of weights in it.

Found by trying: ``python -m tools.first_runtime`` writes a file for each form and each version of
the format, and runs these files with any version. What all supported versions run is not in the
tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx

from qcompile.errors import ModelError
from qcompile.ir.operators import op_name
from qcompile.ir.subgraph import bodies

Version = tuple[int, int]

# The oldest one that is supported, as in setup.cfg. Older ones fuse LayerNormalization with a scale
# of shape [1,H] (pass ``unfuse-skip-layernorm``) to SkipLayerNormalization, which then refuses it.
OLDEST = "1.24.3"
# The first version that loads these versions of the standard operators, and of the file format.
OPSETS: dict[int, Version] = {26: (1, 25), 27: (1, 32)}
IR_VERSIONS: dict[int, Version] = {14: (1, 32)}
_STANDARD = ("", "ai.onnx")  # the domain of the standard operators has two names


@dataclass(frozen=True)
class Feature:
    """What a file has, the first version that runs it, and what else the user can do."""

    name: str
    since: Version
    instead: str

    @property
    def version(self) -> str:
        return ".".join(map(str, self.since))


class OldRuntimeError(ModelError):
    """A model has a ``feature`` that the installed onnxruntime is too old for."""

    def __init__(self, feature: Feature, installed: str, what: str) -> None:
        super().__init__(
            f"{what} has {feature.name}: found onnxruntime {installed}, expected "
            f"{feature.version} or later. pip install -U onnxruntime, or {feature.instead}"
        )
        self.feature = feature


@dataclass(frozen=True)
class Form:
    """An operator with this attribute ``bits``, and the first version whose kernel has it.

    ``provider``: where only its kernels differ between versions.
    """

    op: str
    name: str
    since: Version
    bits: int
    provider: str


FORMS = (
    Form(
        "com.microsoft.GatherBlockQuantized",
        "GatherBlockQuantized of 2 bits",
        (1, 27),
        bits=2,
        provider="CPUExecutionProvider",
    ),
)
_NEWEST = max(*(form.since for form in FORMS), *OPSETS.values(), *IR_VERSIONS.values())


def runs_all(installed: str) -> bool:
    """True for a version from which on everything in the tables runs."""
    return release(installed) >= _NEWEST


def release(version: str) -> Version:
    """The first two numbers of a version as it is written."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def newest_feature(
    model: onnx.ModelProto, provider: str, installed: str, what: str = "the model"
) -> Feature | None:
    """What in a model needs the newest onnxruntime; None if all supported versions run it.

    ``what`` names the model in the message. Raises OldRuntimeError if it needs a newer version than
    the installed one.
    """
    features = (*_forms(model, provider), *_format(model))
    feature = max(features, key=lambda feature: feature.since, default=None)
    if feature is not None and feature.since > release(installed):
        raise OldRuntimeError(feature, installed, what)
    return feature


def _format(model: onnx.ModelProto) -> Iterator[Feature]:
    opset = max((o.version for o in model.opset_import if o.domain in _STANDARD), default=0)
    if opset in OPSETS:
        yield Feature(f"opset {opset}", OPSETS[opset], "export the model with an earlier opset")
    ir = int(model.ir_version)
    if ir in IR_VERSIONS:
        instead = "save it with an earlier one (model.ir_version = 10)"
        yield Feature(f"IR version {ir}", IR_VERSIONS[ir], instead)


def _forms(model: onnx.ModelProto, provider: str) -> Iterator[Feature]:
    forms = [form for form in FORMS if form.provider == provider]
    for node in _nodes(model.graph) if forms else ():
        name, values = op_name(node), {a.name: a.i for a in node.attribute}
        for form in forms:
            if name == form.op and values.get("bits") == form.bits:
                yield Feature(form.name, form.since, "choose other bits (docs/lowbit.md)")


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Those in bodies too."""
    for node in graph.node:
        yield node
        for body in bodies(node):
            yield from _nodes(body)
