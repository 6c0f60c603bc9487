"""The only module that imports onnxruntime: sessions, taps, constant evaluation, op counts."""

from __future__ import annotations

import ctypes
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser

from qcompile.errors import ModelError
from qcompile.ir import Graph, Node, Refusal, is_constant, op_name
from qcompile.ir.model_io import read_model
from qcompile.ir.model_io.external_data import embed
from qcompile.ir.model_io.node_proto import fill_tensor, node_proto
from qcompile.ir.subgraph import bodies, element_types
from qcompile.quant import Array
from qcompile.runtime.exact_sums import exact_form
from qcompile.system.interrupts import deferred_interrupts
from qcompile.system.threads import available_cores
from qcompile.targets import runtime_versions

with deferred_interrupts():
    import onnxruntime as ort

Feed = Mapping[str, Array]
# Libraries of custom operators that every session registers: see ``custom_operators``.
_LIBRARIES: ContextVar[tuple[Path, ...]] = ContextVar("custom operators", default=())
# Errors of ONNX Runtime share no base class of their own; all of them are RuntimeErrors or these.
_FAULTS = (RuntimeError, ValueError, TypeError, OSError)
# Optimized models are written with external weights: one file could exceed protobuf's limit.
_EXTERNAL = "session.optimized_model_external_initializers"
_LEAST_EXTERNAL = 1 << 10
_FATAL = 4  # ONNX Runtime's log severity: errors are raised as exceptions anyway
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_BFLOAT16 = "tensor(bfloat16)"
_BFLOAT16_NUMPY = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16))
# Types of onnxruntime, which no other module imports.
InferenceSession, NativeOptions = ort.InferenceSession, ort.SessionOptions
Provider = str | tuple[str, Mapping[str, Any]]
# Turns int8 weights beyond ±64 into uint8 (onnxruntime_session_options_config_keys.h). On x86 with
# VNNI that changes no result, and is slow.
EXACT_SUMS = ("session.x64quantprecision", "1")
# Keeps data float where DequantizeLinear of a weight and a MatMul are fused to MatMulNBits.
FLOAT_DATA = ("session.qdq_matmulnbits_accuracy_level", "0")
_FOLDER = "session.model_external_initializers_file_folder_path"


def version() -> str:
    return str(ort.__version__)


class UnknownOperatorError(ModelError):
    """ONNX Runtime has no such operator; ``operator`` is its domain and name."""

    def __init__(self, operator: str) -> None:
        super().__init__(
            f"ONNX Runtime has no operator {operator}: give the library that has it "
            "(--custom-ops LIBRARY)"
        )
        self.operator = operator


@contextmanager
def custom_operators(libraries: Iterable[str | Path]) -> Iterator[None]:
    """Every session inside has the operators of these libraries, in addition to earlier ones.

    The code of a library runs once it is loaded. Raises ModelError for a file that ONNX Runtime
    cannot load as such a library.
    """
    paths = tuple(map(Path, libraries))
    for path in paths:
        _check_library(path)
    token = _LIBRARIES.set((*_LIBRARIES.get(), *paths))
    try:
        yield
    finally:
        _LIBRARIES.reset(token)


def library_paths() -> tuple[Path, ...]:
    """The libraries of ``custom_operators`` in effect here, for another process."""
    return tuple(path.resolve() for path in _LIBRARIES.get())


def _check_library(path: Path) -> None:
    what = f"library of custom operators {str(path)!r}"
    if not path.is_file():
        raise ModelError(f"{what}: {'not a file' if path.exists() else 'no such file'}")
    try:
        ort.SessionOptions().register_custom_ops_library(str(path.resolve()))
    except Exception as e:  # pybind exceptions of ONNX Runtime have no common base
        raise ModelError(f"{what} cannot be loaded: {_first_line(e)}") from e


