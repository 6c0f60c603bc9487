"""Runs the calibration data once and gives every requested tensor its range.

Where the calibrator needs only extrema, ReduceMin and ReduceMax over the last axis are added to
the graph, so that activations never leave the runtime. ReduceSum is added too, because those two
ignore NaN in ONNX Runtime. Otherwise activations are fetched in groups that fit the memory budget.
Observers hold O(bins) or O(channels) values, O(channels²) where second moments are asked for,
whatever the number of batches. Positions that the
attention mask marks as padding are excluded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import onnx

from qcompile.calibration.channel_observer import ChannelObserver
from qcompile.calibration.second_moments import MomentSum
from qcompile.calibrators.minmax import MinMax
from qcompile.data.feeds import (
    Feed,
    common_batch,
    first_sample,
    growth,
    padding_mask,
    split_to_fit,
    takes_any_batch,
)
from qcompile.errors import DataError
from qcompile.ir import Graph, Shape, Tensor, rank, shape_of
from qcompile.ir.analysis import token_axes
from qcompile.ir.analysis.constant_evaluation import Evaluator
from qcompile.ir.analysis.data_path import of_shapes
from qcompile.ir.analysis.shape_probing import probed_shapes
from qcompile.ir.analysis.token_axes import FLAT, Probe
from qcompile.ir.model_io.write_model import save_proto, with_external_weights
from qcompile.quant import (
    Array,
    Calibrator,
    ChannelStats,
    Observer,
    QSpec,
    Range,
    Ranges,
    StatRequest,
    out_of_scale,
    widened,
)
from qcompile.runtime.session import CPU, Session, SessionOptions, with_outputs
from qcompile.system.temporary_folder import TemporaryFolder

_FLOAT_BYTES = 4
VARYING = "its channels are not the same in all feeds"
# Opset from which a reduction takes its axes as an input.
_REDUCTIONS = {"ReduceMin": 18, "ReduceMax": 18, "ReduceSum": 13}


def _undivided(feed: Feed) -> tuple[Feed]:
    return (feed,)


@dataclass(frozen=True)
class CollectorOptions:
    """``max_memory``: bytes of activations fetched at a time. ``mask``: exclude padding.

    parts: splits a feed into feeds that the model can run. keep: stores samples of channels.
    widen: ranges from few values become wider than what was seen (``quant.widened``). provider: of
    ONNX Runtime, that runs the float model.
    """

    max_memory: int = 1 << 27
    mask: bool = True
    threads: int = 0
    parts: Callable[[Feed], Iterable[Feed]] = _undivided
    keep: Callable[[Array], Array] | None = None
    widen: bool = True
    provider: str = CPU


@dataclass(frozen=True)
class ObserverKind:
    """Makes the observers of one tensor: of a range, or of channels without a ``calibrator``."""

    calibrator: Calibrator | None
    spec: QSpec
    moments: bool = False

    @property
    def by_batch(self) -> bool:
        """True where extrema are enough, of which a moving average takes one pair for a batch."""
        return self.calibrator is not None and self.calibrator.needs == "extrema"

    def make(self, keep: Callable[[Array], Array] | None = None) -> Observer:
        """A fresh observer; ``keep`` stores samples of channels."""
        if self.calibrator is not None:
            return self.calibrator.observer(self.spec)
        return ChannelObserver(keep=keep, moments=MomentSum(keep) if self.moments else None)


@dataclass
class Tap:
    """One requested tensor: its token axis, the outputs to fetch, and its observer.

    ``outputs``: minimum, maximum and sum, or the tensor itself; then ``size`` is the output with
    its number of elements. ``row``: values in a row of which only the extrema are fetched.
    ``once``: the values are the same for every part of a batch, and counted for the first one only.
    ``pending``: extrema of the parts of this feed so far, where one update stands for one batch.
    ``values``: how many were seen, of each channel. ``fault``: why they give no range.
    """

    request: StatRequest
    token_axis: int | None
    outputs: tuple[str, ...]
    kind: ObserverKind
    observer: Observer
    size: str | None = None
    row: int = 1
    once: bool = False
    values: int = 0
    fault: str | None = None
    pending: list[Array] = field(default_factory=list)

    @property
    def tensor(self) -> str:
        return self.request.tensor

    def observe(self, values: Array) -> None:
        """Observe values of a part of the feed: now, or their extrema with those of the rest."""
        if self.kind.by_batch:
            self.pending.append(np.stack([values.min(0), values.max(0)]))
        else:
            self.observer.update(values)

    def end_feed(self) -> None:
        """Observe what is pending."""
        if self.pending:
            self.observer.update(np.concatenate(self.pending))
            self.pending = []


@dataclass
class Collector:
    """Observes feeds one by one; ``ranges`` may be called at any time.

    model: file of the float model with the outputs to fetch. folder: keeps its files.
    """

    model: Path
    taps: list[Tap]
    options: CollectorOptions
    divisible: bool = True  # the model takes batches of any size
    feeds_seen: int = 0
    counted: dict[tuple[tuple[str, tuple[int, ...]], ...], dict[str, int]] = field(
        default_factory=dict
    )
    folder: TemporaryFolder | None = None

    @cached_property
    def session(self) -> Session:
        """The model, loaded when the first feed is run. Raises ModelError."""
        threads, provider = self.options.threads, self.options.provider
        return Session(self.model, SessionOptions(threads, provider=provider, tf32=False))

    def update(self, *feed: Feed) -> None:
        """Run a feed, or the parts that its batch was divided into, and update every observer.

        Raises DataError over the memory budget.
        """
        for tap, arrays in self._fetch(feed, self.taps):
            self._observe(tap, arrays)
        for tap in self.taps:
            tap.end_feed()
        self.feeds_seen += 1

    def update_background(self, *feed: Feed) -> None:
        """Run a feed of background text: for background extrema and moments of watched channels.

        Raises DataError over the memory budget.
        """
        watched = [t for t in self.taps if isinstance(t.observer, ChannelObserver)]
        for tap, (values,) in self._fetch(feed, watched):
            assert isinstance(tap.observer, ChannelObserver)
            if tap.observer.fits(values):
                tap.observer.update_background(values)
            else:
                tap.fault = VARYING

    def _fetch(
        self, feed: Sequence[Feed], taps: Sequence[Tap]
    ) -> Iterator[tuple[Tap, list[Array]]]:
        """The outputs of each tap at real tokens, for each part of the feed."""
        divided = (whole for part in feed for whole in self.options.parts(part))
        parts = (part for whole in divided for part in self._fitting(whole))
        for number, part in enumerate(parts):
            mask = padding_mask(dict(part)) if self.options.mask else None
            for group in self._groups(part, [t for t in taps if not (number and t.once)]):
                names = dict.fromkeys(o for tap in group for o in tap.outputs)
                values = self.session.run(part, list(names))
                last = {o: i for i, tap in enumerate(group) for o in tap.outputs}
                for i, tap in enumerate(group):
                    place = tap.request.axis, tap.token_axis, mask
                    arrays = [_rows(values[o], *place) for o in tap.outputs]
                    for name in tap.outputs:  # free it before the observer allocates
                        if last[name] == i:
                            values.pop(name, None)
                    yield tap, arrays

    def _fitting(self, feed: Feed) -> Iterator[Feed]:
        """The feed, or parts of its batch whose fetched tensors fit the budget together.

        Where the batch cannot be divided, each single tensor must fit.
        """

        def fits(part: Feed) -> bool:
            return sum(self._sizes(part).values()) <= self.options.max_memory

        return split_to_fit(feed, fits, self._check_largest, divisible=self.divisible)

    def _check_largest(self, feed: Feed) -> None:
        sizes = self._sizes(feed)
        tensor = max(sizes, key=lambda name: sizes[name])
        size = sizes[tensor]
        if size > self.options.max_memory:
            raise DataError(
                f"tensor {tensor!r} has {size} bytes in one feed, which cannot be divided, over "
                f"--max-memory {self.options.max_memory}: give at least {size}, or smaller feeds"
            )

    def ranges(self) -> Ranges:
        """Ranges of all tensors with finite values only, reasons for the others."""
        ranges = Ranges()
        for tap in self.taps:
            if isinstance(tap.observer, ChannelObserver):
                continue
            try:
                if tap.fault is not None:
                    raise ValueError(tap.fault)
                ranges.set(tap.tensor, _scalable(self._span(tap)))
            except ValueError as e:
                ranges.missing[tap.tensor] = f"no range: {e}"
        return ranges

    def _span(self, tap: Tap) -> Range:
        span = tap.observer.range()
        return widened(span, tap.values) if self.options.widen else span

    def channels(self) -> dict[str, ChannelStats]:
        """Statistics of the watched tensors with finite values only, after the last feed.

        Sums of moments, the largest part, are freed one by one.
        """
        found = {}
        for tap in self.taps:
            if isinstance(tap.observer, ChannelObserver) and tap.fault is None:
                with suppress(ValueError):  # no values: passes find no statistics
                    _scalable(tap.observer.range())
                    found[tap.tensor] = tap.observer.stats()
                tap.observer.moments = None
        return found

    @property
    def lacks_rows(self) -> bool:
        """True where rows were left out of a shard that belong into a sample of channels."""
        observers = (tap.observer for tap in self.taps if tap.fault is None)
        return any(isinstance(o, ChannelObserver) and o.sample.lacks_rows for o in observers)

    def _observe(self, tap: Tap, arrays: Sequence[Array]) -> None:
        extrema, sums = arrays[:2], arrays[2:]
        finite = all(np.isfinite(a).all() for a in extrema)
        if not finite or any(np.isnan(a).any() for a in sums):
            tap.fault = "NaN or infinity among its values"
        elif isinstance(tap.observer, ChannelObserver) and not tap.observer.fits(extrema[0]):
            tap.fault = VARYING
        elif extrema[0].size:
            tap.observe(extrema[0] if len(extrema) == 1 else np.concatenate(extrema))
            tap.values += len(extrema[0]) * tap.row

    def _groups(self, feed: Feed, taps: Sequence[Tap]) -> Iterator[list[Tap]]:
        """Taps to fetch together: all reduced ones, and as many others as fit the budget."""
        sizes = self._sizes(feed)
        budget, used = self.options.max_memory, 0
        group = [tap for tap in taps if tap.size is None]
        for tap in (t for t in taps if t.size is not None):
            size = sizes[tap.tensor]
            if group and used + size > budget:
                yield group
                group, used = [], 0
            group.append(tap)
            used += size
        if group:
            yield group

    def _sizes(self, feed: Feed) -> dict[str, int]:
        """Bytes of the tensors to fetch, or an upper bound.

        Counted by an extra run, on one sample where the model takes batches of any size. It is
        skipped where the sizes for an earlier feed bound those for this one.
        """
        names = {t.tensor: t.size for t in self.taps if t.size is not None}
        key = tuple((name, array.shape) for name, array in sorted(feed.items()))
        if not names or key in self.counted:
            return self.counted.get(key, {})
        for shapes, known in self.counted.items():
            times = growth(dict(shapes), feed)
            if times and sum(known.values()) * times <= self.options.max_memory:
                return {tensor: size * times for tensor, size in known.items()}
        batch = common_batch(feed) if self.divisible else 1
        counts = self.session.run(first_sample(feed) if batch > 1 else feed, [*names.values()])
        self.counted[key] = {t: int(counts[s]) * _FLOAT_BYTES * batch for t, s in names.items()}
        return self.counted[key]


def _scalable(span: Range) -> Range:
    """The range itself; raises ValueError where no float32 scale represents it."""
    reason = out_of_scale(float(span.lo.min()), float(span.hi.max()))
    if reason:
        raise ValueError(reason)
    return span


def collector(
    graph: Graph,
    requests: Sequence[StatRequest],
    calibrator: Calibrator,
    evaluate: Evaluator,
    options: CollectorOptions | None = None,
    watched: Sequence[str] = (),
    with_moments: Collection[str] = (),
) -> Collector:
    """A collector over the float graph.

    ``watched``: tensors whose channels are sampled, in addition to the ranges of ``requests``.
    ``with_moments``: those of them whose second moments are added up too.
    """
    options = options or CollectorOptions()
    probe = cache(lambda: probed_shapes(graph, evaluate))
    requests = [*requests, *_by_channel(graph, watched, probe)]
    axes = token_axes.find_token_axes(graph, probe) if options.mask else {}
    tensors = graph.tensors()
    model, folder = with_external_weights(graph)
    taps = []
    first_watched = len(requests) - len(watched)
    once = _without_batch(graph, [r.tensor for r in requests], probe)
    for i, request in enumerate(requests):
        chosen = MinMax() if request.extrema else calibrator
        reduced = chosen.needs == "extrema"
        # A scalar has no axis to reduce, and a tensor of unknown rank may be one.
        in_graph = reduced and request.axis is None and bool(rank(tensors[request.tensor]))
        names = _add_extrema(model, graph, request, i) if in_graph else (request.tensor,)
        size = None if in_graph else _add_size(model, request, i)
        rule = chosen if i < first_watched else None
        kind = ObserverKind(rule, request.spec, moments=request.tensor in with_moments)
        observer = kind.make(options.keep)
        token_axis = token_axes.token_axis(axes.get(request.tensor))
        row = _row_length(tensors[request.tensor]) if in_graph else 1
        same = request.tensor in once
        taps.append(Tap(request, token_axis, names, kind, observer, size=size, row=row, once=same))
    wanted = list(dict.fromkeys(o for t in taps for o in (*t.outputs, t.size) if o))
    path = save_proto(with_outputs(model, wanted), folder)
    return Collector(path, taps, options, takes_any_batch(graph), folder=folder)


def _without_batch(graph: Graph, names: Collection[str], probe: Probe) -> set[str]:
    """Those of the tensors that are the same for every part of a batch.

    Their values depend on shapes alone, and a probe shows that no axis grows with the batch.
    """
    candidates = of_shapes(graph).intersection(names)
    if not candidates or not takes_any_batch(graph):
        return set()
    first = graph.inputs[0].name
    return {name for name in candidates if any(_is_constant_in(p, first, name) for p in probe())}


def _is_constant_in(shapes: Mapping[str, Shape], batched: str, name: str) -> bool:
    """True where no size of the tensor is a multiple of the first one of ``batched``, the batch."""
    (batch, *_), sizes = shapes.get(batched) or [None], shapes.get(name)
    if not isinstance(batch, int) or batch < 2 or sizes is None:
        return False
    return all(isinstance(size, int) and size % batch for size in sizes)


def _row_length(tensor: Tensor) -> int:
    """The size of the last axis; 1, a lower bound, where it is open."""
    shape = shape_of(tensor)
    return shape[-1] if shape and isinstance(shape[-1], int) and shape[-1] > 0 else 1


def _by_channel(graph: Graph, names: Sequence[str], probe: Probe) -> list[StatRequest]:
    """Requests for channels: the last axis, or the one before where only that has a fixed size.

    The latter is a key of attention after its transposition.
    """
    tensors = graph.tensors()
    shapes = {name: shape_of(tensors[name]) for name in names}
    known = all(shape and isinstance(shape[-1], int) for shape in shapes.values())
    probes = [] if known else probe()
    requests = []
    for name in names:
        ends = {shape[-2:] for p in probes if (shape := p.get(name))}
        transposed = len({end[-1] for end in ends}) > 1 and len({end[0] for end in ends}) == 1
        axis = -2 if transposed else -1
        requests.append(StatRequest(name, QSpec("uint8", False, granularity="channel", axis=axis)))
    return requests


def collect(
    into: Collector, feeds: Iterable[Feed], on_feed: Callable[[int], None] | None = None
) -> Ranges:
    """Observe all feeds. Raises DataError where there are none."""
    for feed in feeds:
        into.update(feed)
        if on_feed is not None:
            on_feed(into.feeds_seen)
    return final_ranges(into)


def final_ranges(of: Collector) -> Ranges:
    """The ranges after the last feed. Raises DataError where there was none."""
    if of.feeds_seen == 0:
        raise DataError("the calibration data is empty: no feed in it")
    return of.ranges()


def _add_extrema(
    model: onnx.ModelProto, graph: Graph, request: StatRequest, index: int
) -> tuple[str, ...]:
    """Reduce over the last axis: rows stay separate, so that padding can be excluded later."""
    names = []
    for op, since in _REDUCTIONS.items():
        name = f"qcompile/{index}/{op}"
        node = onnx.helper.make_node(op, [request.tensor], [name], name=name, keepdims=0)
        if graph.opset >= since:
            axes = "qcompile/last"
            if not any(t.name == axes for t in model.graph.initializer):
                last = onnx.numpy_helper.from_array(np.array([-1], np.int64), axes)
                model.graph.initializer.append(last)
            node.input.append(axes)
        else:
            node.attribute.append(onnx.helper.make_attribute("axes", [-1]))
        model.graph.node.append(node)
        names.append(name)
    return tuple(names)


def _add_size(model: onnx.ModelProto, request: StatRequest, index: int) -> str:
    name = f"qcompile/{index}/Size"
    model.graph.node.append(onnx.helper.make_node("Size", [request.tensor], [name], name=name))
    return name


def _rows(values: Array, axis: int | None, token_axis: int | None, mask: Array | None) -> Array:
    """Values at real tokens: (n,), or (n, channels) where ``axis`` is that of the channels."""
    if axis is None:
        return _without_padding(values, token_axis, mask).ravel()
    axis %= values.ndim
    if token_axis is not None and token_axis != FLAT and axis <= token_axis:
        token_axis = token_axis - 1 if axis < token_axis else None
    kept = _without_padding(np.moveaxis(values, axis, -1), token_axis, mask)
    return kept.reshape(-1, kept.shape[-1])


def _without_padding(values: Array, token_axis: int | None, mask: Array | None) -> Array:
    """Rows of real tokens; everything where the tensor has no token axis or the mask other rows."""
    if mask is None or token_axis is None or mask.all():
        return values
    rows = values if token_axis == FLAT else np.moveaxis(values, token_axis, 1)
    marked = mask.reshape(-1) if token_axis == FLAT else mask
    if rows.shape[: marked.ndim] != marked.shape:  # a mask of one row, for all samples
        return values
    selected: Array = rows[marked]
    return selected
