"""Which of the processor's instruction sets ONNX Runtime's kernels use, for figures and forecasts.

The processor may have more than they use: the operating system may not save the registers, ONNX
Runtime may be a copy with AVX2 kernels (tools/avx2_runtime.py), or the processor is emulated and
/proc/cpuinfo describes another one. So two tiny models show what was chosen.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import onnx

from qcompile.errors import ModelError
from qcompile.runtime import session
from qcompile.system import processor

# Sums of uint8 by int8 products are exact with these.
_EXACT = {"AMX-INT8", "AVX512-VNNI", "AVX-VNNI"}
_WITH_AVX512 = {"AMX-INT8", "AVX512-VNNI", "AVX512F"}
_BLOCKED = "com.microsoft.nchwc"
_AVX2_BLOCK = 8


@cache
def _used(found: tuple[str, ...]) -> tuple[str, ...]:
    unused = set[str]()
    if _EXACT & set(found) and session.saturates():
        unused |= _EXACT
    if _WITH_AVX512 & set(found) and _block() == _AVX2_BLOCK:
        unused |= _WITH_AVX512
    return tuple(name for name in found if name not in unused)


def instruction_sets() -> list[str]:
    """Those that matter for int8 and that kernels use, fastest first; empty where unknown."""
    return list(_used(tuple(processor.instruction_sets())))


def environment() -> processor.Environment:
    """This machine as ONNX Runtime uses it, and the installed versions."""
    return processor.describe_environment(instruction_sets())


def _block() -> int:
    """Channels in a block of the layout for convolutions: a vector of float32. 0 without blocks.

    Source: MLAS MlasNchwcGetBlockSize, 16 with AVX512F and 8 with AVX2. The optimized graph has
    a convolution's weight with its output channels, one here, padded to a block. 0 also where it
    cannot be written.
    """
    graph = onnx.parser.parse_graph(
        "g (float[1,16,1,1] x) => (float[1,1,1,1] y) { y = Conv(x, w) }"
    )
    weight = onnx.numpy_helper.from_array(np.ones((1, 16, 1, 1), np.float32), "w")
    graph.initializer.append(weight)
    imports = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, ir_version=8, opset_imports=imports)
    try:
        with tempfile.TemporaryDirectory() as name:
            path = session.write_optimized(model.SerializeToString(), Path(name), layouts=True)
            optimized = onnx.load(path).graph
    except (ModelError, OSError):
        return 0  # no room for a temporary file, which the stage that needs one reports
    blocked = {n.input[1] for n in optimized.node if n.domain == _BLOCKED and n.op_type == "Conv"}
    return next((t.dims[0] for t in optimized.initializer if t.name in blocked), 0)