@dataclass(frozen=True)
class SessionOptions:
    """How a session runs. ``threads`` 0 leaves the number to ONNX Runtime.

    ``optimize`` False runs the graph node by node as written, to record its tensors. ``exact``:
    sums of uint8 by int8 products are exact also on x86 without VNNI, which costs time there; False
    is ONNX Runtime's default. ``float_data``: MatMulNBits that ONNX Runtime puts in place of
    DequantizeLinear and MatMul does not quantize its data, which the graph as written does not.
    ``tf32``: False keeps float32 products whole on CUDA, where tensor cores would round factors to
    11 bits of mantissa; True is ONNX Runtime's default.
    """

    threads: int = 0
    optimize: bool = True
    provider: str = CPU
    profile: Path | None = None
    spin: bool = True
    exact: bool = True
    float_data: bool = False
    tf32: bool = True

    @property
    def configured_provider(self) -> Provider:
        """The provider as ONNX Runtime takes it, with its options where they are not defaults."""
        if self.provider == CUDA and not self.tf32:
            return self.provider, {"use_tf32": "0"}
        return self.provider

    @property
    def entries(self) -> dict[str, str]:
        """ONNX Runtime's session options that change outputs on this machine, for the report."""
        return dict([EXACT_SUMS]) if self._shifts else {}

    @property
    def _shifts(self) -> bool:
        return self.exact and self.provider == CPU and saturates()


class Session:
    """One loaded model. ``run`` feeds only declared inputs and names the outputs."""

    def __init__(self, model: bytes | Path, options: SessionOptions | None = None) -> None:
        options = options or SessionOptions()
        if options.provider not in ort.get_available_providers():
            raise ModelError(f"ONNX Runtime has no {options.provider} here")
        _check_version(model, options.provider)
        native = _native(options)
        if options.entries:
            model = _exact(model, native, optimize=options.optimize)
        try:
            self._inner = ort.InferenceSession(
                str(model) if isinstance(model, Path) else model,
                native,
                providers=[options.configured_provider],
            )
        except Exception as e:  # pybind exceptions of ONNX Runtime have no common base
            raise _load_error(e, model) from e
        if options.provider not in self._inner.get_providers():  # it fell back to the CPU silently
            raise ModelError(f"ONNX Runtime cannot load {options.provider} here")
        self.inputs = [i.name for i in self._inner.get_inputs()]
        self.outputs = [o.name for o in self._inner.get_outputs()]
        ends = (*self._inner.get_inputs(), *self._inner.get_outputs())
        self._bfloat16 = {end.name for end in ends if end.type == _BFLOAT16}

    def run(self, feed: Feed, names: Sequence[str] | None = None) -> dict[str, Array]:
        """Outputs by name for one feed. Raises ModelError where the runtime fails.

        Inputs in bfloat16 are fed by float arrays of any type, and outputs in it come as float32,
        which holds every bfloat16 number: numpy has no such type.
        """
        outputs = list(names if names is not None else self.outputs)
        try:
            values = self._run(outputs, {n: feed[n] for n in self.inputs})
        except KeyError as e:
            raise ModelError(f"no value was fed for input {e.args[0]!r}") from e
        except Exception as e:
            raise self._run_error(e, feed) from e
        return dict(zip(outputs, values, strict=True))

    def _run(self, outputs: list[str] | None, feed: Feed) -> list[Any]:
        if not self._bfloat16:
            found: list[Any] = self._inner.run(outputs, feed)
            return found
        values = {
            name: _bfloat16_value(array)
            if name in self._bfloat16
            else ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
            for name, array in feed.items()
        }
        return [*map(_plain_array, self._inner.run_with_ort_values(outputs, values))]

    def _run_error(self, e: BaseException, feed: Feed) -> ModelError:
        hint = self._contradiction(feed)
        return ModelError(f"ONNX Runtime failed on the model: {_first_line(e)}{hint}")

    def _contradiction(self, feed: Feed) -> str:
        """A dimension with two sizes in a feed, a likely cause of a failure; "" where none has.

        The runtime itself accepts it: shared names are no constraints.
        """
        seen: dict[str, tuple[int, str]] = {}
        for declared in self._inner.get_inputs():
            sizes = np.shape(feed.get(declared.name, ()))
            for dim, size in zip(declared.shape, sizes, strict=False):
                if not isinstance(dim, str):
                    continue
                first, owner = seen.setdefault(dim, (size, declared.name))
                if first != size:
                    return (
                        f" (dimension {dim!r} is {first} in input {owner!r} and {size} in input "
                        f"{declared.name!r})"
                    )
        return ""

    def call(self, feed: Feed) -> None:
        """Run without naming outputs: the inner loop of a timing. Raises ModelError."""
        try:
            self._run(None, feed)
        except Exception as e:
            raise self._run_error(e, feed) from e

    def end_profile(self) -> Path:
        return Path(self._inner.end_profiling())


