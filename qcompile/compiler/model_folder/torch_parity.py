"""Compares an exported model with the torch model on several shapes with padding.

The measure is the largest difference of an output divided by its largest value. Both compute in
float32: sums of n terms in another order differ by about sqrt(n) 2^-24 of their size, 4e-6 for the
4096 terms of a large feed-forward layer, and by 2e-5 after 24 such layers. The limit is five times
that. Constants baked in by tracing, a lost mask or active dropout cause far larger differences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

from qcompile.compiler.model_folder.forward_inputs import BOXES, IDS, MASK, POSITIONS, TYPES
from qcompile.errors import GateError, ModelError
from qcompile.quant import Array
from qcompile.runtime.session import Session, SessionOptions
from qcompile.system.json_values import Record

TOLERANCE = 1e-4
SHAPES = ((2, 16), (1, 7), (3, 33), (2, 1))


@dataclass(frozen=True)
class Vocabulary:
    """Limits of example inputs: token ids below ``size``, the id of padding, the number of
    ``segments`` (values of token_type_ids), the ``longest`` sequence, the largest coordinate of
    ``boxes``, and whether rows are padded on their ``left``."""

    size: int
    padding: int
    segments: int
    longest: int
    boxes: int = 0
    left: bool = False


@dataclass(frozen=True)
class Parity(Record):
    """The largest relative difference, its output, and the (batch, length) that were compared."""

    worst: float
    output: str
    shapes: Annotated[tuple[tuple[int, int], ...], "batch and length of the inputs compared"]
    tolerance: float = TOLERANCE

    def __str__(self) -> str:
        shapes = ", ".join(f"{batch}x{length}" for batch, length in self.shapes)
        return (
            f"differs from torch by {self.worst:.1e} of the largest value at most, on {shapes} "
            f"with padding (limit {self.tolerance:.0e})"
        )


def example_feed(
    names: Sequence[str], vocabulary: Vocabulary, batch: int, length: int
) -> dict[str, Array]:
    """Random inputs, int64 [batch, length] each, bbox [batch, length, 4] as corners with x0 <= x1
    and y0 <= y1. Every row but the first is padded."""
    rng = np.random.default_rng((batch, length))
    ids = rng.integers(0, vocabulary.size, (batch, length))
    ids[ids == vocabulary.padding] = (vocabulary.padding + 1) % vocabulary.size
    mask = np.ones_like(ids)
    for row in range(1, batch):
        mask[row, max(1, length - 2 * row) :] = 0
    mask = mask[:, ::-1].copy() if vocabulary.left else mask
    ids[mask == 0] = vocabulary.padding
    types = np.zeros_like(ids)
    types[:, (length + 1) // 2 :] = vocabulary.segments > 1
    corners = rng.integers(0, vocabulary.boxes + 1, (batch, length, 2, 2))
    feed = {
        IDS: ids,
        MASK: mask,
        TYPES: types,
        POSITIONS: np.maximum(mask.cumsum(axis=1) - 1, 0),
        BOXES: np.sort(corners, axis=2).reshape(batch, length, 4),
    }
    return {name: feed[name] for name in names}


def compare_with_torch(
    path: Path,
    reference: Callable[[Mapping[str, Array]], Mapping[str, Array]],
    vocabulary: Vocabulary,
) -> Parity:
    """Run an ONNX file and its reference, a function of arrays by name, on random tokens.

    Where rows are padded on their left, the outputs of padding are not compared: no attention is
    defined there if a token sees only those before it. Raises ModelError if the file does not run
    or has an output that the reference lacks, GateError if the outputs differ.
    """
    session = Session(path, SessionOptions(threads=1))
    shapes = tuple(dict.fromkeys((b, min(n, vocabulary.longest)) for b, n in SHAPES))
    worst, output = 0.0, session.outputs[0]
    for batch, length in shapes:
        feed = example_feed(session.inputs, vocabulary, batch, length)
        expected, found = reference(feed), session.run(feed)
        for name, value in found.items():
            if name not in expected:
                raise ModelError(f"the file has output {name!r}, which the model does not give")
            pair = (expected[name], value)
            if vocabulary.left:
                pair = (_real(pair[0], feed), _real(pair[1], feed))
            error = _difference(*pair)
            if not error <= worst:  # also where it is not a number
                worst, output = error, name
        if not worst <= TOLERANCE:
            raise GateError(
                f"the exported model differs from torch: {output!r} by {worst:.1e} of its largest "
                f"value at shape {batch}x{length}, expected {TOLERANCE:.0e} at most"
            )
    return Parity(worst, output, shapes)


def _real(value: Array, feed: Mapping[str, Array]) -> Array:
    """The values of real tokens; all values of an output that has none for each token."""
    mask = feed.get(MASK)
    return value if mask is None or value.shape[:2] != mask.shape else value[mask != 0]


def _difference(expected: Array, found: Array) -> float:
    if found.shape != expected.shape:
        return float("inf")
    largest = float(np.abs(expected).max(initial=0.0))
    return float(np.abs(found - expected).max(initial=0.0)) / max(largest, 1e-30)
