"""The two models of a compilation, each read once: the float input, and the compiled one.

The gate on size compares them. Only constants count, and growth of more than 1 KiB: nodes, names
and metadata are no weights, quantizers add a few bytes each, and masks or positions that are
computed at compile time from a few numbers are no copies of anything. A file that is not larger
passes in any case.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Literal

import onnx

from qcompile.compiler.report import ledger
from qcompile.compiler.report.ledger import Summary
from qcompile.errors import RecipeError
from qcompile.ir import Graph, half_type, is_op, lazy_values
from qcompile.ir.analysis import shape_inference
from qcompile.ir.model_io import external_data, from_proto, read_model, write_model
from qcompile.ir.model_io.external_data import Storage
from qcompile.ir.model_io.write_model import ModelFiles, externalize_weights
from qcompile.ir.pooling import EMBEDDING, PoolingKind, add_pooling
from qcompile.ir.subgraph import constant_bytes, element_types, subgraphs
from qcompile.planning import Context
from qcompile.rewriting.bodies import BodyCompiler
from qcompile.rewriting.pass_manager import PassManager
from qcompile.rewriting.pipeline_spec import parse
from qcompile.rewriting.registry import target
from qcompile.runtime import session
from qcompile.system import digests

BFLOAT16_NOTE = (
    "computes in bfloat16, which ONNX Runtime's CPU provider cannot run: compared and timed with "
    "the same model in float32"
)
_KEPT_OUTPUTS = "qcompile.outputs"
_ROOM = 1 << 10  # bytes
_NAMED = 3  # tensors in a message
_NEGLIGIBLE = 100  # how many times less a tensor grew than the first to be left out


@dataclass(frozen=True)
class FloatModel:
    """stored: its file or bytes. external: other files that hold its weights. size: bytes of all
    files. content: bytes and counts by kind and type. weights: bytes of each constant, by name.
    derived: the same model as it is compared and timed: in float32, where this one cannot run, with
    pooling, or with the outputs that are kept."""

    stored: bytes | Path
    external: tuple[Path, ...]
    size: int
    content: list[Summary]
    weights: dict[str, int]
    derived: ModelFiles | None = None

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
        if self.derived is not None:
            return self.derived.path
        return self.stored if self._externalized is None else self._externalized.path

    @property
    def running_external(self) -> tuple[Path, ...]:
        """The other files of ``running``, in its folder or below."""
        files = self.derived or self._externalized
        if files is None:
            return self.external
        return tuple(p for p in sorted(files.folder.path.iterdir()) if p != files.path)


def read_float_model(model: read_model.Source) -> tuple[FloatModel, Graph]:
    """The model, and its graph. Raises ModelError where it cannot be read."""
    stored = read_model.runnable(model)
    proto, storage = read_model.read_model(model)
    size = len(stored) if isinstance(stored, bytes) else stored.stat().st_size
    size += external_data.external_bytes(proto)
    external = read_model.external_files(proto, storage)
    graph = from_proto.from_proto(proto, storage)
    content = ledger.summarize_rows(ledger.ledger_rows(proto, size))
    weights = body_constants(graph)
    for name, constant in graph.constants().items():
        weights[name] += lazy_values.nbytes(constant)
    return FloatModel(stored, external, size, content, weights), graph


def body_constants(graph: Graph) -> Counter[str]:
    """Bytes of the constants that are stored in bodies of If, Loop and Scan, by name."""
    found = Counter[str]()
    for node in graph.nodes:
        for body in subgraphs(node):
            found += constant_bytes(body.proto)
    return found


def computes_in_bfloat16(graph: Graph) -> bool:
    """True where a node other than Cast reads or makes bfloat16: the CPU provider has no kernels.

    Casts it has, so that weights stored in bfloat16 are no obstacle. A body with bfloat16 in it
    counts too, whatever reads it there.
    """
    inside = [body for node in graph.nodes for body in subgraphs(node)]
    captured = {name for body in inside for name in body.reads}
    read = (t for n in graph.nodes if not is_op(n, "Cast") for t in (*n.inputs, *n.outputs))
    tensors = chain(read, (t for name, t in graph.tensors().items() if name in captured))
    return any(half_type(t) == "bfloat16" for t in tensors) or any(
        onnx.TensorProto.BFLOAT16 in element_types(body.proto) for body in inside
    )


def choose_outputs(
    graph: Graph, names: Sequence[str], pooling: PoolingKind | Literal[""], *, normalize: bool
) -> None:
    """Keep only the named outputs, all if there are no names, and pool states where asked to.

    The embedding is an output in any case; states that are pooled are one if they are named. Raises
    RecipeError for unknown names, ModelError where nothing can be pooled.
    """
    known = [t.name for t in graph.outputs]
    wanted = [n for n in names if not (pooling and n == EMBEDDING)]
    for name in wanted:
        if name not in known:
            listed = ", ".join(map(repr, known))
            raise RecipeError(f"the model has no output {name!r}, only {listed} (--outputs)")
    if wanted:
        graph.keep_outputs(wanted)
    if pooling:
        shape_inference.infer(graph)
        add_pooling(graph, pooling, normalize=normalize, keep=wanted)
    if names:
        graph.keep_outputs([EMBEDDING, *wanted] if pooling else wanted)
        kept = [t.name for t in graph.outputs]
        graph.header.metadata[_KEPT_OUTPUTS] = json.dumps(kept)


def written(graph: Graph) -> ModelFiles:
    """The graph as a model with external weights, in a temporary folder.

    Raises OutputError where there is no room.
    """
    model, folder = write_model.with_external_weights(graph)
    return ModelFiles(write_model.save_proto(model, folder), None, folder)


def removed_outputs(compiled: Graph, reference: Graph) -> set[str]:
    """The outputs of the reference that a compiled model was asked not to have."""
    try:
        kept = json.loads(compiled.header.metadata.get(_KEPT_OUTPUTS, "null"))
    except ValueError:
        kept = None  # not written by qcompile
    if not isinstance(kept, list):
        return set()
    return {str(t.name) for t in reference.outputs if t.name not in kept}


def in_float32(model: read_model.Source) -> ModelFiles:
    """The model after ``raise-half`` alone, also in bodies, in a temporary folder.

    Raises ModelError where it cannot be read, OutputError where there is no room.
    """
    graph = from_proto.from_proto(*read_model.read_model(model))
    shape_inference.infer(graph)
    passes, ctx = tuple(parse("raise-half")), Context(target("cpu"), session.evaluate)
    PassManager(passes).run(graph, ctx)
    BodyCompiler(passes).run(graph, ctx)
    return write_model.write_model(graph, "reference")


def needs_float32(model: read_model.Source) -> bool:
    """True if a model computes in bfloat16, for which the CPU provider has no kernels.

    Raises ModelError where it cannot be read.
    """
    proto = read_model.read_model(model)[0].graph
    types = element_types(proto) | {v.type.tensor_type.elem_type for v in proto.input}
    if onnx.TensorProto.BFLOAT16 not in types:
        return False
    graph = read_model.load(model)
    shape_inference.infer(graph)
    return computes_in_bfloat16(graph)


def in_float32_if_bfloat16(model: read_model.Source) -> ModelFiles | None:
    """The model in float32 if it computes in bfloat16, which ONNX Runtime's CPU provider cannot.

    None for any other model. Outputs are more exact than those of bfloat16 arithmetic; weights,
    inputs and outputs keep their values and types. Raises ModelError where it cannot be read,
    OutputError where there is no room.
    """
    return in_float32(model) if needs_float32(model) else None


def pooled_model(
    graph: Graph, kind: PoolingKind, *, normalize: bool, keep: Collection[str]
) -> ModelFiles:
    """Add pooling to a graph, and write it into a temporary folder. ``keep``: as ``add_pooling``.

    Types of the outputs must have been inferred. Raises ModelError where it cannot be pooled,
    OutputError where there is no room.
    """
    add_pooling(graph, kind, normalize=normalize, keep=keep)
    return written(graph)


@dataclass(frozen=True)
class CompiledModel:
    """The compiled model in a temporary folder, which lives as long as this object.

    weights: bytes of constants by their names in the input model, without those that were computed
    from a few numbers.
    """

    files: ModelFiles
    weights: dict[str, int]

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


def size_failures(
    model: FloatModel, compiled: CompiledModel, limit: float | None, *, quantizes: bool = True
) -> list[str]:
    """Why the compiled model is too large, with the tensors that grew; empty where it is not.

    ``limit``: largest ratio of sizes, compiled over float; None for any. ``quantizes``: False in
    mode float, in which everything is kept float.
    """
    before, after = model.weights, compiled.weights
    old, new, ratio = sum(before.values()), sum(after.values()), compiled.size / max(model.size, 1)
    if limit is None or ratio <= limit or new <= limit * old + _ROOM:
        return []
    keep = "leave them as they are by --keep-float NAME, or " if quantizes else ""
    return [
        f"compiled is {ratio:.2f} times as large as float, over {limit:g} (--max-size-ratio): "
        f"weights take {new:,} bytes instead of {old:,}{_grown(before, after)}; {keep}allow it by "
        f"--max-size-ratio {math.ceil(ratio * 100) / 100:g}"
    ]


def _grown(before: dict[str, int], after: dict[str, int]) -> str:
    """The tensors that grew most, with their bytes before and after."""
    growth = {name: size - before.get(name, 0) for name, size in after.items()}
    least = max(max(growth.values(), default=0) // _NEGLIGIBLE, 1)
    grown = sorted((n for n, more in growth.items() if more >= least), key=lambda n: -growth[n])
    listed = ", ".join(f"{n!r} {before.get(n, 0):,} -> {after[n]:,}" for n in grown[:_NAMED])
    rest = f" and {len(grown) - _NAMED} more" if len(grown) > _NAMED else ""
    return f"; larger in bytes: {listed}{rest}" if grown else ""