def _bfloat16_value(array: Array) -> ort.OrtValue:
    """Floats of any shape and type as bfloat16; what it cannot hold is rounded to nearest."""
    stored = np.ascontiguousarray(np.asarray(array).astype(_BFLOAT16_NUMPY)).view(np.uint16)
    number = onnx.TensorProto.BFLOAT16
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(stored, number)


def _plain_array(value: ort.OrtValue) -> Array:
    """A tensor as an array of its shape; bfloat16 as float32."""
    if value.data_type() != _BFLOAT16:
        plain: Array = value.numpy()
        return plain
    shape = tuple(value.shape())
    if 0 in shape:
        return np.zeros(shape, np.float32)
    pointer = ctypes.cast(value.data_ptr(), ctypes.POINTER(ctypes.c_uint16))
    stored = np.ctypeslib.as_array(pointer, shape=shape)
    floats: Array = stored.view(_BFLOAT16_NUMPY).astype(np.float32)
    return floats


def open_session(
    model: bytes | Path,
    native: ort.SessionOptions,
    providers: Sequence[Provider],
    *,
    exact: bool,
) -> ort.InferenceSession:
    """A session of onnxruntime with the caller's own options, and the libraries of this context.

    ``exact``: its sums of uint8 by int8 would saturate here and are to be exact, as far as that is
    possible with its providers: by the session option, which is removed from ``native`` again, and
    where that does not work (``exact_sums``) by a rewritten graph, if all nodes run on the CPU.
    Raises ModelError where a provider is missing or the model cannot be loaded.
    """
    names = [p if isinstance(p, str) else p[0] for p in providers]
    missing = [name for name in names if name not in ort.get_available_providers()]
    if missing:
        known = ", ".join(ort.get_available_providers())
        raise ModelError(f"ONNX Runtime has no {missing[0]} here, expected one of {known}")
    _check_version(model, names[0] if names else CPU)
    for library in _LIBRARIES.get():
        native.register_custom_ops_library(str(library.resolve()))
    entries = dict([EXACT_SUMS]) if exact and _config(native, EXACT_SUMS[0]) in ("", "0") else {}
    if exact:
        rewritten = _exact(model, native, optimize=_fuses(native))
        if names == [CPU]:
            model = rewritten
        elif rewritten is not model:
            entries = {}  # ONNX Runtime could not load it
    for key, value in entries.items():
        native.add_session_config_entry(key, value)
    try:
        source = str(model) if isinstance(model, Path) else model
        session = ort.InferenceSession(source, native, providers=list(providers))
    except Exception as e:  # pybind exceptions of ONNX Runtime have no common base
        raise _load_error(e, model) from e
    finally:
        for key in entries:
            native.add_session_config_entry(key, "0")
    if unloaded := [name for name in names if name not in session.get_providers()]:
        raise ModelError(f"ONNX Runtime cannot load {unloaded[0]} here")
    return session


def _check_version(model: bytes | Path, provider: str) -> None:
    """Raises OldRuntimeError; ONNX Runtime's own message would not say which version is needed.

    Some forms fail only in a run, when the model is no longer at hand, so all are checked before.
    """
    if runtime_versions.runs_all(version()):
        return
    try:
        proto, _ = read_model.read_model(model)
    except ModelError:
        return  # ONNX Runtime's message says more
    runtime_versions.newest_feature(proto, provider, version())


def _config(native: ort.SessionOptions, key: str) -> str:
    """A session's configuration entry, "" where it has none."""
    try:
        return str(native.get_session_config_entry(key))
    except RuntimeError:
        return ""


def _fuses(native: ort.SessionOptions) -> bool:
    """True with the optimizations to which the option for exact sums belongs."""
    levels = ort.GraphOptimizationLevel
    none = levels.ORT_DISABLE_ALL, levels.ORT_ENABLE_BASIC
    return native.graph_optimization_level not in none


