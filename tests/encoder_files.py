"""A small encoder and tokens for it, as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from qcompile.ir.model_io.to_proto import to_proto
from qcompile.quant import Array
from qcompile.rewriting.testing import encoder


def save_encoder(path: Path, layers: int = 2, outlier: float = 40.0) -> Path:
    onnx.save(to_proto(encoder(layers, width=16, outlier=outlier)), path)
    return path


def tokens(seed: int = 3, rows: int = 32) -> dict[str, Array]:
    """Rows of seven tokens, none of them padding."""
    ids = np.random.default_rng(seed).integers(0, 64, (rows, 7))
    return {"ids": ids, "attention_mask": np.ones_like(ids)}


def save_tokens(path: Path, seed: int = 3, rows: int = 32) -> Path:
    found = tokens(seed, rows)
    np.savez(path, ids=found["ids"], attention_mask=found["attention_mask"])
    return path
