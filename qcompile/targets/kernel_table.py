"""Which operators a runtime has kernels for, as a table, and the check of a graph against it.

A node without a kernel does not fail: the runtime moves it and its data to the CPU and back, in
every run. The table is ONNX Runtime's own published list (``tools/cuda_kernel_table.py`` makes it):
one line per kernel with its opset range, operands and types. Lookup follows the runtime: an open
range means only the newest version of the operator, and one type variable is one type.

Shape arithmetic is exempt: the runtime puts nodes that depend only on shapes and small constants on
the CPU on purpose, because the next operator reads them there. Such nodes are counted, named
in the report, and need no kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, ClassVar

import numpy as np
import onnx

from qcompile.ir import Graph, Node, Refusal, Tensor, domain_of, is_constant, is_op
from qcompile.ir.subgraph import bodies, subgraphs
from qcompile.targets.definitions import definition
from qcompile.targets.requirements import Fault, Findings, Requirement

_NUMPY = {
    "bool": "bool", "float16": "f16", "float32": "f32", "float64": "f64", "int8": "i8",
    "int16": "i16", "int32": "i32", "int64": "i64", "uint8": "u8", "uint16": "u16",
    "uint32": "u32", "uint64": "u64", "object": "str", "int4": "i4", "uint4": "u4",
}  # fmt: skip
_EXOTIC: dict[int, str] = {
    onnx.TensorProto.BFLOAT16: "bf16", onnx.TensorProto.FLOAT8E4M3FN: "f8e4m3fn",
    onnx.TensorProto.FLOAT8E5M2: "f8e5m2", onnx.TensorProto.INT4: "i4",
    onnx.TensorProto.UINT4: "u4", onnx.TensorProto.STRING: "str",
}  # fmt: skip
_LONG = {v: k for k, v in _NUMPY.items()}
_SMALL = 100  # elements: the runtime's bound for a constant that may lie on the CPU
_MEASURING = ("Shape", "Size")  # their results are on the CPU
# Operators whose kernels read shapes and the like on the CPU, but compute on the device.
_TAKERS = ("ConstantOfShape", "Expand", "Range", "Reshape", "Slice", "Tile")


@dataclass(frozen=True)
class Kernel:
    """One kernel: operands by name and type variable (or type), and each variable's types."""

    since: int
    until: int | None
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]
    types: Mapping[str, tuple[str, ...]]

    def allowed(self, side: tuple[tuple[str, str], ...], index: int) -> tuple[str, ...] | None:
        """Types of an operand; variadic operands repeat the last. None: any."""
        if not side:
            return None
        variable = side[min(index, len(side) - 1)][1]
        if variable in self.types:
            return self.types[variable]
        return (variable,) if variable in _LONG else None


@dataclass(frozen=True)
class Limit:
    """A kernel supports no nodes whose attribute, if present, has a value not in ``values``."""

    ops: tuple[str, ...]
    attribute: str
    values: tuple[Any, ...] = ()