def unknown_operator(model: bytes | Path) -> str:
    """An operator of the model that ONNX Runtime does not have; empty if it can load the model."""
    try:
        Session(model, SessionOptions(optimize=False, exact=False))
    except UnknownOperatorError as e:
        return e.operator
    except ModelError:
        return ""  # the stage that runs the model says what is wrong
    return ""


def _native(options: SessionOptions) -> ort.SessionOptions:
    ort.set_default_logger_severity(_FATAL)  # it logs coloured warnings about models
    native = ort.SessionOptions()
    native.log_severity_level = _FATAL
    native.intra_op_num_threads = options.threads
    native.inter_op_num_threads = 1
    native.add_session_config_entry("session.intra_op.allow_spinning", str(int(options.spin)))
    if not options.optimize:
        native.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if options.float_data:
        native.add_session_config_entry(*FLOAT_DATA)
    for key, value in options.entries.items():
        native.add_session_config_entry(key, value)
    for library in _LIBRARIES.get():
        native.register_custom_ops_library(str(library.resolve()))
    if options.profile is not None:
        native.enable_profiling = True
        native.profile_file_prefix = str(options.profile)
    return native


def _exact(model: bytes | Path, native: ort.SessionOptions, *, optimize: bool) -> bytes | Path:
    """The model rewritten by ``exact_form``; itself where the session option is enough."""
    try:
        proto, storage = read_model.read_model(model)
    except ModelError:
        return model  # ONNX Runtime's message says more
    if not exact_form(proto, storage, optimized=optimize):
        return model
    read_model.embed_inner(proto, storage)
    for tensor in proto.graph.initializer:
        if tensor.name in storage.spans and storage.own is not None:
            embed(tensor, storage.own, storage.spans[tensor.name])
    if storage.folder is not None:
        native.add_session_config_entry(_FOLDER, str(storage.folder))
    data: bytes = proto.SerializeToString()
    return data


def _load_error(e: BaseException, model: bytes | Path) -> ModelError:
    unknown = re.search(
        r"Fatal error: (\S+?):(\w+)\(-?\d+\) is not a registered function/op", str(e)
    )
    if unknown is not None:
        return UnknownOperatorError(":".join(unknown.groups()))
    reason = f"{_first_line(e)}{_bfloat16_hint(model, str(e))}"
    return ModelError(f"ONNX Runtime cannot load the model: {reason}")


def _first_line(e: BaseException) -> str:
    """The first line of a message, without the path of the model, which may be a temporary file."""
    text = str(e).strip() or type(e).__name__
    return re.sub(r"Load model from .*? failed: ?", "", text.splitlines()[0])[:400]


def _bfloat16_hint(model: bytes | Path, error: str) -> str:
    """What to do where a kernel is missing because a model computes in bfloat16, else ""."""
    if "Could not find an implementation" not in error:
        return ""
    try:
        graph = read_model.read_model(model)[0].graph
    except ModelError:
        return ""
    if onnx.TensorProto.BFLOAT16 not in element_types(graph):
        return ""
    return (
        "; the model computes in bfloat16, for which this provider lacks kernels: compile it, with "
        "--mode float for the same model in float32"
    )


def listed_providers() -> list[str]:
    """Providers of the installed onnxruntime, which may lack libraries or a device."""
    return list(ort.get_available_providers())


@cache
def provider_or_cpu(name: str) -> str:
    """The provider if sessions really run on it; the CPU's if it is missing or does not load.

    ONNX Runtime may list a provider whose libraries are missing, so a session is the only proof.
    """
    if name == CPU:
        return CPU
    graph = onnx.parser.parse_graph("g (float[1] x) => (float[1] y) { y = Neg(x) }")
    model = onnx.helper.make_model(graph, ir_version=8, opset_imports=[_opset(17)])
    try:
        Session(model.SerializeToString(), SessionOptions(threads=1, provider=name))
    except ModelError:
        return CPU
    return name


def _opset(version: int) -> onnx.OperatorSetIdProto:
    return onnx.helper.make_opsetid("", version)


def threads() -> int:
    """Cores this process may use: the default for timing."""
    return available_cores()


def with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """The same model with exactly these outputs, which may be any tensors of the graph.

    In place: a copy would hold the weights twice.
    """
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names)
    return model


