"""What differs between two models: settings, operators, and types and scales of each tensor.

Any two ONNX files can be compared. If compile's report or lock is next to one, its reasons and
settings are read too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import onnx

from qcompile.compiler.config.lockfile import Lock
from qcompile.compiler.report import ledger, sidecar_files
from qcompile.compiler.report.ledger import LedgerRow
from qcompile.compiler.report.scales_in_file import Quantizer, Scales, read_quantizers
from qcompile.ir import op_name
from qcompile.ir.model_io import external_data, read_model
from qcompile.ir.model_io.external_data import Storage, values_of
from qcompile.quant import Array
from qcompile.system import digests
from qcompile.system.json_values import Record, members

Change = Literal["only in a", "only in b", "type", "shape", "computed", "scale", "values"]
Key = tuple[str, str]
# Suffixes of names that passes add to a tensor's original name.
_ENDINGS = (
    "int8", "uint8", "int16", "uint16", "int4", "uint4", "int2", "uint2", "blocks", "scaled",
    "permuted",
)  # fmt: skip
# Types of which a byte holds several values; numpy compares them as int8.
_PACKED = ("int4", "uint4", "int2", "uint2")
_COMPARED = ("weight", "activation", "parameter")


@dataclass(frozen=True)
class Side(Record):
    """The data of one model that is compared.

    ``header``: settings in the file itself. ``reported``: settings from its report or lock.
    """

    path: Path
    bytes: int
    sha256: str
    has_report: Annotated[bool, "its report is next to it"]
    has_lock: Annotated[bool, "its lock is next to it"]
    header: dict[str, Any]
    reported: dict[str, Any]
    operators: Counter[str]
    rows: dict[Key, LedgerRow]
    scales: dict[Key, Quantizer]
    constants: dict[str, onnx.TensorProto] = field(repr=False)
    storage: Storage = field(default_factory=Storage, repr=False)

    JSON = members("path bytes sha256 report=has_report lock=has_lock")

    def values(self, key: Key) -> Array | None:
        """Values of a constant; None for activations, and for types that numpy lacks."""
        tensor = self.constants.get(self.rows[key].name)
        values = None if tensor is None else values_of(tensor, self.storage)
        if values is not None and values.dtype.name in _PACKED:
            values = values.astype(np.int8)
        return values if values is not None and values.dtype.kind in "biuf" else None


@dataclass(frozen=True)
class Entry:
    """A tensor in one of two models."""

    type: str
    shape: tuple[int, ...]
    bytes: int
    scale: float | Scales | None
    zero_point: int | None
    reason: str
    computed: Annotated[str, "of a weight: types in which ONNX Runtime computes with it"]
    memory_dtype: Annotated[str, "types of a constant in memory"]
    memory: Annotated[int | None, "bytes of a constant in memory, once the model is loaded"]


class Setting(NamedTuple):
    """A setting in both models."""

    a: Any
    b: Any


class Count(NamedTuple):
    """How many nodes an operator has in both models."""

    a: int
    b: int


@dataclass(frozen=True)
class TensorChange:
    """One tensor that differs; ``a`` and ``b``: the tensor in each model, None if missing."""

    tensor: str
    kind: str
    change: Change
    a: Entry | None
    b: Entry | None
    share: Annotated[float | None, "of a constant's values that differ"] = None
    largest: Annotated[float | None, "difference of two values"] = None


@dataclass(frozen=True)
class Difference(Record):
    """What differs between two models."""

    a: Side
    b: Side
    settings: dict[str, Setting]
    operators: dict[str, Count]
    tensors: tuple[TensorChange, ...]

    JSON = members("equal a b settings operators tensors")

    @property
    def equal(self) -> bool:
        """True for the same bytes."""
        return self.a.sha256 == self.b.sha256


def diff_models(a: Path, b: Path) -> Difference:
    """Compare two model files. Raises ModelError where one cannot be read."""
    sides = read_side(a), read_side(b)
    first, second = sides
    if first.sha256 == second.sha256:
        return Difference(first, second, {}, {}, ())
    counts = {op: Count(first.operators[op], second.operators[op]) for op in _ops(*sides)}
    return Difference(
        first,
        second,
        dict(
            (
                *_pairs(first.header, second.header),
                *_reported_pairs(first.reported, second.reported),
            )
        ),
        {op: pair for op, pair in counts.items() if pair[0] != pair[1]},
        tuple(_tensors(first, second)),
    )


def _ops(a: Side, b: Side) -> list[str]:
    return sorted({*a.operators, *b.operators})


def _pairs(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, Setting]]:
    for key in dict.fromkeys((*a, *b)):
        if a.get(key) != b.get(key):
            yield key, Setting(a.get(key), b.get(key))


def _reported_pairs(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, Setting]]:
    """Settings that differ; one that only one report has is not a difference of the models."""
    both = a.keys() & b.keys()
    return _pairs(*({k: v for k, v in settings.items() if k in both} for settings in (a, b)))


def read_side(path: Path) -> Side:
    """Read one model, and its report and lock if they are next to it. Raises ModelError."""
    model, storage = read_model.read_model(path)
    external = read_model.external_files(model, storage)
    own = digests.file_digest(path)
    report = sidecar_files.find_report(sidecar_files.report_path(path), own)
    lock = sidecar_files.find_lock(path, own)
    size = path.stat().st_size + external_data.external_bytes(model)
    in_file = read_quantizers(model, storage)
    rows = sidecar_files.rows_of(report) or [
        *ledger.ledger_rows(model, size),
        *_activation_rows(model, in_file),
    ]
    # A report's are from a run. Both models' from their files: no difference in what is known.
    rows = ledger.with_uses(rows, model)
    compared = {_key(r): r for r in rows if r.kind in _COMPARED}
    origins = {r.name: _key(r) for r in rows if r.kind in _COMPARED}
    return Side(
        path=path,
        bytes=size,
        sha256=digests.model_digest(path, external) if external else own,
        has_report=report is not None,
        has_lock=lock is not None,
        header=_header(model),
        reported=_reported_settings(report, lock),
        operators=Counter(map(op_name, model.graph.node)),
        rows=compared,
        scales={origins[name]: q for name, q in in_file.items() if name in origins},
        constants={t.name: t for t in model.graph.initializer},
        storage=storage,
    )


def _activation_rows(
    model: onnx.ModelProto, in_file: Mapping[str, Quantizer]
) -> Iterator[LedgerRow]:
    """Rows of quantized tensors that are not constants."""
    constants = {t.name for t in model.graph.initializer}
    for name, quantizer in in_file.items():
        if name not in constants:
            zero = quantizer.zero_point
            dtype = "uint8" if zero is None else str(zero.dtype)  # ONNX's default
            yield LedgerRow(name, name, "activation", dtype, (), 0, "QuantizeLinear")


def _key(row: LedgerRow) -> Key:
    """Kind and original name of a tensor; an activation and a constant may share a name."""
    base = row.tensor
    while (parts := base.rpartition("/"))[1] and parts[2] in _ENDINGS:
        base = parts[0]
    return ("activation" if row.kind == "activation" else "constant"), base


def _header(model: onnx.ModelProto) -> dict[str, Any]:
    settings: dict[str, Any] = {
        f"opset {o.domain or 'ai.onnx'}": o.version for o in model.opset_import
    }
    settings |= {p.key: p.value for p in model.metadata_props}
    inputs, outputs = [i.name for i in model.graph.input], [o.name for o in model.graph.output]
    return {**settings, "inputs": inputs, "outputs": outputs}


def _reported_settings(report: Mapping[str, Any] | None, lock: Lock | None) -> dict[str, Any]:
    """Settings by name; the report's, or else the lock's."""
    settings: dict[str, Any] = {}
    if report is not None:
        settings |= {k: report.get(k) for k in ("source", "mode", "pipeline")}
        for part in ("recipe", "environment", "calibration"):
            settings |= _prefixed(part, report.get(part))
    elif lock is not None:
        settings |= {"source": lock.model["name"], "mode": lock.mode, "pipeline": lock.pipeline}
        settings |= _prefixed("recipe", asdict(lock.recipe))
        settings |= _prefixed("environment", lock.environment)
    if lock is not None:
        settings |= {"model sha256": lock.model["sha256"]}
        settings |= {"data sha256": lock.data and lock.data.get("sha256")}
    return settings


def _prefixed(name: str, values: Any) -> dict[str, Any]:
    by_key = values if isinstance(values, Mapping) else {}
    return {f"{name} {k}": list(v) if isinstance(v, tuple) else v for k, v in by_key.items()}


def _tensors(a: Side, b: Side) -> Iterator[TensorChange]:
    for key in dict.fromkeys((*a.rows, *b.rows)):
        in_a, in_b = _entry(a, key), _entry(b, key)
        kind = (a.rows.get(key) or b.rows[key]).kind
        if in_a is None or in_b is None:
            change: Change = "only in b" if in_a is None else "only in a"
            yield TensorChange(key[1], kind, change, in_a, in_b)
        elif in_a.type != in_b.type:
            yield TensorChange(key[1], kind, "type", in_a, in_b)
        elif in_a.shape != in_b.shape:
            yield TensorChange(key[1], kind, "shape", in_a, in_b)
        else:
            yield from _compare_values(a, b, key, in_a, in_b)


def _compare_values(a: Side, b: Side, key: Key, in_a: Entry, in_b: Entry) -> Iterator[TensorChange]:
    """Differences of a tensor that has one type and shape in both files: what it becomes in a run,
    its scales, its values."""
    rescaled = (in_a.scale, in_a.zero_point) != (in_b.scale, in_b.zero_point)
    share = largest = None
    old, new = a.values(key), b.values(key)
    if old is None or new is None or old.shape != new.shape:  # blocks of other sizes
        old = new = np.zeros(0)
    if old.size and not np.array_equal(old, new):
        share = float(np.mean(old != new))
        largest = float(np.max(np.abs(old.astype(np.float64) - new.astype(np.float64))))
    used_otherwise = (in_a.computed, in_a.memory_dtype) != (in_b.computed, in_b.memory_dtype)
    if used_otherwise or rescaled or share:
        change: Change = "computed" if used_otherwise else "scale" if rescaled else "values"
        yield TensorChange(key[1], a.rows[key].kind, change, in_a, in_b, share, largest)


def _entry(model: Side, key: Key) -> Entry | None:
    row, quantizer = model.rows.get(key), model.scales.get(key)
    if row is None:
        return None
    scale: float | Scales | None = row.scale
    zero = row.zero_point
    if scale is None and quantizer is not None:
        scale, zero = quantizer.steps(), quantizer.single_zero_point()
    stored = row.dtype, row.shape, row.bytes
    return Entry(*stored, scale, zero, row.reason, row.computed, row.memory_dtype, row.memory)