@dataclass(frozen=True)
class KernelTable:
    """A provider's kernels, read from a file of ``qcompile.targets`` on first use."""

    provider: str
    file: str
    limits: tuple[Limit, ...] = ()
    missing: ClassVar[str] = "has no float16 kernel"

    def find(self, op: str, domain: str | None, opset: int) -> list[Kernel]:
        """Kernels for an operator in the version that an opset means."""
        version, found = self._rows(op, domain, opset)
        return [k for k in found if k.since == version or (k.until or 0) >= version > k.since]

    def _rows(self, op: str, domain: str | None, opset: int) -> tuple[int, list[Kernel]]:
        name = domain or "ai.onnx"
        version = _version(op, "" if name == "ai.onnx" else name, opset)
        return version, _read(self.file).get((name, op), [])

    def takes(self, node: Node, opset: int, index: int, kind: str) -> bool:
        """True where some kernel of a node takes a type of tensor (f16, f32, ...) as an input."""
        for kernel in self.find(node.op, node.domain, opset):
            allowed = kernel.allowed(kernel.inputs, index)
            if allowed is not None and kind in allowed:
                return True
        return False

    def obstacle(self, node: Node, opset: int) -> Refusal | None:
        """Why a node has no kernel (found and expected), None where it has one."""
        found = self.find(node.op, node.domain, opset)
        if not found:
            return Refusal(self.absent(node.op, node.domain, opset))
        for limit in self.limits:
            value = node.attrs.get(limit.attribute)
            if node.op in limit.ops and value is not None and value not in limit.values:
                wanted = " or ".join(map(str, limit.values)) or "none"
                return Refusal(f"{node.op} with {limit.attribute} {value}, expected {wanted}")
        refusals = [_mismatch(node, kernel) for kernel in found]
        first = refusals[0]
        return None if first is None or None in refusals else first.about(node.op)

    def absent(self, op: str, domain: str | None, opset: int) -> str:
        """A message that an operator has no kernel, with the versions that have one."""
        version, rows = self._rows(op, domain, opset)
        if not rows:
            return f"{op} of {domain or 'ai.onnx'} has no {self.provider} kernel"
        spans = ", ".join(f"{k.since}{'+' if k.until is None else f'-{k.until}'}" for k in rows)
        return f"{op}-{version} has no {self.provider} kernel, expected version {spans}"


@cache
def _read(file: str) -> dict[tuple[str, str], list[Kernel]]:
    found: dict[tuple[str, str], list[Kernel]] = {}
    text = resources.files("qcompile.targets").joinpath(file).read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        domain, op, span, inputs, outputs, types = line.split("\t")
        since, until = span.split("-")
        sides = [tuple(_pair(p, ":") for p in side.split()) for side in (inputs, outputs)]
        named = {n: tuple(v.split(",")) for n, v in (_pair(p, "=") for p in types.split())}
        sides[0] = _with_fixed_types(sides[0], op, domain, int(since))
        kernel = Kernel(int(since), int(until) if until else None, sides[0], sides[1], named)
        found.setdefault((domain, op), []).append(kernel)
    return found


def _pair(text: str, separator: str) -> tuple[str, str]:
    name, _, value = text.partition(separator)
    return name, value


def _with_fixed_types(
    side: tuple[tuple[str, str], ...], op: str, domain: str, version: int
) -> tuple[tuple[str, str], ...]:
    """Inputs of a kernel, with the one type that the operator's schema gives some of them.

    The published list names an operator's inputs once for all its versions: those of Split have
    ``split`` of the data's type, as version 1 had it; since version 13 it is int64.
    """
    schema = definition(op, domain, version)
    if schema is None:
        return side
    fixed = {i.name: i.type_str.removeprefix("tensor(").rstrip(")") for i in schema.inputs}
    return tuple((name, _NUMPY.get(fixed.get(name, ""), kind)) for name, kind in side)


def _version(op: str, domain: str, opset: int) -> int:
    """The version of an operator that an opset means; contrib operators have one."""
    schema = definition(op, domain, opset)
    return 1 if schema is None else int(schema.since_version)


def kind_of(tensor: Tensor) -> str | None:
    """A tensor's type as the table spells it; None for what is unknown, or no tensor."""
    if tensor.dtype is None or not _is_tensor(tensor):
        return None
    if isinstance(tensor.dtype, int):
        return _EXOTIC.get(int(tensor.dtype))
    try:
        return _NUMPY.get(np.dtype(tensor.dtype).name)
    except TypeError:
        return None


def _is_tensor(tensor: Tensor) -> bool:
    """False for an omitted operand, a sequence and the like."""
    return bool(tensor.name) and getattr(tensor, "type", "tensor_type") == "tensor_type"


def _long(kinds: tuple[str, ...]) -> str:
    return " or ".join(_LONG.get(k, k) for k in kinds)