def evaluate(graph: Graph, nodes: Sequence[Node]) -> dict[str, Array] | Refusal:
    """Values of all outputs of nodes that depend only on constants, or a Refusal."""
    proto = onnx.GraphProto(name="constants")
    proto.node.extend(map(node_proto, nodes))
    outputs = {t.name for n in nodes for t in n.outputs if t.name}
    constants = {t.name: t for n in nodes for t in n.inputs if is_constant(t)}
    for constant in constants.values():
        fill_tensor(proto.initializer.add(), constant)
    proto.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(outputs))
    imports = [onnx.helper.make_opsetid(d, v) for d, v in graph.domains().items()]
    model = onnx.helper.make_model(
        proto, opset_imports=imports, functions=graph.functions, ir_version=10
    )
    try:
        session = Session(model.SerializeToString(), SessionOptions(threads=1, optimize=False))
        return session.run({})
    except ModelError as e:
        return Refusal(str(e))
    except _FAULTS as e:
        return Refusal(_first_line(e))


def record_types(model: bytes | Path, feed: Feed) -> dict[str, tuple[Any, int]]:
    """Dtype and rank of a model's outputs, from one run."""
    values = Session(model, SessionOptions(optimize=False)).run(feed)
    return {n: (v.dtype, v.ndim) for n, v in values.items() if isinstance(v, np.ndarray)}


def written_ops(model: onnx.ModelProto) -> Counter[str]:
    """Operator counts of a model as it was written."""
    return count_ops(model.graph)


def optimized_ops(model: bytes | Path, provider: str = CPU) -> Counter[str]:
    """Operator counts of the graph after ONNX Runtime's optimizations, with their domains."""
    return count_ops(optimized_graph(model, provider))


def optimized_graph(model: bytes | Path, provider: str = CPU) -> onnx.GraphProto:
    """The graph after ONNX Runtime's optimizations, without the values of large constants."""
    with tempfile.TemporaryDirectory() as folder:
        native = _native(SessionOptions(provider=provider, exact=False))
        path = _write_optimized(model, Path(folder), native, provider)
        return onnx.load(path, load_external_data=False).graph


def write_optimized(model: bytes | Path, folder: Path, *, layouts: bool = False) -> Path:
    """Write the model as optimized by ONNX Runtime into a folder, with external weights.

    With all fusions, and without exact sums; with ``layouts`` that depend on this processor.
    """
    native = _native(SessionOptions(exact=False))
    if not layouts:
        native.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    return _write_optimized(model, folder, native, CPU)


def _write_optimized(
    model: bytes | Path, folder: Path, native: ort.SessionOptions, provider: str
) -> Path:
    path = folder / "optimized.onnx"
    native.optimized_model_filepath = str(path)
    for key, value in (("file_name", "values"), ("min_size_in_bytes", str(_LEAST_EXTERNAL))):
        native.add_session_config_entry(f"{_EXTERNAL}_{key}", value)
    _check_version(model, provider)
    try:
        source = str(model) if isinstance(model, Path) else model
        ort.InferenceSession(source, native, providers=[provider])
    except Exception as e:
        raise _load_error(e, model) from e
    return path


@cache
def saturates() -> bool:
    """True where ONNX Runtime adds products of uint8 by int8 in int16 here (x86 without VNNI).

    Tested with a sum of 64 products 255 · 127, of which two exceed 2^15.
    """
    graph = onnx.parser.parse_graph(
        "g (uint8[1,64] a, int8[64,1] w) => (int32[1,1] y) { y = MatMulInteger(a, w) }"
    )
    model = onnx.helper.make_model(graph, ir_version=8, opset_imports=[_opset(17)])
    feed = {"a": np.full((1, 64), 255, np.uint8), "w": np.full((64, 1), 127, np.int8)}
    options = SessionOptions(threads=1, exact=False)
    result = Session(model.SerializeToString(), options).run(feed)["y"]
    return int(result[0, 0]) != 64 * 255 * 127


def count_ops(graph: onnx.GraphProto) -> Counter[str]:
    """Nodes by operator, with those in bodies of If, Loop and Scan."""
    found: Counter[str] = Counter()
    for node in graph.node:
        found[op_name(node)] += 1
        for body in bodies(node):
            found += count_ops(body)
    return found
