"""The two models of a compilation, each read once: the float input, and the compiled one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import onnx

from qcompile.compiler.report import ledger
from qcompile.compiler.report.ledger import Summary
from qcompile.ir import Graph, half_type, is_op
from qcompile.ir.analysis import shape_inference
from qcompile.ir.model_io import external_data, from_proto, read_model, write_model
from qcompile.ir.model_io.external_data import Storage
from qcompile.ir.model_io.write_model import ModelFiles, externalize_weights
from qcompile.planning import Context
from qcompile.rewriting.pass_manager import PassManager
from qcompile.rewriting.pipeline_spec import parse
from qcompile.rewriting.registry import target
from qcompile.runtime import session
from qcompile.system import digests


@dataclass(frozen=True)
class FloatModel:
    """stored: its file or bytes. external: other files that hold its weights. size: bytes of all
    files. content: bytes and counts by kind and type. raised: the same model in float32, where this
    one cannot run."""

    stored: bytes | Path
    external: tuple[Path, ...]
    size: int
    content: list[Summary]
    raised: ModelFiles | None = None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the model with its external data."""
        return digests.model_digest(self.stored, self.external)

    @cached_property
    def _externalized(self) -> ModelFiles | None:
        return externalize_weights(self.stored) if isinstance(self.stored, Path) else None

    @property
    def running(self) -> bytes | Path:
        """The model for the runtime to load: weights in a separate file, which is memory-mapped."""
        if self.raised is not None:
            return self.raised.path
        return self.stored if self._externalized is None else self._externalized.path


def read_float_model(model: read_model.Source) -> tuple[FloatModel, Graph]:
    """The model, and its graph. Raises ModelError where it cannot be read."""
    stored = read_model.runnable(model)
    proto, storage = read_model.read_model(model)
    size = len(stored) if isinstance(stored, bytes) else stored.stat().st_size
    size += external_data.external_bytes(proto)
    external = read_model.external_files(proto, storage)
    graph = from_proto.from_proto(proto, storage)
    content = ledger.summarize_rows(ledger.ledger_rows(proto, size))
    return FloatModel(stored, external, size, content), graph


def computes_in_bfloat16(graph: Graph) -> bool:
    """True where a node other than Cast reads or makes bfloat16: the CPU provider has no kernels.

    Casts it has, so that weights stored in bfloat16 are no obstacle.
    """
    return any(
        half_type(tensor) == "bfloat16"
        for node in graph.nodes
        if not is_op(node, "Cast")
        for tensor in (*node.inputs, *node.outputs)
    )


def in_float32(model: read_model.Source) -> ModelFiles:
    """The model after ``raise-half`` alone, in a temporary folder.

    Raises ModelError where it cannot be read, OutputError where there is no room.
    """
    graph = from_proto.from_proto(*read_model.read_model(model))
    shape_inference.infer(graph)
    PassManager(tuple(parse("raise-half"))).run(graph, Context(target("cpu"), session.evaluate))
    return write_model.write_model(graph, "reference")


@dataclass(frozen=True)
class CompiledModel:
    """The compiled model in a temporary folder, which lives as long as this object."""

    files: ModelFiles

    @property
    def path(self) -> Path:
        return self.files.path

    @cached_property
    def size(self) -> int:
        """Bytes of all its files."""
        return self.files.size

    @cached_property
    def sha256(self) -> str:
        """Of the model's own file, which holds the digest of its data file."""
        return digests.file_digest(self.path)

    @cached_property
    def parsed(self) -> tuple[onnx.ModelProto, Storage]:
        """The model without its large weights, and where those are stored."""
        return read_model.read_model(self.path)
