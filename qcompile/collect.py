"""Runs the calibration data once and gives every requested tensor its range.

Where the calibrator needs only extrema, ReduceMin and ReduceMax over the last axis are added to
the graph, so that activations never leave the runtime. Otherwise activations come out in groups
that fit the memory budget; observers hold O(bins) or O(channels), whatever the number of batches.
Positions that the attention mask marks as padding do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx

from qcompile.api import Calibrator, Observer
from qcompile.data import padding_mask
from qcompile.errors import DataError
from qcompile.export import to_proto
from qcompile.folding import Evaluator
from qcompile.graph import Graph, Shape
from qcompile.plan import Ranges, StatRequest
from qcompile.probing import probed_shapes
from qcompile.qtypes import Array
from qcompile.runtime import Feed, Session, SessionOptions, with_outputs

_FLAT = -1  # batch and tokens are flattened into the first axis
_AXES_INPUT = 18  # opset from which reductions take their axes as an input


@dataclass(frozen=True)
class Options:
    """``max_memory``: bytes of activations held at a time. ``mask``: leave padding out."""

    max_memory: int = 1 << 30
    mask: bool = True
    threads: int = 0


@dataclass
class Tap:
    """One requested tensor: where its tokens lie, the outputs to fetch, and its observer."""

    request: StatRequest
    token_axis: int | None
    outputs: tuple[str, ...]
    observer: Observer
    fault: str = ""

    @property
    def tensor(self) -> str:
        return self.request.tensor


@dataclass
class Collector:
    """Observes feeds one by one; ``ranges`` may be asked at any time."""

    session: Session
    taps: list[Tap]
    options: Options
    reduced: bool
    feeds_seen: int = 0
    _sizes: dict[str, int] = field(default_factory=dict)

    def update(self, feed: Feed) -> None:
        """Run one feed and update every observer. Raises DataError over the memory budget."""
        for part in self._fitting(feed):
            mask = padding_mask(dict(part)) if self.options.mask else None
            for group in self._groups(part):
                values = self.session.run(part, [o for tap in group for o in tap.outputs])
                for tap in group:
                    self._observe(tap, [values[o] for o in tap.outputs], mask)
        self.feeds_seen += 1

    def _fitting(self, feed: Feed) -> Iterator[Feed]:
        """The feed, or halves of its batch until every single tensor fits the budget."""
        if self.reduced:
            yield feed
            return
        sizes = [(self._size(tap, feed), tap.tensor) for tap in self.taps]
        size, tensor = max(sizes)
        if size <= self.options.max_memory:
            yield feed
            return
        batch = min((v.shape[0] if v.ndim else 1) for v in feed.values())
        if batch < 2 or any(v.shape[0] != batch for v in feed.values()):
            raise DataError(
                f"tensor {tensor!r} has {size} bytes for one sample of the calibration data, over "
                f"--max-memory {self.options.max_memory}: give at least {size}, or shorter samples"
            )
        for rows in (slice(0, batch // 2), slice(batch // 2, None)):
            yield from self._fitting({name: v[rows] for name, v in feed.items()})

    def ranges(self) -> Ranges:
        """Ranges of all tensors that finite values were seen of, reasons for the others."""
        found = Ranges()
        for tap in self.taps:
            try:
                if tap.fault:
                    raise ValueError(tap.fault)
                found.set(tap.tensor, tap.observer.range())
            except ValueError as e:
                found.missing[tap.tensor] = f"no range: {e}"
        return found

    def _observe(self, tap: Tap, arrays: Sequence[Array], mask: Array | None) -> None:
        kept = [_without_padding(a, tap.token_axis, mask) for a in arrays]
        axis = tap.request.axis
        if axis is not None:
            kept = [_channels_last(a, axis) for a in kept]
        values = np.concatenate([k.reshape(-1, k.shape[-1]) if axis else k.ravel() for k in kept])
        if values.size == 0:
            return
        if not np.isfinite(values).all():
            tap.fault = "NaN or infinity among its values"
            return
        tap.observer.update(values)

    def _groups(self, feed: Feed) -> Iterator[list[Tap]]:
        """Taps to fetch together: all where reduced, else as many as the budget holds."""
        if self.reduced:
            yield self.taps
            return
        budget, group, used = self.options.max_memory, list[Tap](), 0
        for tap in self.taps:
            size = self._size(tap, feed)
            if group and used + size > budget:
                yield group
                group, used = [], 0
            group.append(tap)
            used += size
        if group:
            yield group

    def _size(self, tap: Tap, feed: Feed) -> int:
        """Bytes of a tensor for this feed, scaled from the largest one seen, measured at first."""
        scale = max(v.size for v in feed.values())
        if tap.tensor not in self._sizes:
            value = self.session.run(feed, tap.outputs[:1])[tap.outputs[0]]
            self._sizes[tap.tensor] = -(-value.nbytes // scale)
        # Attention scores grow with the square of the length: allow for one more factor of length.
        return self._sizes[tap.tensor] * scale


def collector(
    graph: Graph,
    requests: Sequence[StatRequest],
    calibrator: Calibrator,
    evaluate: Evaluator,
    options: Options | None = None,
) -> Collector:
    """A collector over the float graph; the session with its taps is made once."""
    options = options or Options()
    axes = _token_axes(graph, requests, evaluate) if options.mask else {}
    reduced = calibrator.needs == "extrema"
    model = to_proto(graph)
    taps = []
    for i, request in enumerate(requests):
        in_graph = reduced and request.axis is None
        names = _add_extrema(model, graph, request, i) if in_graph else (request.tensor,)
        observer = calibrator.observer(request.spec)
        taps.append(Tap(request, axes.get(request.tensor), names, observer))
    wanted = list(dict.fromkeys(o for tap in taps for o in tap.outputs))
    tapped = with_outputs(model, wanted)
    session = Session(tapped.SerializeToString(), SessionOptions(threads=options.threads))
    all_reduced = reduced and all(r.axis is None for r in requests)
    return Collector(session, taps, options, all_reduced)


def collect(
    made: Collector, feeds: Iterable[Feed], on_feed: Callable[[int], None] | None = None
) -> Ranges:
    """Observe all feeds. Raises DataError where there are none."""
    for feed in feeds:
        made.update(feed)
        if on_feed is not None:
            on_feed(made.feeds_seen)
    if made.feeds_seen == 0:
        raise DataError("the calibration data is empty: no feed in it")
    return made.ranges()


def _add_extrema(
    model: onnx.ModelProto, graph: Graph, request: StatRequest, index: int
) -> tuple[str, str]:
    """Reduce over the last axis: rows stay, so that padding can be left out outside."""
    names = (f"qcompile/{index}/min", f"qcompile/{index}/max")
    for op, name in zip(("ReduceMin", "ReduceMax"), names, strict=True):
        node = onnx.helper.make_node(op, [request.tensor], [name], name=name, keepdims=0)
        if graph.opset >= _AXES_INPUT:
            axes = "qcompile/last"
            if not any(t.name == axes for t in model.graph.initializer):
                last = onnx.numpy_helper.from_array(np.array([-1], np.int64), axes)
                model.graph.initializer.append(last)
            node.input.append(axes)
        else:
            node.attribute.append(onnx.helper.make_attribute("axes", [-1]))
        model.graph.node.append(node)
    return names


def _without_padding(values: Array, token_axis: int | None, mask: Array | None) -> Array:
    """Rows of real tokens; everything where the tensor has no token axis."""
    if mask is None or token_axis is None or mask.all():
        return values
    if token_axis == _FLAT:
        kept: Array = values[mask.reshape(-1)]
        return kept
    rows = np.moveaxis(values, token_axis, 1)
    selected: Array = rows[mask]
    return selected


def _channels_last(values: Array, axis: int) -> Array:
    moved: Array = np.moveaxis(values, axis, -1)
    return moved


def _token_axes(
    graph: Graph, requests: Sequence[StatRequest], evaluate: Evaluator
) -> Mapping[str, int]:
    """The axis along which each tensor has one entry a token, by probing shapes.

    The first axis must be the batch; the last cannot be the token axis, since it is reduced.
    """
    if not any(t.name == "attention_mask" for t in graph.inputs):
        return {}
    probes = probed_shapes(graph, evaluate)
    found = {}
    for request in requests:
        views = [(p.get(request.tensor), p.get("attention_mask")) for p in probes]
        axis = _token_axis([(t, m) for t, m in views if t is not None and m is not None])
        if axis is not None:
            found[request.tensor] = axis
    return found


def _token_axis(views: Sequence[tuple[Shape, Shape]]) -> int | None:
    if not views or any(len(m) != 2 for _, m in views):
        return None
    if all(t[0] == _product(m) for t, m in views):
        return _FLAT
    if not all(t[0] == m[0] for t, m in views):
        return None
    for axis in range(1, min(len(t) for t, _ in views) - 1):
        if all(t[axis] == m[1] for t, m in views):
            return axis
    return None


def _product(shape: Shape) -> int:
    return int(np.prod([d if isinstance(d, int) else -1 for d in shape], dtype=np.int64))
