"""Whether a model runs at other sizes than those of the data, wherever the float model does.

Rewritten shape arithmetic can be right for the sizes of the data and wrong for all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from qcompile.data.feeds import Feed
from qcompile.errors import ModelError
from qcompile.ir import Graph
from qcompile.quant import Array

Run = Callable[[Feed], Mapping[str, Array]]
# What an open dimension of size n becomes: smaller, larger, and next to it.
_SIZES: tuple[Callable[[int], int], ...] = (
    lambda n: max(1, n // 2),
    lambda n: n + n // 4 + 1,
    lambda n: max(1, n - 1),
)


def resized_feeds(graph: Graph, feed: Feed) -> Iterator[Feed]:
    """The feed at other sizes of the inputs' open dimensions; none where all are fixed.

    Values repeat or end early along an axis, so ids stay ids and masks stay masks. Dimensions of
    one name have one size.
    """
    axes = {t.name: _open_axes(t.name, t.shape) for t in graph.inputs if t.name in feed}
    if not any(axes.values()):
        return
    sizes = {key: feed[n].shape[i] for n, found in axes.items() for i, key in found.items()}
    for change in _SIZES:
        changed = {key: change(size) for key, size in sizes.items()}
        if changed != sizes:
            yield {
                name: _resized(values, {i: changed[k] for i, k in axes.get(name, {}).items()})
                for name, values in feed.items()
            }


def _open_axes(name: str, shape: Sequence[int | str | None] | None) -> dict[int, str]:
    """Axes of an input without a fixed size, with the name of their dimension."""
    open_axes = ((i, d) for i, d in enumerate(shape or ()) if not isinstance(d, int))
    return {i: d or f"{name}:{i}" for i, d in open_axes}


def _resized(values: Array, sizes: Mapping[int, int]) -> Array:
    for axis, size in sizes.items():
        if values.shape[axis]:
            values = values.take(np.arange(size) % values.shape[axis], axis)
    return values


def feeds_that_run(run: Run, feeds: Iterable[Feed]) -> list[Feed]:
    """The feeds that a model takes."""
    return [feed for feed in feeds if _error(run, feed) is None]


def check_runs(run: Run, feeds: Iterable[Feed]) -> None:
    """Raises ModelError for the first feed that the compiled model does not take."""
    for feed in feeds:
        error = _error(run, feed)
        if error is not None:
            sizes = ", ".join(f"{name} {list(values.shape)}" for name, values in feed.items())
            raise ModelError(
                f"the compiled model does not run on {sizes}, where the float model does: fix the "
                f"sizes that you need with --dim NAME=N, and please report this: {error}"
            ) from error


def _error(run: Run, feed: Feed) -> ModelError | None:
    try:
        run(feed)
    except ModelError as e:
        return e
    return None
