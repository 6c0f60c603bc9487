"""The other quantizers and runtimes that benchmarks/speed.py times where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from sys import stderr
from typing import Any

from benchmarks._peer_quantizers import MATMUL, nncf, ort_dynamic, ort_static
from qcompile.data.feeds import Feed
from qcompile.quant import Array
from qcompile.runtime import kernels
from qcompile.runtime.latency import Runnable
from qcompile.runtime.startup import Served

# Read by oneDNN, whose kernels OpenVINO uses, when they are first needed.
_ONEDNN_ISA = "ONEDNN_MAX_CPU_ISA"

Infer = Callable[[Mapping[str, Array]], Any]
Make = Callable[[Path, Sequence[Feed], Path], Runnable]


@dataclass(frozen=True)
class SpeedPeer:
    """One row: a function that builds the model to time, and the modules that it needs."""

    name: str
    make: Make
    modules: tuple[str, ...] = ()

    @property
    def installed(self) -> bool:
        return all(importlib.util.find_spec(m) is not None for m in self.modules)


def _dynamic(model: Path, feeds: Sequence[Feed], out: Path) -> Path:
    """onnxruntime's dynamic quantizer with its defaults, as a user would call it."""
    ort_dynamic(model, feeds, out, {})
    return out


def _static(model: Path, feeds: Sequence[Feed], out: Path) -> Path:
    """onnxruntime's calibrated quantizer with the settings that are fastest on x64."""
    settings = {"activations": "QUInt8", "per_channel": True, "op_types_to_quantize": MATMUL}
    ort_static(model, feeds, out, settings)
    return out


def _whole(model: Path, feeds: Sequence[Feed], out: Path) -> Path:
    """The same for every operator that it supports, including convolutions."""
    ort_static(model, feeds, out, {"activations": "QUInt8", "per_channel": True})
    return out


def _fused(model: Path, feeds: Sequence[Feed], out: Path) -> Path:
    """onnxruntime.transformers' fusions for BERT, then its dynamic quantizer."""
    import onnx

    tool = importlib.import_module("onnxruntime.transformers.optimizer")
    optimized = tool.optimize_model(str(model), model_type="bert", opt_level=0, use_gpu=False)
    fused = out.with_suffix(".fused.onnx")
    optimized.save_model_to_file(str(fused))
    # Without a type for tensors whose type it cannot infer, quantize_dynamic fails on this graph.
    extra = {"DefaultTensorType": onnx.TensorProto.FLOAT}
    ort_dynamic(fused, feeds, out, {"extra_options": extra})
    return out


def _openvino(model: Path, feeds: Sequence[Feed], out: Path) -> Runnable:
    """OpenVINO running NNCF's int8 model, tuned for latency."""
    nncf(model, feeds, out, {})
    return OpenVino(out)


@dataclass(frozen=True)
class OpenVino:
    """A model for OpenVINO; calling it with a number of threads gives a function of one feed, and
    ``serve`` one for each of several streams."""

    path: Path

    def __call__(self, threads: int) -> Infer:
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        return self._requests(options, 1)[0]

    def serve(self, streams: int, threads: int) -> list[Infer]:
        """Tuned for throughput: one compiled model, with a request for each stream."""
        options = {
            "PERFORMANCE_HINT": "THROUGHPUT",
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": streams * threads,
        }
        return self._requests(options, streams)

    def _requests(self, options: Mapping[str, object], count: int) -> list[Infer]:
        tool = importlib.import_module("openvino")
        options = dict(options)
        if os.environ.get(_ONEDNN_ISA) == "AVX2":  # it would choose the machine's bfloat16
            options["INFERENCE_PRECISION_HINT"] = "f32"
        compiled = tool.Core().compile_model(str(self.path), "CPU", options)
        names = {name for port in compiled.inputs for name in port.get_names()}

        def call(request: Any) -> Infer:
            return lambda feed: request.infer({n: v for n, v in feed.items() if n in names})

        return [call(compiled.create_infer_request()) for _ in range(count)]


PEERS = (
    SpeedPeer("onnxruntime quantize_dynamic", _dynamic),
    SpeedPeer("onnxruntime quantize_static, MatMul", _static),
    SpeedPeer("onnxruntime quantize_static", _whole),
    SpeedPeer("onnxruntime.transformers + quantize_dynamic", _fused, ("onnxruntime.transformers",)),
    SpeedPeer("OpenVINO, NNCF int8", _openvino, ("openvino", "nncf")),
)


def served(model: Runnable) -> Served:
    """The same model, to be run in several streams. Raises ValueError for one that cannot be."""
    if isinstance(model, OpenVino):
        return model.serve
    if callable(model):
        raise ValueError(f"{model} does not say how it runs in several streams")
    return model


def build_peers(model: Path, feeds: Sequence[Feed], folder: Path) -> list[tuple[str, Runnable]]:
    """All peers that are installed and accept this model; prints why others are missing.

    With AVX2 kernels of ONNX Runtime (tools/avx2_runtime.py) OpenVINO has such kernels too, unless
    the environment names others.
    """
    if kernels.instruction_sets()[:1] == ["AVX2"]:
        os.environ.setdefault(_ONEDNN_ISA, "AVX2")
    built: list[tuple[str, Runnable]] = []
    for i, peer in enumerate(PEERS):
        if not peer.installed:
            print(f"{peer.name}: not installed", file=stderr)
            continue
        try:
            with redirect_stdout(stderr):
                built.append((peer.name, peer.make(model, feeds, folder / f"peer{i}.onnx")))
        except Exception as e:  # peers raise anything; the table is printed without this one
            print(f"{peer.name}: {type(e).__name__}: {str(e).splitlines()[0]}", file=stderr)
    return built
