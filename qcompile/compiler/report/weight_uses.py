"""In which types a run computes with the constants of a model, and what they take in memory.

Both follow from the graph: what ONNX Runtime computes when it loads the model
(``computed_at_load``), and the operators that read the result. Which DequantizeLinear it fuses is
decided at load. The graph that it runs, where it is given, says so. Without it, the rules of its
fusions do, except for what other fusions do first: a float bias that becomes part of a Gemm keeps
that Gemm float.
Sources: ONNX Runtime qdq_selectors.cc, matmul_nbits.cc, insert_cast_transformer.cc.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import onnx

from qcompile.ir import MICROSOFT, is_op
from qcompile.ir.model_io.computed_at_load import sources
from qcompile.ir.operators import LAYOUT, op_name
from qcompile.ir.quantized_operators import input_name
from qcompile.ir.subgraph import bodies

CPU = "CPUExecutionProvider"
_KINDS: dict[int, str] = {int(v): k.lower() for k, v in onnx.TensorProto.DataType.items()}
_FEW_BITS = {"int4": 4, "uint4": 4, "int2": 2, "uint2": 2, "float4e2m1": 4}
_BYTES = ("int8", "uint8")
_BLOCKS = f"{MICROSOFT}.MatMulNBits"
_ROWS = f"{MICROSOFT}.GatherBlockQuantized"
_DEQUANTIZERS = ("DequantizeLinear", f"{MICROSOFT}.DequantizeLinear")
_LOOKUPS = ("Gather", "GatherElements", "GatherND")
_PROPAGATED = ("MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
_ZERO_POINT = 3  # its slot in both operators of blocks
_INTEGER_LEVEL = 4  # accuracy_level of MatMulNBits that quantizes the data
_TWO_BIT_BLOCKS = (32, 64, 128)  # with a kernel; others are dequantized
_FUSED_BLOCKS = (16, 32, 64, 128, 256, 512)  # of a DequantizeLinear that becomes MatMulNBits
# Attributes that decide.
_READ = ("accuracy_level", "alpha", "axis", "beta", "bits", "block_size", "to", "transA", "transB")
_FUSED = "_T"  # ends the name of a weight or scale that ONNX Runtime wrote for MatMulNBits


@dataclass(frozen=True)
class Use:
    """What becomes of a constant once the model is loaded.

    computed: the types in which a run computes with it; several are joined by a comma. looked_up:
    only with rows of it. memory_dtype, memory: types and bytes in memory; "" and 0 where it is
    only needed to compute other constants.
    """

    computed: str = ""
    looked_up: bool = False
    memory_dtype: str = ""
    memory: int = 0


class _Kind(NamedTuple):
    """Element type and shape."""

    dtype: str
    dims: tuple[int, ...]

    def nbytes(self, dtype: str) -> int:
        """Bytes of as many values of a type."""
        return -(-math.prod(self.dims) * _element_bits(dtype) // 8)


class _Reading(NamedTuple):
    """How one operator uses a constant.

    copy: the type of the copy that it reads, "" for the constant itself. values: the type of its
    values, where a byte of a uint8 constant holds several, else "".
    """

    computed: str
    looked_up: bool = False
    copy: str = ""
    values: str = ""


class _Dequantized(NamedTuple):
    """A DequantizeLinear of integers of a type."""

    node: onnx.NodeProto
    dtype: str


@dataclass(frozen=True)
class _Moved:
    """Values of a constant in another tensor, of a type.

    looked_up: rows of it. whole: rows of what was computed from all of it. fused: the
    DequantizeLinear in front, which may be fused with readers.
    """

    name: str
    dtype: str
    looked_up: bool = False
    whole: bool = False
    fused: _Dequantized | None = field(default=None, compare=False)

    def behind(self, source: _Moved) -> _Moved:
        """The same, for values that are already those of ``source``."""
        whole = self.whole or source.whole
        return replace(
            self, looked_up=(self.looked_up or source.looked_up) and not whole, whole=whole
        )


@dataclass
class _Account:
    """All uses of one constant."""

    computed: set[str] = field(default_factory=set)
    whole: bool = False
    memory: dict[str, int] = field(default_factory=dict)

    def add(self, kind: _Kind, readings: Iterable[_Reading]) -> None:
        """Enter the operators that read a tensor, which is in memory once for each type."""
        held: dict[str, str] = {}
        for reading in readings:
            self.computed.add(reading.computed)
            self.whole |= not reading.looked_up
            dtype = reading.copy or kind.dtype
            held[dtype] = reading.values or held.get(dtype, dtype)
        for dtype, values in held.items():
            self.memory[values] = self.memory.get(values, 0) + kind.nbytes(dtype)

    def use(self) -> Use:
        computed, memory = (", ".join(sorted(names)) for names in (self.computed, self.memory))
        looked_up = bool(self.computed) and not self.whole
        return Use(computed, looked_up, memory, sum(self.memory.values()))


def weight_uses(
    model: onnx.ModelProto, provider: str = CPU, run_graph: onnx.GraphProto | None = None
) -> dict[str, Use]:
    """The use of each initializer, by its name.

    ``provider``: of ONNX Runtime, that runs the model. ``run_graph``: the graph after its
    optimizations, None where that is unknown.
    """
    graph, on_cpu = model.graph, provider == CPU
    found = {t.name: (t.name,) for t in graph.initializer} | sources(graph)
    written = _Graph(graph, _kinds(model, found), on_cpu, constant=found.keys())
    run = None
    if run_graph is not None:
        own = {t.name: _kind_of(t) for t in run_graph.initializer}
        run = _Graph(run_graph, own, on_cpu, is_run=True)
    accounts = {t.name: _Account() for t in graph.initializer}
    for equal in _equal(graph, found):
        held: defaultdict[_Kind, list[_Reading]] = defaultdict(list)
        for name in filter(written.is_read, equal):
            for kind, reading in _readings(name, found, written, run):
                held[kind].append(reading)
        # The first constant has the most elements: the codes of a packed weight.
        account = accounts[found[equal[0]][0]]
        for kind, readings in held.items():
            account.add(kind, readings)
    return {name: account.use() for name, account in accounts.items()}


def _readings(
    name: str, found: Container[str], written: _Graph, run: _Graph | None
) -> Iterator[tuple[_Kind, _Reading]]:
    """What a constant is where it is read, and how: in the graph that is run, or as written."""
    fused = name + _FUSED
    names = (name,) if fused in found else (name, fused)
    in_run = [(run, n) for n in names if run is not None and n in run.kinds and run.is_read(n)]
    for graph, known in in_run or [(written, name)]:
        kind = graph.kinds[known]
        for reading in graph.readings(known, kind.dtype):
            if reading.values and known == fused:  # the same codes in blocks
                yield kind, reading._replace(values=written.kinds[name].dtype)
            else:
                yield kind, reading


def _equal(graph: onnx.GraphProto, found: Mapping[str, tuple[str, ...]]) -> Iterable[list[str]]:
    """Tensors that are constants in a run, those together that ONNX Runtime stores once.

    It removes Identity nodes, and computes once what equal nodes compute from the same constants.
    """
    first: dict[Any, str] = {}
    same = {t.name: t.name for t in graph.initializer}
    for node in graph.node:
        if not found.keys() & node.output:
            continue
        read = tuple(same.get(name, name) for name in node.input)
        given = tuple(sorted(a.SerializeToString(deterministic=True) for a in node.attribute))
        for slot, name in enumerate(node.output):
            alone = read[0] if is_op(node, "Identity") else name
            same[name] = first.setdefault((op_name(node), given, read, slot), alone)
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in found:
        groups[same[name]].append(name)
    return groups.values()


class _Graph:
    """The operators of a graph that are executed in each run, by what they read.

    kinds: of its constants. ``constant``: tensors that are computed at load. ``is_run``: the graph
    is the one that ONNX Runtime runs, in which nothing is fused any more.
    """

    def __init__(
        self,
        graph: onnx.GraphProto,
        kinds: Mapping[str, _Kind],
        on_cpu: bool,
        *,
        constant: Container[str] = (),
        is_run: bool = False,
    ) -> None:
        self.kinds, self.on_cpu, self.is_run = kinds, on_cpu, is_run
        self.outputs = {value.name for value in graph.output}
        self.readers: defaultdict[str, list[tuple[onnx.NodeProto, int]]] = defaultdict(list)
        self.producers: dict[str, onnx.NodeProto] = {}
        for node in _executed(graph, constant):
            self.producers |= dict.fromkeys(node.output, node)
            for slot, name in enumerate(node.input):
                self.readers[name].append((node, slot))

    def is_read(self, name: str) -> bool:
        return name in self.readers or name in self.outputs

    def readings(self, name: str, dtype: str) -> Iterator[_Reading]:
        """How a run uses a tensor of a type, also behind operators that only move its values."""
        pending = [_Moved(name, dtype)]
        seen = set(pending)
        for tensor in pending:  # which grows
            for node, slot in self.readers.get(tensor.name, ()):
                if tensor.fused and self._fused(tensor.fused, node, slot):
                    continue
                for found in self._by(node, slot, tensor.dtype):
                    if isinstance(found, _Moved):
                        moved = found.behind(tensor)
                        pending += [] if moved in seen else [moved]
                        seen.add(moved)
                    elif tensor.name == name:
                        yield found
                    else:
                        yield _Reading(found.computed, found.looked_up or tensor.looked_up)
            if tensor.name in self.outputs:
                yield _Reading(tensor.dtype, tensor.looked_up)

    def _by(self, node: onnx.NodeProto, slot: int, dtype: str) -> Iterator[_Reading | _Moved]:
        if is_op(node, "Shape", "Size"):
            return  # reads no values
        if is_op(node, *_DEQUANTIZERS) and slot == 0:
            yield from self._dequantized(node, dtype)
        elif is_op(node, _BLOCKS) and slot == 1:
            yield _Reading(self._level(node), values=_in_bytes(node, dtype))
        elif is_op(node, _ROWS) and slot == 0:
            scale = self._dtype(input_name(node, 2))
            yield _Reading(scale, looked_up=True, values=_in_bytes(node, dtype))
        elif is_op(node, "Cast"):
            yield _Moved(node.output[0], _KINDS.get(_attributes(node).get("to", 0), dtype))
        elif is_op(node, *_LOOKUPS) and slot == 0:
            yield _Moved(node.output[0], dtype, looked_up=True)
        elif is_op(node, "Concat") or (is_op(node, *LAYOUT) and slot == 0):
            yield from (_Moved(name, dtype) for name in node.output if name)
        elif dtype == "float16" and self.on_cpu and not self.is_run:
            yield _Reading("float", copy="float")  # its kernels are float32
        else:
            yield _Reading(dtype)

    def _dtype(self, scale: str) -> str:
        """The type of a scale, which is that of the values."""
        return self.kinds[scale].dtype if scale in self.kinds else "float"

    def _level(self, node: onnx.NodeProto) -> str:
        """The type in which MatMulNBits multiplies."""
        given = _attributes(node)
        zero = input_name(node, _ZERO_POINT)
        integer = (
            self.on_cpu
            and given.get("accuracy_level", 0) == _INTEGER_LEVEL
            and not input_name(node, 4)  # g_idx
            and (not zero or self._dtype(zero) == "uint8")
            and (given.get("bits", 4) != 2 or given.get("block_size") in _TWO_BIT_BLOCKS)
        )
        return "int8" if integer else self._dtype(input_name(node, 2))

    def _dequantized(self, node: onnx.NodeProto, dtype: str) -> Iterator[_Reading | _Moved]:
        """Integers where a DequantizeLinear is fused with a reader; else all of it as floats."""
        source, real = _Dequantized(node, dtype), self._dtype(input_name(node, 1))
        if self.is_run:
            yield _Moved(node.output[0], real, whole=True)
            return
        for reader, slot in self.readers.get(node.output[0], ()):
            computed = self._fused(source, reader, slot)
            if computed:
                yield _Reading(computed)
        yield _Moved(node.output[0], real, whole=True, fused=source)

    def _fused(self, source: _Dequantized, reader: onnx.NodeProto, slot: int) -> str:
        """The type in which a reader multiplies what is fused with it, "" where nothing is."""
        if slot != 1 or not is_op(reader, "MatMul", "Gemm", "Conv") or self._is_clipped(reader):
            return ""
        quantized = [self._is_dequantized(name) for name in reader.input if name]
        if quantized[0]:
            complete = all(quantized[:2]) and (not self.on_cpu or self._is_complete(reader))
            return source.dtype if complete and source.dtype in _BYTES else ""
        return "int8" if self.on_cpu and self._becomes_blocks(source, reader) else ""

    def _is_complete(self, node: onnx.NodeProto) -> bool:
        """True where the CPU's integer operator can replace a node: its bias is integer too."""
        results = [is_op(reader, "QuantizeLinear") for reader, _ in self.readers[node.output[0]]]
        whole = not is_op(node, "Conv") or bool(results and all(results))
        return whole and all(self._is_dequantized(name) for name in node.input if name)

    def _is_clipped(self, node: onnx.NodeProto) -> bool:
        """True where a Relu or Clip that no QuantizeLinear contains prevents every fusion."""
        clips = [n for n, _ in self.readers[node.output[0]]]
        if len(clips) != 1 or not is_op(clips[0], "Relu", "Clip"):
            return False
        result = clips[0].output[0]
        readers = [n for n, _ in self.readers[result]]
        inner = len(readers) == 1 and result not in self.outputs
        return inner and not is_op(readers[0], "QuantizeLinear")

    def _is_dequantized(self, name: str) -> bool:
        """True for a result of DequantizeLinear, also behind operators that it is moved over."""
        node = self.producers.get(name)
        while node is not None and is_op(node, *_PROPAGATED):
            node = self.producers.get(node.input[0])
        return node is not None and is_op(node, *_DEQUANTIZERS)

    def _becomes_blocks(self, source: _Dequantized, reader: onnx.NodeProto) -> bool:
        """True where MatMulNBits replaces a MatMul of float data and dequantized integers."""
        node = source.node
        weight, given = self.kinds.get(node.input[0]), _attributes(node)
        scale = self.kinds.get(input_name(node, 1))
        if weight is None or scale is None or len(weight.dims) != 2 or is_op(reader, "Conv"):
            return False
        gemm = _attributes(reader)
        plain = not (gemm.get("transA") or gemm.get("transB")) and {
            gemm.get(key, 1.0) for key in ("alpha", "beta")
        } == {1.0}
        axis = int(given.get("axis", 1)) % 2
        block = given.get("block_size", 0)
        fits = axis == 0 and block in _FUSED_BLOCKS if block else not scale.dims or axis == 1
        alone = all(len(self.readers[n]) == 1 for n in (node.output[0], *node.input[:2]))
        return plain and fits and alone and source.dtype in (*_BYTES, *_FEW_BITS)


