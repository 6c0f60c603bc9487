"""What differs between two models: settings, operators, and tensor by tensor types and scales.

Any two ONNX files can be compared by what stands in them. Where compile's report or lock lies
beside one, its reasons and settings are read too.
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
from qcompile.compiler.report.scales_in_file import Quantizer, Scales, quantizers
from qcompile.ir import op_name
from qcompile.ir.model_io import external_data, read_model
from qcompile.ir.model_io.external_data import Storage, values_of
from qcompile.quant import Array
from qcompile.system import digests
from qcompile.system.json_values import Record, members

Change = Literal["only in a", "only in b", "type", "shape", "scale", "values"]
Key = tuple[str, str]
# Endings that say what a tensor was made into, not which one it was.
_ENDINGS = ("int8", "uint8", "int16", "uint16", "int4", "uint4", "scaled")
_COMPARED = ("weight", "activation", "parameter")


@dataclass(frozen=True)
class Side(Record):
    """One model as far as it is compared.

    ``header`` holds settings that stand in the file, ``told`` those that report or lock tell.
    """

    path: Path
    bytes: int
    sha256: str
    has_report: Annotated[bool, "its report lies beside it"]
    has_lock: Annotated[bool, "its lock lies beside it"]
    header: dict[str, Any]
    told: dict[str, Any]
    operators: Counter[str]
    rows: dict[Key, LedgerRow]
    scales: dict[Key, Quantizer]
    constants: dict[str, onnx.TensorProto] = field(repr=False)
    storage: Storage = field(default_factory=Storage, repr=False)

    JSON = members("path bytes sha256 report=has_report lock=has_lock")

    def values(self, key: Key) -> Array | None:
        """What a constant holds; None for data, and for types that numpy lacks."""
        tensor = self.constants.get(self.rows[key].name)
        found = None if tensor is None else values_of(tensor, self.storage)
        return found if found is not None and found.dtype.kind in "biuf" else None


@dataclass(frozen=True)
class Entry:
    """A tensor in one of two models."""

    type: str
    shape: tuple[int, ...]
    bytes: int
    scale: float | Scales | None
    zero_point: int | None
    reason: str


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
    """One tensor that is not the same; ``a`` and ``b`` say what it is in each, None: not there."""

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
    sides = side(a), side(b)
    first, second = sides
    if first.sha256 == second.sha256:
        return Difference(first, second, {}, {}, ())
    counts = {op: Count(first.operators[op], second.operators[op]) for op in _ops(*sides)}
    return Difference(
        first,
        second,
        dict((*_pairs(first.header, second.header), *_told_pairs(first.told, second.told))),
        {op: pair for op, pair in counts.items() if pair[0] != pair[1]},
        tuple(_tensors(first, second)),
    )


def _ops(a: Side, b: Side) -> list[str]:
    return sorted({*a.operators, *b.operators})


def _pairs(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, Setting]]:
    for key in dict.fromkeys((*a, *b)):
        if a.get(key) != b.get(key):
            yield key, Setting(a.get(key), b.get(key))


def _told_pairs(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, Setting]]:
    """What only one of two reports can tell is no difference between the models."""
    both = a.keys() & b.keys()
    return _pairs(*({k: v for k, v in told.items() if k in both} for told in (a, b)))


def side(path: Path) -> Side:
    """Read one model and what lies beside it. Raises ModelError."""
    model, storage = read_model.read_model(path)
    external = read_model.external_files(model, storage)
    own = digests.file_digest(path)
    report = sidecar_files.find_report(sidecar_files.report_path(path), own)
    lock = sidecar_files.find_lock(path, own)
    size = path.stat().st_size + external_data.external_bytes(model)
    found = quantizers(model, storage)
    rows = sidecar_files.rows_of(report) or [*ledger.rows(model, size), *_data(model, found)]
    kept = {_key(r): r for r in rows if r.kind in _COMPARED}
    origins = {r.name: _key(r) for r in rows if r.kind in _COMPARED}
    return Side(
        path=path,
        bytes=size,
        sha256=digests.model_digest(path, external) if external else own,
        has_report=report is not None,
        has_lock=lock is not None,
        header=_header(model),
        told=_told_settings(report, lock),
        operators=Counter(map(op_name, model.graph.node)),
        rows=kept,
        scales={origins[name]: q for name, q in found.items() if name in origins},
        constants={t.name: t for t in model.graph.initializer},
        storage=storage,
    )


def _data(model: onnx.ModelProto, found: Mapping[str, Quantizer]) -> Iterator[LedgerRow]:
    """Rows of what is quantized in the graph and no constant."""
    constants = {t.name for t in model.graph.initializer}
    for name, quantizer in found.items():
        if name not in constants:
            zero = quantizer.zero_point
            dtype = "uint8" if zero is None else str(zero.dtype)  # ONNX's default
            yield LedgerRow(name, name, "activation", dtype, (), 0, "QuantizeLinear")


def _key(row: LedgerRow) -> Key:
    """A tensor under the name it came in with; data and constants may share one."""
    name, slash, ending = row.tensor.rpartition("/")
    base = name if slash and ending in _ENDINGS else row.tensor
    return ("activation" if row.kind == "activation" else "constant"), base


def _header(model: onnx.ModelProto) -> dict[str, Any]:
    found: dict[str, Any] = {
        f"opset {o.domain or 'ai.onnx'}": o.version for o in model.opset_import
    }
    found |= {p.key: p.value for p in model.metadata_props}
    inputs, outputs = [i.name for i in model.graph.input], [o.name for o in model.graph.output]
    return {**found, "inputs": inputs, "outputs": outputs}


def _told_settings(report: Mapping[str, Any] | None, lock: Lock | None) -> dict[str, Any]:
    """By name; the recipe from whichever file has it."""
    found: dict[str, Any] = {}
    if report is not None:
        found |= {k: report.get(k) for k in ("source", "mode", "pipeline")}
        for part in ("recipe", "environment", "calibration"):
            found |= _prefixed(part, report.get(part))
    elif lock is not None:
        found |= {"source": lock.model["name"], "mode": lock.mode, "pipeline": lock.pipeline}
        found |= _prefixed("recipe", asdict(lock.recipe))
        found |= _prefixed("environment", lock.environment)
    if lock is not None:
        found |= {"model sha256": lock.model["sha256"]}
        found |= {"data sha256": lock.data and lock.data.get("sha256")}
    return found


def _prefixed(name: str, values: Any) -> dict[str, Any]:
    plain = values if isinstance(values, Mapping) else {}
    return {f"{name} {k}": list(v) if isinstance(v, tuple) else v for k, v in plain.items()}


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
            yield from _inside(a, b, key, in_a, in_b)


def _inside(a: Side, b: Side, key: Key, in_a: Entry, in_b: Entry) -> Iterator[TensorChange]:
    """Of tensors of one type and shape: other scales, other values."""
    rescaled = (in_a.scale, in_a.zero_point) != (in_b.scale, in_b.zero_point)
    share = largest = None
    old, new = a.values(key), b.values(key)
    if old is not None and new is not None and old.size and not np.array_equal(old, new):
        share = float(np.mean(old != new))
        largest = float(np.max(np.abs(old.astype(np.float64) - new.astype(np.float64))))
    if rescaled or share:
        change: Change = "scale" if rescaled else "values"
        yield TensorChange(key[1], a.rows[key].kind, change, in_a, in_b, share, largest)


def _entry(model: Side, key: Key) -> Entry | None:
    row, quantizer = model.rows.get(key), model.scales.get(key)
    if row is None:
        return None
    scale: float | Scales | None = row.scale
    zero = row.zero_point
    if scale is None and quantizer is not None:
        scale, zero = quantizer.steps(), quantizer.single_zero_point()
    return Entry(row.dtype, row.shape, row.bytes, scale, zero, row.reason)
