"""A session of benchmarks/cuda.py: inputs and outputs stay on the device, with or without a CUDA
graph."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import onnxruntime as ort

from qcompile.data.feeds import Feed
from qcompile.quant import Array
from qcompile.runtime.session import CPU, CUDA, Provider, open_session

_DEVICES = {CUDA: "cuda"}
_ERRORS_ONLY = 3  # ONNX Runtime's log severity
_WARMUP = 4  # runs of a shape; a CUDA graph is recorded in the second
_COPIES = ("MemcpyFromHost", "MemcpyToHost")


class BoundSession:
    """One loaded model whose inputs and outputs are bound to memory of the provider's device.

    graph: each shape is recorded as a CUDA graph and replayed. Raises ModelError where the provider
    cannot load the model, with ``graph`` also where not all of its nodes are on the GPU.
    """

    def __init__(
        self, model: Path, provider: str, *, graph: bool = False, profile: Path | None = None
    ) -> None:
        native = ort.SessionOptions()
        native.log_severity_level = _ERRORS_ONLY
        if profile is not None:
            native.enable_profiling = True
            native.profile_file_prefix = str(profile)
        entries = {"enable_cuda_graph": "1"} if graph else {}
        providers: list[Provider] = [(provider, entries) if entries else provider]
        if provider != CPU:
            providers.append(CPU)
        self._device = _DEVICES.get(provider, "cpu")
        self._graph = graph
        self._inner = open_session(model, native, providers, exact=False)
        self._bindings: dict[int, tuple[ort.IOBinding, ort.RunOptions]] = {}

    def bind(self, key: int, feed: Feed) -> None:
        """Copy a feed to the device, allocate its outputs there, and warm up; ``key`` names it."""
        options = ort.RunOptions()
        if self._graph:
            options.add_run_config_entry("gpu_graph_id", str(key + 1))  # 0 would be the default one
        binding = self._inner.io_binding()
        for given in self._inner.get_inputs():
            binding.bind_ortvalue_input(given.name, self._on_device(feed[given.name]))
        # The first run says how large the outputs are; a CUDA graph needs them at fixed addresses.
        for name, value in self._outputs(feed).items():
            binding.bind_ortvalue_output(name, self._on_device(value))
        self._bindings[key] = binding, options
        for _ in range(_WARMUP):
            self.run(key)

    def _on_device(self, value: Array) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_numpy(value, self._device, 0)

    def _outputs(self, feed: Feed) -> dict[str, Any]:
        names = [o.name for o in self._inner.get_outputs()]
        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", "-1")  # neither recorded nor replayed
        given = {i.name: feed[i.name] for i in self._inner.get_inputs()}
        return dict(zip(names, self._inner.run(names, given, options), strict=True))

    def run(self, key: int) -> None:
        """Compute a bound feed; returns when the device is done."""
        self._inner.run_with_iobinding(*self._bindings[key])

    def milliseconds(self, key: int, seconds: float) -> list[float]:
        """Latencies of runs of a bound feed for so many seconds, at least three."""
        found: list[float] = []
        end = time.perf_counter() + seconds
        while len(found) < 3 or time.perf_counter() < end:
            start = time.perf_counter()
            self.run(key)
            found.append((time.perf_counter() - start) * 1e3)
        return found

    def outputs(self, key: int) -> dict[str, Any]:
        """What the last run of a bound feed left, copied to the host."""
        names = [o.name for o in self._inner.get_outputs()]
        return dict(zip(names, self._bindings[key][0].copy_outputs_to_cpu(), strict=True))

    def end_profile(self) -> Path:
        """Stop profiling; the file that was written."""
        return Path(self._inner.end_profiling())


def placement(model: Path, provider: str, feed: Feed) -> tuple[int, dict[str, int]]:
    """The number of nodes that ran, and those that the provider did not run, by operator.

    From ONNX Runtime's profile of one run. Copies between devices count as not run by it.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        session = BoundSession(model, provider, profile=Path(folder) / "profile")
        session.bind(0, feed)
        events = json.loads(session.end_profile().read_text(encoding="utf-8"))
    return _elsewhere(events, provider)


def _elsewhere(events: list[dict[str, Any]], provider: str) -> tuple[int, dict[str, int]]:
    nodes: dict[str, tuple[str, str]] = {}
    for event in events:
        args = event.get("args", {})
        if event.get("cat") == "Node" and "provider" in args:
            nodes[event["name"]] = args["op_name"], args["provider"]
    others = Counter(op for op, where in nodes.values() if where != provider or op in _COPIES)
    return len(nodes), dict(others)


def used_memory() -> int | None:
    """Bytes in use on the first GPU, by all programs; None where nvidia-smi does not say."""
    found = nvidia_smi("memory.used")
    return None if found is None else round(float(found) * (1 << 20))


def nvidia_smi(query: str) -> str | None:
    """A property of the first GPU, without its unit; None without nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