def _mismatch(node: Node, kernel: Kernel) -> Refusal | None:
    """The first operand with a type that the kernel does not take; None where all fit."""
    bound: dict[str, tuple[str, str]] = {}
    for side, tensors in ((kernel.inputs, node.inputs), (kernel.outputs, node.outputs)):
        for i, tensor in enumerate(tensors):
            allowed = kernel.allowed(side, i)
            if allowed is None or not _is_tensor(tensor):
                continue
            kind = kind_of(tensor) or "of unknown type"
            name, variable = side[min(i, len(side) - 1)]
            if kind not in allowed:
                found = _LONG.get(kind, kind)
                return Refusal(f"{name} {tensor.name!r} is {found}, expected {_long(allowed)}")
            other, first = bound.setdefault(variable, (tensor.name, kind))
            if first != kind:
                found, wanted = _LONG.get(kind, kind), _LONG.get(first, first)
                return Refusal(f"{name} {tensor.name!r} is {found}, expected {wanted} as {other!r}")
    return None


@dataclass(frozen=True)
class HasKernels(Requirement):
    """Every compute node has a kernel of the provider: nothing falls back to the CPU."""

    table: KernelTable

    rule: ClassVar[str] = "kernels"

    def faults(self, graph: Graph, found: Findings) -> Iterator[Fault]:
        host = host_nodes(graph)
        versions = graph.domains()
        for node in graph.nodes:
            if node.name in host or is_op(node, "Constant"):  # which becomes an initializer
                continue
            found.checked[self.rule] += 1
            opset = versions.get(domain_of(node), 1)
            refusal = self.table.obstacle(node, opset)
            if refusal is not None:
                yield Fault(self.rule, node.name, refusal.reason)
            yield from self._inside(node, versions)
        if host:
            found.remarks.append(
                f"{len(host)} nodes of shape arithmetic have their place on the CPU "
                f"({_counted(graph, host)}); all {found.checked[self.rule]} others have a "
                f"{self.table.provider} kernel"
            )

    def _inside(self, node: Node, versions: Mapping[str, int]) -> Iterator[Fault]:
        """Operators of subgraphs, whose types are not known here."""
        waiting = [body.proto for body in subgraphs(node)]
        for graph in waiting:
            for inner in graph.node:
                waiting += bodies(inner)
                opset = versions.get(domain_of(inner), 1)
                if inner.op_type == "Constant":
                    continue
                if not self.table.find(inner.op_type, inner.domain, opset):
                    reason = self.table.absent(inner.op_type, inner.domain, opset)
                    yield Fault(self.rule, node.name, f"in its body, {reason}")


def _counted(graph: Graph, names: set[str]) -> str:
    ops = sorted(n.op for n in graph.nodes if n.name in names)
    return ", ".join(f"{ops.count(op)} {op}" for op in dict.fromkeys(ops))


def host_nodes(graph: Graph) -> set[str]:
    """Names of nodes that the runtime runs on the CPU by design: arithmetic on shapes.

    As ONNX Runtime's GetCpuPreferredNodes: all operands are results of Shape or Size, or computed
    from such, or small constants; no float16 among them.
    """
    found: set[str] = set()
    values: set[str] = set()
    for node in graph.nodes:
        if is_op(node, *_MEASURING):
            found.add(node.name)
            values |= {t.name for t in node.outputs}
            continue
        data = [t for t in node.inputs if t.name]
        known = [t for t in data if t.name in values]
        small = all(_is_small(t) for t in data if t.name not in values)
        if known and small and not is_op(node, *_TAKERS) and kind_of(data[0]) != "f16":
            found.add(node.name)
            values |= {t.name for t in node.outputs}
    return found


def _is_small(tensor: Tensor) -> bool:
    return is_constant(tensor) and int(np.prod(tensor.shape, dtype=np.int64)) <= _SMALL
