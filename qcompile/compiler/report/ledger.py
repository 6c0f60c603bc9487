"""The ledger: type, reason, bytes and quantization noise of every tensor.

One row for each constant of the written file and one for the rest of the file, so that the bytes
sum to the file size; and one row without bytes for each activation that the plan decided on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import onnx

from qcompile.compiler.report.packed_in_file import multipliers, packed_weights
from qcompile.compiler.report.weight_uses import CPU, Use, weight_uses
from qcompile.ir import is_op
from qcompile.ir.model_io.computed_at_load import sources
from qcompile.ir.model_io.external_data import stored_bytes
from qcompile.ir.quantized_operators import QUANTIZED_LINEARS, quantized_operator
from qcompile.planning import Context, Decision
from qcompile.quant import qparams
from qcompile.quant.bound_cost import activation_cost_db
from qcompile.rewriting import registry
from qcompile.system.json_values import Unbounded, from_json

Kind = Literal["weight", "activation", "parameter", "quantization", "shape", "structure"]

_REASONS: dict[Kind, str] = {
    "parameter": "biases and normalization parameters stay float32",
    "quantization": "scale, zero point, or bias as integer steps",
    "shape": "indices, shapes and flags are never quantized",
    "structure": "nodes, names and types",
}
_KINDS: dict[int, str] = {
    int(v): k.lower() for k, v in onnx.TensorProto.DataType.items() if k != "UNDEFINED"
}
_INTEGERS = {"int8", "uint8", "int4", "uint4", "int2", "uint2", "int16", "uint16"}


@dataclass(frozen=True)
class LedgerRow:
    """One constant of the file, or one activation of the plan; bytes sum to the file size."""

    name: str
    tensor: Annotated[str, "its name in the input model"]
    kind: Kind
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    reason: str
    sqnr_db: Unbounded | None = None
    low: float | None = None
    high: float | None = None
    scale: Annotated[float | None, "of an activation that has one"] = None
    zero_point: int | None = None
    bound_db: Annotated[
        float | None, "by how much the bound on int8 sums raises the rounding noise; null: no bound"
    ] = None
    computed: Annotated[
        str, "of a weight: types in which ONNX Runtime computes with it, joined by a comma"
    ] = ""
    looked_up: Annotated[bool, "of a table: only rows of it are computed with"] = False
    memory_dtype: Annotated[
        str, "types of a constant in memory; empty where it is needed only to load the model"
    ] = ""
    memory: Annotated[
        int | None, "bytes of a constant in memory, once the model is loaded; null for others"
    ] = None

    @property
    def differs(self) -> bool:
        """True for a weight that is not computed with, or not in memory, as it is in the file."""
        if self.kind != "weight" or self.memory is None:
            return False
        same = self.looked_up or self.computed == self.dtype
        return not (same and self.memory_dtype == self.dtype)


def ledger_rows(model: onnx.ModelProto, size: int, ctx: Context | None = None) -> list[LedgerRow]:
    """Rows whose bytes sum to ``size``, the length of the written file.

    What a run computes with each is ``with_uses``, which looks at the whole graph.
    """
    scales = {name for node in model.graph.node for name in _parameters(node)}
    scales |= multipliers(model.graph)
    weights = [_weight_row(t, ctx, t.name in scales) for t in model.graph.initializer]
    packed = packed_weights(model.graph)
    weights = [
        replace(row, dtype=packed[row.name].dtype, shape=packed[row.name].shape)
        if row.name in packed
        else row
        for row in weights
    ]
    rest = size - sum(r.bytes for r in weights)
    structure = LedgerRow("(graph)", "", "structure", "", (), rest, _REASONS["structure"])
    return [*weights, structure, *(_activation_rows(ctx) if ctx is not None else ())]


def with_uses(
    rows: Iterable[LedgerRow], model: onnx.ModelProto, run_graph: onnx.GraphProto | None = None
) -> list[LedgerRow]:
    """Rows with what becomes of each constant once ONNX Runtime has loaded the model.

    ``run_graph``: the graph that it runs, if known: some fusions are decided at load.
    """
    uses = weight_uses(model, provider_of(model), run_graph)
    return [_with_use(row, uses.get(row.name)) for row in rows]


def _with_use(row: LedgerRow, use: Use | None) -> LedgerRow:
    if use is None or row.kind in ("activation", "structure"):
        return row
    memory = replace(row, memory_dtype=use.memory_dtype, memory=use.memory)
    if row.kind != "weight":
        return memory
    return replace(memory, computed=use.computed, looked_up=use.looked_up)


def provider_of(model: onnx.ModelProto) -> str:
    """ONNX Runtime's provider of the target for which a model was compiled, or else the CPU's."""
    name = next((p.value for p in model.metadata_props if p.key == "qcompile.target"), "")
    known = registry.targets()
    return known[name].provider if name in known else CPU


def _parameters(node: onnx.NodeProto) -> set[str]:
    """Names of the scales, zero points and quantized biases that an operator reads."""
    row = quantized_operator(node)
    return set() if row is None else row.parameters(node)


def _weight_row(tensor: onnx.TensorProto, ctx: Context | None, scale: bool) -> LedgerRow:
    dtype, shape = _KINDS.get(tensor.data_type, "?"), tuple(tensor.dims)
    origin, noise = tensor.name, None
    if ctx is not None and tensor.name in ctx.origins:
        origin, noise = ctx.origins[tensor.name]
    decision = _decision(origin, ctx, dtype in _INTEGERS)
    derived = origin != tensor.name and dtype == "float"
    kind = "quantization" if scale or derived else _kind(tensor, dtype)
    reason = _REASONS.get(kind, "")
    bound = None
    if kind == "weight":
        reason = decision.reason if decision is not None else _no_decision(dtype, ctx)
        bound = None if ctx is None or noise is None else ctx.bound_costs.get(origin)
    size = stored_bytes(tensor)
    return LedgerRow(tensor.name, origin, kind, dtype, shape, size, reason, noise, bound_db=bound)


def _decision(name: str, ctx: Context | None, integer: bool) -> Decision | None:
    """The decision on a tensor; if its uses differ, one that fits its type in the file."""
    decisions = [d for d in ctx.plan.decisions if d.tensor == name] if ctx is not None else []
    fitting = [d for d in decisions if (d.spec is not None) == integer]
    return next(iter([*fitting, *decisions]), None)


def _kind(tensor: onnx.TensorProto, dtype: str) -> Kind:
    elements = int(np.prod(tensor.dims, dtype=np.int64))
    if dtype in _INTEGERS:
        return "weight" if elements > 1 else "quantization"
    if dtype not in ("float", "float16", "bfloat16", "double"):
        return "shape"
    matrix = len([d for d in tensor.dims if d > 1]) >= 2
    return "weight" if matrix else "parameter"


def _no_decision(dtype: str, ctx: Context | None) -> str:
    if dtype in _INTEGERS:
        return "quantized in the input model"
    if ctx is None:
        return "float in the file"
    if dtype in ctx.target.halves:
        return f"stored and computed in {dtype}, as target {ctx.target.name!r} does"
    if ctx.choices.mode == "float":
        return "mode float quantizes nothing"
    return f"target {ctx.target.name!r} has no rule for the operator that reads it"


def _activation_rows(ctx: Context) -> list[LedgerRow]:
    return [_activation_row(d, ctx) for d in ctx.plan.decisions if d.kind == "activation"]


def _activation_row(decision: Decision, ctx: Context) -> LedgerRow:
    name, spec = decision.tensor, decision.spec
    dtype = "float" if spec is None else spec.dtype
    row = LedgerRow(name, name, "activation", dtype, (), 0, decision.reason)
    span = ctx.ranges.get(name)
    if spec is None or span is None:
        return row
    row = replace(row, low=float(span.lo.min()), high=float(span.hi.max()))
    if span.axis is not None:
        return row
    params = qparams(span, spec)
    return replace(
        row,
        scale=params.scale.item(),
        zero_point=params.zero_point.item(),
        bound_db=activation_cost_db(span, params),
    )


@dataclass(frozen=True)
class Summary:
    """Bytes and counts by kind and type."""

    kind: str
    dtype: str
    count: int
    bytes: int


def summarize_rows(rows: list[LedgerRow]) -> list[Summary]:
    """Rows grouped by kind and type, largest first; the bytes still sum to the file size."""
    groups: dict[tuple[str, str], tuple[int, int]] = {}
    for row in rows:
        count, size = groups.get((row.kind, row.dtype), (0, 0))
        groups[row.kind, row.dtype] = (count + 1, size + row.bytes)
    summaries = [Summary(k, d, c, b) for (k, d), (c, b) in groups.items()]
    return sorted(summaries, key=lambda s: (-s.bytes, s.kind, s.dtype))


def read_rows(report: Mapping[str, Any]) -> list[LedgerRow]:
    """The ledger of a report's JSON. Raises KeyError if there is none, TypeError if it is wrong."""
    rows: list[LedgerRow] = from_json(list[LedgerRow], report["ledger"])
    return rows


def count_activation_matmuls(model: onnx.ModelProto) -> int:
    """The number of int8 matrix multiplications of two activations, as in attention."""
    constants = sources(model.graph).keys()
    linears = (n for n in model.graph.node if is_op(n, *QUANTIZED_LINEARS))
    return sum(constants.isdisjoint(_operands(node)) for node in linears)


def _operands(node: onnx.NodeProto) -> set[str]:
    row = quantized_operator(node)
    return set() if row is None else {o.names(node)[0] for o in row.operands}
