"""Whether a model runs at other sizes than those of the data, wherever the float model does.

Rewritten shape arithmetic can be right for the sizes of the data and wrong for all others. Longer
text is also made, to see how close the outputs are where ranges are from shorter text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from qcompile.data.feeds import Feed
from qcompile.errors import ModelError
from qcompile.ir import Graph, Tensor
from qcompile.quant import Array

Run = Callable[[Feed], Mapping[str, Array]]
# What open dimensions of size n become: smaller, larger, next to it, and every other one larger.
_SIZES: tuple[Callable[[int, int], int], ...] = (
    lambda n, _: max(1, n // 2),
    lambda n, _: n + n // 4 + 1,
    lambda n, _: max(1, n - 1),
    lambda n, i: n + n // 4 + 1 if i % 2 else max(1, n // 2),
)
_Key = tuple[str, int]  # name of a dimension, and its size in the feed


def resized_feeds(graph: Graph, feed: Feed) -> Iterator[Feed]:
    """The feed at other sizes of the inputs' open dimensions; none where all are fixed.

    Values repeat or end early along an axis, so ids stay ids and masks stay masks. Dimensions of
    one name keep one size, if they have one.
    """
    axes = {t.name: _open_axes(feed[t.name], t) for t in graph.inputs if t.name in feed}
    keys = list(dict.fromkeys(key for found in axes.values() for key in found.values()))
    for change in _SIZES:
        changed = {key: change(key[1], i) for i, key in enumerate(keys)}
        if any(key[1] != size for key, size in changed.items()):
            yield {
                name: _resized(values, {i: changed[k] for i, k in axes.get(name, {}).items()})
                for name, values in feed.items()
            }


def _open_axes(values: Array, tensor: Tensor) -> dict[int, _Key]:
    """Axes of an input without a fixed size."""
    open_axes = ((i, d) for i, d in enumerate(tensor.shape or ()) if not isinstance(d, int))
    return {i: (d or f"{tensor.name}:{i}", values.shape[i]) for i, d in open_axes}


def _resized(values: Array, sizes: Mapping[int, int], *, count: bool = False) -> Array:
    """Values repeat or end early; ``count``: what counts up by one along an axis goes on."""
    for axis, size in sizes.items():
        old = values.shape[axis]
        if not old:
            continue
        places = np.arange(size)
        counts = count and old > 1 and bool((np.diff(values, axis=axis) == 1).all())
        values = values.take(places % old, axis)
        if counts:
            shape = [-1 if i == axis else 1 for i in range(values.ndim)]
            values = values + (places // old * old).reshape(shape).astype(values.dtype)
    return values


def longest_text(graph: Graph, feed: Feed) -> int:
    """The number of tokens in a feed of text whose length is open; 0 for any other feed."""
    return max((size for _, size in _token_keys(graph, feed)), default=0)


def longer_text(graph: Graph, feed: Feed, length: int) -> Feed:
    """A feed of text made ``length`` tokens long.

    Values repeat, but what counts up by one, such as positions, goes on counting. Dimensions such
    as ``past + sequence`` stay the sum of both.
    """
    axes = {t.name: _open_axes(feed[t.name], t) for t in graph.inputs if t.name in feed}
    sizes = {key: key[1] for found in axes.values() for key in found.values()}
    sizes |= dict.fromkeys(_token_keys(graph, feed), length)
    named = {name: size for (name, _), size in sizes.items()}
    for key in sizes:
        parts = _parts(key[0])
        if parts and set(parts) <= set(named):
            sizes[key] = sum(named[part] for part in parts)
    return {
        name: _resized(values, {i: sizes[key] for i, key in axes.get(name, {}).items()}, count=True)
        for name, values in feed.items()
    }


def _token_keys(graph: Graph, feed: Feed) -> list[_Key]:
    """The open second axes of [batch, sequence] inputs of integers."""
    inputs = (t for t in graph.inputs if t.name in feed)
    texts = [t for t in inputs if feed[t.name].ndim == 2 and feed[t.name].dtype.kind in "iu"]
    keys = (_open_axes(feed[t.name], t).get(1) for t in texts)
    return [key for key in dict.fromkeys(keys) if key is not None and not _parts(key[0])]


def _parts(name: str) -> list[str]:
    """The summands of a dimension such as ``past + sequence``; none of any other."""
    parts = [part.strip() for part in name.split("+")]
    return parts if len(parts) > 1 else []


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