def _executed(graph: onnx.GraphProto, constant: Container[str] = ()) -> Iterator[onnx.NodeProto]:
    """Nodes that are not computed at load, with those of bodies."""
    for node in graph.node:
        if not all(name in constant for name in node.output if name):
            yield node
        for body in bodies(node):
            yield from _executed(body)


def _in_bytes(node: onnx.NodeProto, dtype: str) -> str:
    """The type of the values in the bytes of a block; the constant's own if it is no uint8."""
    if dtype != "uint8":
        return ""
    sign = "u" if input_name(node, _ZERO_POINT) else ""
    return f"{sign}int{_attributes(node).get('bits', 4)}"


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if a.name in _READ}


def _element_bits(dtype: str) -> int:
    if dtype in _FEW_BITS:
        return _FEW_BITS[dtype]
    number = getattr(onnx.TensorProto, dtype.upper(), None)
    if number is None or dtype == "string":
        return 0
    return int(onnx.helper.tensor_dtype_to_np_dtype(number).itemsize) * 8


def _kind_of(tensor: onnx.TensorProto) -> _Kind:
    return _Kind(_KINDS.get(tensor.data_type, "?"), tuple(tensor.dims))


def _kinds(model: onnx.ModelProto, found: Mapping[str, tuple[str, ...]]) -> dict[str, _Kind]:
    """Type and shape of constants, and of all that is computed from them at load.

    Where inference does not know a result, that of the constant with the most elements.
    """
    kinds = {t.name: _kind_of(t) for t in model.graph.initializer}
    nodes = [n for n in model.graph.node if found.keys() & n.output]
    for value in _inferred(model, nodes) if nodes else ():
        tensor = value.type.tensor_type
        known = tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim)
        if value.name in found and value.name not in kinds and known:
            dims = tuple(d.dim_value for d in tensor.shape.dim)
            kinds[value.name] = _Kind(_KINDS.get(tensor.elem_type, "?"), dims)
    return kinds | {name: kinds[found[name][0]] for name in found.keys() - kinds.keys()}


def _inferred(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> list[onnx.ValueInfoProto]:
    """Types and shapes of the results of nodes that read only constants."""
    read = {name for node in nodes for name in node.input}
    graph = onnx.GraphProto(name="at-load", node=nodes)
    for tensor in model.graph.initializer:
        if tensor.name not in read:
            continue
        integers = tensor.data_type == onnx.TensorProto.INT64
        if integers and (tensor.raw_data or tensor.int64_data):  # a shape, or the like
            graph.initializer.append(tensor)
        else:
            dims = list(tensor.dims)
            value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, dims)
            graph.input.append(value)
    reduced = onnx.ModelProto(
        ir_version=model.ir_version, opset_import=model.opset_import, graph=graph
    )
    try:
        inferred = onnx.shape_inference.infer_shapes(reduced)  # data_prop can take any memory
    except (RuntimeError, ValueError):
        return []
    return list(inferred.graph.value_info)
