"""Converts a ModelProto into a Graph in normal form.

Normal form: opset imports unique and complete, nodes sorted and named, Constant nodes turned into
constants, sparse constants dense, external data memory-mapped. Subgraphs and functions are
unchanged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from qcompile.errors import ModelError
from qcompile.ir import ONNX, Graph, domain_of, is_constant
from qcompile.ir.graph import Header
from qcompile.ir.lazy_values import is_stored, make_constant, sparse_proto, stored_proto
from qcompile.ir.model_io.external_data import (
    Storage,
    check_values,
    embed_external,
    inner_tensors,
    is_external,
    mapped,
)
from qcompile.ir.model_io.node_proto import put_back, take_out
from qcompile.ir.model_io.size_limits import check_functions
from qcompile.ir.subgraph import bodies, outer_reads, subgraphs
from qcompile.quant import Array

_CONSTANT_VALUES = {"value_float": np.float32, "value_int": np.int64}
_CONSTANT_LISTS = {"value_floats": np.float32, "value_ints": np.int64}
# For models that do not import ONNX's own operators. ONNX Runtime takes its newest opset then; all
# supported versions know this one.
_DEFAULT_OPSET = 21
_LARGEST = 2**31


def from_proto(model: onnx.ModelProto, storage: Storage | None = None) -> Graph:
    """The Graph of a ModelProto; ``storage`` locates values that it does not hold.

    The ModelProto is modified and must not be used afterwards. Raises ModelError where it is
    malformed.
    """
    storage = storage or Storage()
    _check_text(model)
    check_functions(model)
    _check_names(model.graph)
    _clean_imports(model)
    for tensor in inner_tensors(model, storage.spans):
        if is_external(tensor):
            embed_external(tensor, storage)
        else:
            check_values(tensor)
    header = _header(model)
    inner = _import(model)
    _forget_unnamed_sizes(inner)
    _name_nodes(inner)
    header.extras = _extras(inner, model.graph)
    captured = {name for n in inner.nodes for body in subgraphs(n) for name in body.reads}
    absorbed = _absorb_constant_nodes(inner, {t.name for t in inner.outputs}, storage)
    hidden = _hidden(model.graph, captured - set(inner.tensors()))
    graph = Graph(inner, header, [*hidden, *(c for c in absorbed if c.name in captured)])
    for constant in graph.constants().values():
        _open(constant, storage)
    graph.sort()
    return graph


def _hidden(graph: onnx.GraphProto, names: set[str]) -> list[gs.Constant]:
    """Initializers that only subgraphs read, which graphsurgeon drops."""
    lazy, sparse = gs.ir.tensor.LazyValues, gs.ir.tensor.SparseValues
    found = [gs.Constant(t.name, lazy(t)) for t in graph.initializer if t.name in names]
    others = [t for t in graph.sparse_initializer if t.values.name in names]
    return [*found, *(gs.Constant(t.values.name, sparse(t)) for t in others)]


def _header(model: onnx.ModelProto) -> Header:
    return Header(
        ir_version=int(model.ir_version),
        producer_name=model.producer_name,
        producer_version=model.producer_version,
        domain=model.domain,
        model_version=int(model.model_version),
        doc_string=model.doc_string,
        metadata={p.key: p.value for p in model.metadata_props},
        interface={t.name: t for t in reversed((*model.graph.input, *model.graph.output))},
        functions=list(model.functions),
    )


def _clean_imports(model: onnx.ModelProto) -> None:
    """Import each used domain exactly once."""
    versions: dict[str, int] = {}
    for opset in model.opset_import:
        domain = ONNX if opset.domain == "ai.onnx" else opset.domain
        versions[domain] = max(versions.get(domain, 0), int(opset.version))
    if ONNX not in versions:
        # By ONNX's rule, a model of the oldest format without imports has version 1.
        versions[ONNX] = _DEFAULT_OPSET if versions else 1
    for node in _all_nodes(model.graph):
        versions.setdefault(domain_of(node), 1)
    del model.opset_import[:]
    model.opset_import.extend(onnx.helper.make_opsetid(d, v) for d, v in versions.items())


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for body in bodies(node):
            yield from _all_nodes(body)


def _import(model: onnx.ModelProto) -> gs.Graph:
    gs.logger.G_LOGGER.severity = gs.logger.G_LOGGER.CRITICAL + 1  # it prints to stdout
    taken = take_out(model.graph.node)
    del model.functions[:]  # kept in the header
    try:
        inner = gs.import_onnx(model)
    except Exception as e:  # graphsurgeon raises whatever it meets
        raise ModelError(f"the model's graph cannot be read: {type(e).__name__}: {e}") from e
    put_back(inner.nodes, taken)
    return inner


def _forget_unnamed_sizes(inner: gs.Graph) -> None:
    """Make dimensions named ``?`` unknown: some exporters call all of them that, equal or not."""
    for tensor in inner.tensors().values():
        if not is_constant(tensor) and tensor.shape is not None and "?" in tensor.shape:
            tensor.shape = [None if d == "?" else d for d in tensor.shape]


def _extras(inner: gs.Graph, graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """Overload and metadata by node name, which graphsurgeon does not keep."""
    found = {}
    for node, proto in zip(inner.nodes, graph.node, strict=True):
        if proto.overload or proto.metadata_props:
            found[node.name] = onnx.NodeProto(
                overload=proto.overload, metadata_props=proto.metadata_props
            )
    return found


def _check_text(model: onnx.ModelProto) -> None:
    """Raise ModelError on names that are not text, as in damaged files that are valid protobuf."""
    graph = model.graph
    names = [o.domain for o in model.opset_import] + [graph.name, graph.doc_string]
    names += [p for m in model.metadata_props for p in (m.key, m.value)]
    names += [model.producer_name, model.producer_version, model.domain, model.doc_string]
    names += [t.name for t in (*graph.input, *graph.output, *graph.initializer)]
    for node in _all_nodes(graph):
        names += [node.name, node.op_type, node.domain, node.overload, *node.input, *node.output]
        names += [a.name for a in node.attribute]
    bad = next((n for n in names if not isinstance(n, str)), None)
    if bad is not None:
        raise ModelError(f"the model is damaged: {bad!r} is no name")


def _check_names(graph: onnx.GraphProto) -> None:
    """Raise ModelError unless each tensor is defined once, and each used one is defined."""
    constants = [t.name for t in graph.initializer]
    constants += [t.values.name for t in graph.sparse_initializer]
    defaults = set(constants)
    inputs = [t.name for t in graph.input if t.name not in defaults]
    for what, names in (("input", inputs), ("initializer", constants)):
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ModelError(f"the model has two {what}s called {twice[0]!r}")
    known = {*inputs, *constants}
    made: set[str] = set()
    for node in graph.node:
        for name in filter(None, node.output):
            if name in made or name in known:
                raise ModelError(f"tensor {name!r} is made twice, again by node {node.name!r}")
            made.add(name)
    known |= made
    for node in graph.node:
        inside = (name for body in bodies(node) for name in outer_reads(body))
        missing = [name for name in (*node.input, *inside) if name and name not in known]
        if missing:
            raise ModelError(
                f"node {node.name!r} ({node.op_type}) reads tensor {missing[0]!r}, "
                "which nothing produces"
            )
    for output in graph.output:
        if output.name not in known:
            raise ModelError(f"graph output {output.name!r} is produced by nothing")


def _absorb_constant_nodes(
    inner: gs.Graph, visible: set[str], storage: Storage
) -> list[gs.Constant]:
    """Turn Constant nodes into constants, unless their name is ``visible``; returns those."""
    kept, absorbed = [], []
    for node in inner.nodes:
        values = None if node.op != "Constant" or node.domain else _constant_value(node)
        if values is None or not node.outputs:
            kept.append(node)
            continue
        out = node.outputs[0]
        if not isinstance(values, np.ndarray) and out.name in storage.spans:
            _map(out.name, values, storage)
        if out.name in visible:
            kept.append(node)
            continue
        node.outputs.clear()
        out.to_constant(values) if isinstance(values, np.ndarray) else make_constant(out, values)
        absorbed.append(out)
    inner.nodes[:] = kept
    return absorbed


def _constant_value(node: gs.Node) -> Array | gs.Constant | None:
    for key, value in node.attrs.items():
        if key == "value" and is_constant(value):
            return value
        if key in _CONSTANT_VALUES and isinstance(value, int | float):
            return np.array(value, _CONSTANT_VALUES[key])
        if key in _CONSTANT_LISTS and isinstance(value, list):
            return np.array(value, _CONSTANT_LISTS[key])
    return None  # strings, sparse values and malformed ones stay nodes


def _name_nodes(inner: gs.Graph) -> None:
    """Name nodes without a unique name after their first output, the same in every run."""
    seen: set[str] = {n.name for n in inner.nodes if n.name}
    used: set[str] = set()
    for i, node in enumerate(inner.nodes):
        if node.name and node.name not in used:
            used.add(node.name)
            continue
        base = f"{node.op}:{node.outputs[0].name if node.outputs else i}"
        while base in seen:
            base += "_"
        node.name = base
        seen.add(base)
        used.add(base)


def _open(constant: gs.Constant, storage: Storage) -> None:
    """Memory-map values in files, and make sparse ones dense."""
    sparse, stored = sparse_proto(constant), stored_proto(constant)
    if sparse is not None:
        constant.values = _dense(sparse)
    elif stored is None or is_stored(constant):
        return
    elif is_external(stored) or constant.name in storage.spans:
        _map(constant.name, constant, storage)
    else:
        check_values(stored)


def _map(name: str, constant: gs.Constant, storage: Storage) -> None:
    """Replace a constant's values by a view into their file, where their type allows it."""
    stored = stored_proto(constant)
    values = None if stored is None else mapped(name, stored, storage)
    if values is not None:
        constant.values = values


def _dense(sparse: onnx.SparseTensorProto) -> Array:
    check_values(sparse.values)
    check_values(sparse.indices)
    values = onnx.numpy_helper.to_array(sparse.values)
    indices = onnx.numpy_helper.to_array(sparse.indices)
    what = f"sparse tensor {sparse.values.name!r} of shape {list(sparse.dims)}"
    if float(np.prod(sparse.dims, dtype=np.float64)) * values.itemsize > _LARGEST:
        raise ModelError(f"{what} is too large to be made dense")
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    try:  # indices are flat, or one row of coordinates per value
        where = np.unravel_index(indices, dense.shape) if indices.ndim == 1 else tuple(indices.T)
        dense[where] = values
    except (IndexError, ValueError) as e:
        raise ModelError(f"{what}: {e}") from e
    return dense
