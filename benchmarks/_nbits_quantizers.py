"""Other tools that store weights in few bits, as benchmarks/low_bits.py calls them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from benchmarks._peer_quantizers import MATMUL, Reader
from qcompile.data.feeds import Feed


def nbits(model: Path, feeds: Sequence[Feed], out: Path, settings: Mapping[str, Any]) -> None:
    """onnxruntime's MatMulNBits quantizer.

    Settings: ``bits`` and ``block``, ``algorithm``: "HQQ", "KQuant" or "GPTQ", else to nearest.
    Of the last alone: ``symmetric``, ``tables``: lookup tables too, ``accuracy_level``.
    """
    tool = importlib.import_module("onnxruntime.quantization.matmul_nbits_quantizer")
    bits, block = settings["bits"], settings["block"]
    algorithm = settings.get("algorithm", "")
    if algorithm == "HQQ":
        config = tool.HQQWeightOnlyQuantConfig(block_size=block, bits=bits)
    elif algorithm == "KQuant":
        config = tool.KQuantWeightOnlyQuantConfig()
    elif algorithm == "GPTQ":  # its own block_size is the columns per step
        config = tool.GPTQWeightOnlyQuantConfig(calibration_data_reader=Reader(feeds))
    else:
        tables = settings.get("tables", False)
        config = tool.DefaultWeightOnlyQuantConfig(
            block_size=block,
            bits=bits,
            is_symmetric=settings.get("symmetric", False),
            accuracy_level=settings.get("accuracy_level"),
            op_types_to_quantize=(*MATMUL, "Gather") if tables else tuple(MATMUL),
            quant_axes=(("MatMul", 0), ("Gather", 1)),
        )
    quantizer = tool.MatMulNBitsQuantizer(onnx.load(model), block_size=block, algo_config=config)
    quantizer.process()
    made = quantizer.model  # a wrapper, whatever the algorithm
    onnx.save(getattr(made, "model", made), out)


def olive(model: Path, feeds: Sequence[Feed], out: Path, settings: Mapping[str, Any]) -> None:
    """Olive's own rounding to nearest, symmetric; settings ``bits`` and ``block``."""
    passes = importlib.import_module("olive.passes.olive_pass")
    rtn = importlib.import_module("olive.passes.onnx.rtn_quantization")
    handler = importlib.import_module("olive.model").ONNXModelHandler(str(model))
    config = {"bits": settings["bits"], "block_size": settings["block"]}
    made = passes.create_pass_from_dict(
        rtn.OnnxBlockWiseRtnQuantization, config, disable_search=True
    ).run(handler, str(out))
    onnx.save(onnx.load(made.model_path), out)
