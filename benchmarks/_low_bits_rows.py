"""What benchmarks/low_bits.py compiles: bits, blocks and rounding, as settings of recipes.

In names, W is the bits of weights, A of the data that they are multiplied by, E of lookup tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks._accuracy_rows import Row
from benchmarks._nbits_quantizers import nbits, olive
from benchmarks._peer_quantizers import Peer, quark
from qcompile.rewriting.registry import target

# The file that all others are compared with: the one that compiling without any option gives.
REFERENCE = Row("stored", "cpu W8A8 E8, default", {"target": "cpu"})
ROUNDING = "round-weights"

# Bits of weights and of tables, and values that share a multiplier: 0 for one scale per channel,
# None for what these bits have by default.
_STORED = (
    (5, 3, None), (4, 4, None), (6, 4, 0), (5, 4, 0), (4, 8, 0), (4, 4, 0), (4, 4, 64), (4, 4, 32),
    (4, 2, 0), (4, 2, 32), (3, 4, 0), (3, 4, 32), (3, 2, 32), (2, 4, 32), (2, 2, 16),
)  # fmt: skip
_ROUNDED = ((4, 0), (4, 32), (3, 32))
_WEIGHT_ONLY = ((8, 8, 32), (4, 8, 0), (4, 4, 32), (4, 4, 128), (3, 4, 32), (2, 4, 32), (2, 2, 32))
_FLOAT_DATA = ((4, 8, 32), (3, 8, 32))  # MatMulNBits without quantized data
_QDQ = (
    ("static", 8, 8, 0), ("static", 4, 8, 0), ("static", 4, 4, 32), ("static", 4, 2, 32),
    ("weight-only", 4, 8, 32), ("weight-only", 4, 2, 32), ("weight-only", 2, 2, 32),
)  # fmt: skip
_RECIPES = ("small", "paper-w4a8", "paper-w4a32", "paper-w4a8-emb2")
_TABLES = ((8, 0), (4, 64), (4, 32), (2, 16))  # bits, and values that share a multiplier


def few_bits(
    goal: str, weights: int, tables: int, block: int | None, *, mode: str = "static", **more: Any
) -> Row:
    """A row with these bits; 8 bits of everything are left to the target's own settings."""
    data = "A8" if mode == "static" else "A32"
    grain = "" if weights == 8 or block is None else f", block {block}" if block else ", channel"
    settings: dict[str, Any] = {"target": goal, **more}
    if mode != "static":
        settings["mode"] = mode
    if weights != 8:
        settings["weight_bits"] = weights
        if block is not None:
            settings["weight_block"] = block
    if tables != 8:
        settings["embedding_bits"] = tables
    group = {"cpu": "stored", "qdq": "qdq"}[goal] if mode == "static" or goal == "qdq" else mode
    return Row(group, f"{goal} W{weights}{data} E{tables}{grain}", settings)


def with_rounding(row: Row, method: str | None) -> Row:
    """The row with another method of round-weights, None for no such pass: nearest."""
    goal = target(row.settings["target"])
    passes = []
    for item in goal.transform["static"]:
        name, _, options = item.removesuffix("}").partition("{")
        if name != ROUNDING:
            passes.append(item)
        elif method is not None:
            settings = filter(None, (options, f"method={method}"))
            passes.append(f"{name}{{{','.join(settings)}}}")
    return _with_transforms(row, passes, method or "nearest")


def with_bias_correction(row: Row) -> Row:
    """The row with the mean error of each layer in its bias."""
    passes = []
    for item in target(row.settings["target"]).transform["static"]:
        passes += [item, "correct-bias"] if item.startswith(ROUNDING) else [item]
    return _with_transforms(row, passes, "bias correction")


def _with_transforms(row: Row, passes: Sequence[str], name: str) -> Row:
    # With other transforms than its own a target leaves attention in float, which would differ too.
    attention = target(row.settings["target"]).attention
    changed = {**row.settings, "transforms": ",".join(passes), "attention": attention}
    return Row("rounding", f"{row.name}, {name}", changed)


def _rows() -> tuple[Row, ...]:
    stored = [few_bits("cpu", *bits) for bits in _STORED]
    stored.append(_with_ffn_output(few_bits("cpu", 4, 4, 0), 8))
    stored.append(_with_ffn_output(few_bits("cpu", 4, 2, None), 5))
    rounding = [
        with_rounding(few_bits("cpu", bits, 4, block), method)
        for bits, block in _ROUNDED
        for method in (None, "adaround")
    ]
    rounding.append(with_bias_correction(few_bits("cpu", 4, 4, 0)))
    weight_only = [few_bits("cpu", *bits, mode="weight-only") for bits in _WEIGHT_ONLY]
    weight_only += [_with_float_data(*bits) for bits in _FLOAT_DATA]
    qdq = [few_bits("qdq", *bits, mode=mode) for mode, *bits in _QDQ]
    recipes = [Row("recipes", f"recipe {name}", {"recipe": name}) for name in _RECIPES]
    tables = [_table_alone(*table) for table in _TABLES]
    return (REFERENCE, *stored, *rounding, *weight_only, *qdq, *recipes, *tables)


def _with_ffn_output(row: Row, bits: int) -> Row:
    """More bits for the second linear layer of each FFN."""
    settings = {**row.settings, "precision": {"role:ffn-out-weight": bits}}
    return Row(row.group, f"{row.name}, FFN output W{bits}", settings)


def _with_float_data(*bits: int) -> Row:
    """Weight-only, and the operator does not round the data to 8 bits."""
    row = few_bits("cpu", *bits, mode="weight-only")
    settings = {**row.settings, "forms": {"weight-only-data": "float"}}
    return Row(row.group, f"{row.name}, float data", settings)


def _table_alone(bits: int, block: int) -> Row:
    """The table of tokens with few bits, everything else float."""
    precision: Mapping[str, Any] = {"role:token-embedding-weight": bits, "role:*-weight": "float"}
    settings = {"target": "cpu", "mode": "weight-only", "precision": precision}
    name = f"token table alone, E{bits}"
    if bits == 8:
        return Row("tables", name, settings)
    return Row("tables", f"{name}, block {block}", {**settings, "weight_block": block})


ROWS = _rows()

_NBITS = ("onnx_ir", "onnxruntime")  # what onnxruntime's tool imports, and whose version it has
_B32: dict[str, Any] = {"bits": 4, "block": 32}


def _onnxruntime(name: str, **settings: Any) -> Peer:
    return Peer(f"onnxruntime {name}", nbits, *_NBITS, {**_B32, **settings})


PEERS = (
    _onnxruntime("RTN W4, block 32"),
    _onnxruntime("RTN W4, block 32, symmetric", symmetric=True),
    _onnxruntime("RTN W4, block 32, level 4", accuracy_level=4),
    _onnxruntime("RTN W4 E4, block 32", tables=True),
    _onnxruntime("RTN W8, block 32", bits=8),
    _onnxruntime("RTN W2, block 32", bits=2),
    _onnxruntime("HQQ W4, block 32", algorithm="HQQ"),
    _onnxruntime("k-quant W4, block 32", algorithm="KQuant"),
    # In 1.32.0 its codes are those of RTN: no error is carried on (docs/lowbit.md).
    _onnxruntime("GPTQ W4, block 32", algorithm="GPTQ"),
    Peer("Olive RTN W4, block 32", olive, "olive", "olive-ai", _B32),
    Peer("AMD Quark MatMulNBits", quark, "quark.onnx", "amd-quark", {"config": "MATMUL_NBITS"}),
)
