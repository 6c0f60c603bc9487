"""A small encoder and tokens for it, as files and as feeds."""

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


def token_feeds(
    count: int = 8,
    batch: int = 4,
    length: int = 7,
    *,
    padded: tuple[int, int] | None = None,
    seed: int = 3,
) -> list[dict[str, Array]]:
    """Batches of tokens; row ``padded[0]`` of each is padding from position ``padded[1]`` on."""
    rng, shape = np.random.default_rng(seed), (batch, length)
    mask = np.ones(shape, np.int64)
    if padded is not None:
        mask[padded[0], padded[1] :] = 0
    return [{"ids": rng.integers(0, 64, shape), "attention_mask": mask} for _ in range(count)]


def save_tokens(path: Path, seed: int = 3) -> Path:
    """32 rows of seven tokens, none of them padding."""
    (feed,) = token_feeds(1, batch=32, seed=seed)
    np.savez(path, ids=feed["ids"], attention_mask=feed["attention_mask"])
    return path
