"""Other quantizers of ONNX models, as benchmarks/accuracy.py calls them: each with its defaults.

A peer that is not installed is skipped. All get the same feeds of one sentence each, so that no
padding enters their ranges.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from sys import stderr
from typing import Any

import numpy as np
import onnx

from qcompile.data.feeds import Feed

MATMUL = ["MatMul"]


class Reader:
    """Feeds as onnxruntime's CalibrationDataReader, which other tools use too."""

    def __init__(self, feeds: Sequence[Feed]) -> None:
        self._feeds, self._left = feeds, iter(feeds)

    def get_next(self) -> Feed | None:
        return next(self._left, None)

    def rewind(self) -> None:
        self._left = iter(self._feeds)

    def __iter__(self) -> Iterator[Feed]:
        return iter(self._feeds)

    def __len__(self) -> int:
        return len(self._feeds)


def ort_static(model: Path, feeds: Sequence[Feed], out: Path, settings: Mapping[str, Any]) -> None:
    """onnxruntime's calibrated quantizer; setting ``activations``: name of a QuantType."""
    tools = importlib.import_module("onnxruntime.quantization")
    options = dict(settings)
    if "activations" in options:
        options["activation_type"] = tools.QuantType[options.pop("activations")]
    tools.quantize_static(model, out, Reader(feeds), **options)


def ort_dynamic(model: Path, feeds: Sequence[Feed], out: Path, settings: Mapping[str, Any]) -> None:
    """onnxruntime's dynamic quantizer: ranges of activations are computed in every run."""
    tools = importlib.import_module("onnxruntime.quantization")
    tools.quantize_dynamic(model, out, **settings)


def nncf(model: Path, feeds: Sequence[Feed], out: Path, settings: Mapping[str, Any]) -> None:
    """NNCF for transformers: SmoothQuant and bias correction."""
    tool = importlib.import_module("nncf")
    quantized = tool.quantize(
        onnx.load(model),
        tool.Dataset(feeds),
        model_type=tool.ModelType.TRANSFORMER,
        subset_size=len(feeds),
        **settings,
    )
    onnx.save(quantized, out)


def quark(model: Path, feeds: Sequence[Feed], out: Path, settings: Mapping[str, Any]) -> None:
    """AMD Quark with one of its named configurations."""
    tool = importlib.import_module("quark.onnx")
    config = tool.QConfig.get_default_config(settings["config"])
    tool.ModelQuantizer(config).quantize_model(str(model), str(out), Reader(feeds))


def modelopt(model: Path, feeds: Sequence[Feed], out: Path, settings: Mapping[str, Any]) -> None:
    """NVIDIA ModelOpt; tensors that are not quantized stay float32."""
    tool = importlib.import_module("modelopt.onnx.quantization")
    tool.quantize(
        str(model),
        calibration_data=stacked(feeds),
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=str(out),
        **settings,
    )


def stacked(feeds: Sequence[Feed]) -> dict[str, Any]:
    """All feeds as one batch, rows padded by zeros to the longest."""
    longest = max(value.shape[1] for feed in feeds for value in feed.values())
    return {
        name: np.concatenate(
            [np.pad(f[name], ((0, 0), (0, longest - f[name].shape[1]))) for f in feeds]
        )
        for name in feeds[0]
    }


Function = Callable[[Path, Sequence[Feed], Path, Mapping[str, Any]], None]


@dataclass(frozen=True)
class Peer:
    """One row of the table: a function, its settings, and the package that it needs."""

    name: str
    function: Function
    module: str = "onnxruntime"
    package: str = "onnxruntime"
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def version(self) -> str | None:
        """The installed version, None where the package is not installed."""
        try:
            spec = importlib.util.find_spec(self.module)
            return None if spec is None else metadata.version(self.package)
        except (ImportError, metadata.PackageNotFoundError):
            return None

    def quantize(self, model: Path, feeds: Sequence[Feed], out: Path) -> None:
        """Write the quantized model. Raises whatever the peer raises."""
        with redirect_stdout(stderr):  # several peers print
            self.function(model, feeds, out, self.settings)


_U8S8: dict[str, Any] = {"activations": "QUInt8", "per_channel": True}
_QUARK = ("quark.onnx", "amd-quark")
PEERS = (
    Peer("onnxruntime quantize_static, defaults (s8s8)", ort_static),
    Peer("onnxruntime quantize_static, u8s8 per channel", ort_static, settings=_U8S8),
    Peer(
        "onnxruntime quantize_static, u8s8 per channel, MatMul only",
        ort_static,
        settings={**_U8S8, "op_types_to_quantize": MATMUL},
    ),
    Peer("onnxruntime quantize_dynamic, per tensor", ort_dynamic),
    Peer("onnxruntime quantize_dynamic, per channel", ort_dynamic, settings={"per_channel": True}),
    Peer("NNCF, transformer", nncf, "nncf", "nncf"),
    Peer("AMD Quark XINT8", quark, *_QUARK, {"config": "XINT8"}),
    Peer("AMD Quark U8S8_AAWS", quark, *_QUARK, {"config": "U8S8_AAWS"}),
    Peer(
        "AMD Quark INT8_TRANSFORMER_DEFAULT", quark, *_QUARK, {"config": "INT8_TRANSFORMER_DEFAULT"}
    ),
    Peer(
        "NVIDIA ModelOpt int8",
        modelopt,
        "modelopt.onnx",
        "nvidia-modelopt",
        {"quantize_mode": "int8"},
    ),
)
