"""Applies ``--max-memory`` to runs of the float model: splits feeds so that activations fit.

The runtime needs all weights at once, so they are the minimum. The rest is for activations: a feed
is halved along its batch until they fit. Only shapes decide that, so the result does not depend on
the machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from qcompile.data.feeds import Feed, first_sample, growth, split_to_fit
from qcompile.errors import DataError
from qcompile.ir import Graph, Refusal
from qcompile.ir.analysis.activation_memory import Footprint, footprint
from qcompile.ir.analysis.constant_evaluation import Evaluator
from qcompile.ir.lazy_values import nbytes
from qcompile.quant import Array
from qcompile.runtime.spilled_arrays import Store

LIBRARIES = 300 * 10**6  # bytes: upper bound for Python, numpy and ONNX Runtime themselves
FETCHED = 1 << 27  # bytes of activations that calibration fetches at a time, without a limit
_SHARE = 8  # with a limit, at most this fraction (one eighth) of it is fetched at a time
# ONNX Runtime's arena grows in powers of two.
_ARENA = 2
_LARGE = 1 << 16  # bytes: larger outputs are kept in files
_Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


@dataclass
class Budget:
    """``limit``: bytes for the process without its libraries; None is no limit.

    graph: the float model. divisible: it takes batches of any size. ``store``: keeps arrays in
    files, where there is a limit.
    """

    limit: int | None
    graph: Graph
    evaluate: Evaluator
    divisible: bool = True
    store: Store | None = None
    _known: list[tuple[_Shapes, Footprint]] = field(default_factory=list)

    def __post_init__(self) -> None:
        sizes = {name: nbytes(c) for name, c in self.graph.constants().items()}
        self.weights = sum(sizes.values())
        self.largest = max(sizes, key=lambda n: sizes[n], default="")
        self.largest_bytes = sizes.get(self.largest, 0)
        if self.limit is not None:
            self.store = Store()

    @property
    def switched(self) -> int:
        """Bytes of the fake-quantized model, whose weights are inputs: float and fake-quantized."""
        return 3 * self.weights

    @property
    def fetched(self) -> int:
        """Bytes of activations that may be fetched at a time."""
        return FETCHED if self.limit is None else min(FETCHED, self.limit // _SHARE)

    def parts(self, feed: Feed) -> Iterator[Feed]:
        """The feed, or parts of its batch that fit. Raises DataError where one sample does not."""
        return split_to_fit(feed, self._fits, self._refuse, divisible=self.divisible)

    def check(self, feeds: Iterable[Feed]) -> None:
        """Raise DataError, before anything runs, if the largest of all samples does not fit."""
        if self.limit is None:
            return
        largest: list[Feed] = []
        for feed in feeds:
            sample = first_sample(feed) if self.divisible else feed
            if not any(_is_within(sample, other) for other in largest):
                largest = [other for other in largest if not _is_within(other, sample)]
                largest.append(sample)
        needed = [self._needed(self._footprint(sample).bytes) for sample in largest]
        if needed and max(needed) > self.limit:
            self._refuse(largest[int(np.argmax(needed))])

    def kept(self, outputs: dict[str, Array]) -> dict[str, Array]:
        """Outputs that are kept for a later comparison: in files, where there is a limit."""
        store = self.store
        if store is None:
            return outputs
        return {n: store.array(v) if _is_large(v) else v for n, v in outputs.items()}

    def excess_of(self, needed: int, what: str) -> Refusal | None:
        """A Refusal where ``needed`` bytes are over the limit, else None."""
        if self.limit is None or needed <= self.limit:
            return None
        return Refusal(f"{what} takes {needed} bytes, over --max-memory {self.limit}")

    def _fits(self, feed: Feed) -> bool:
        if self.limit is None:
            return True
        for shapes, found in self._known:
            times = growth(shapes, feed)
            if times and self._needed(found.bytes * times) <= self.limit:
                return True
        return self._needed(self._footprint(feed).bytes) <= self.limit

    def _needed(self, activations: int) -> int:
        return self.weights + self.fetched + _ARENA * activations

    def _footprint(self, feed: Feed) -> Footprint:
        shapes = {name: v.shape for name, v in feed.items()}
        for old, known in self._known:
            if old == shapes:
                return known
        found = footprint(self.graph, self.evaluate, shapes)
        self._known.append((shapes, found))
        return found

    def _refuse(self, feed: Feed) -> None:
        """Raise DataError: what is needed, the largest tensors, and what limit would do."""
        found = self._footprint(feed)
        rest = self.weights + _ARENA * found.bytes
        least = min(rest + FETCHED, rest * _SHARE // (_SHARE - 1) + _SHARE)
        raise DataError(
            f"--max-memory {self.limit} is too little to run the float model: its weights take "
            f"{self.weights} bytes (most: {self.largest!r}, {self.largest_bytes}), activations of "
            f"the smallest part of a feed {_ARENA * found.bytes} (most: {found.tensor!r}, "
            f"{found.largest}); give at least {least}, or shorter samples"
        )


def _is_within(feed: Feed, other: Feed) -> bool:
    """True where every dimension of every input is at most that of the other feed."""
    return all(
        v.ndim == other[n].ndim
        and all(a <= b for a, b in zip(v.shape, other[n].shape, strict=True))
        for n, v in feed.items()
    )


def _is_large(values: object) -> bool:
    return isinstance(values, np.ndarray) and values.nbytes > _LARGE and values.dtype.kind != "O"
