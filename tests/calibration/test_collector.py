"""Collected ranges are those of the values that count: real tokens, finite, of every feed."""

from __future__ import annotations

import tracemalloc
import weakref
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pytest

from qcompile.calibration import collector as collect_module
from qcompile.calibration.collector import Collector, CollectorOptions, collect, collector
from qcompile.calibrators.entropy import Entropy
from qcompile.calibrators.minmax import MinMax
from qcompile.calibrators.moving_average import MovingAverage
from qcompile.calibrators.percentile import Percentile
from qcompile.errors import DataError
from qcompile.ir import Graph
from qcompile.ir.model_io.to_proto import to_proto
from qcompile.quant import Array, Calibrator, QSpec, Ranges, StatRequest, widened
from qcompile.rewriting.testing import normal, parse
from qcompile.runtime.session import Session, SessionOptions, evaluate, with_outputs

UINT8 = QSpec("uint8", symmetric=False)
CHANNELS = QSpec("int8", symmetric=True, granularity="channel", axis=-1)
Feed = dict[str, Array]


class Values(MinMax):
    """Min-max that wants to see all values: the other path through the collector."""

    needs = "values"


BOTH = pytest.mark.parametrize("calibrator", [MinMax(), Values()], ids=["extrema", "values"])


def encoder(opset: int = 17) -> Graph:
    """Two heads of attention without the softmax; token axes 1, 2, flat and none."""
    pooled = "ReduceMean<keepdims = 0>(h, axes)"
    if opset < 18:
        pooled = "ReduceMean<axes = [1], keepdims = 0>(h)"
    return parse(
        f"""g (float[B,S,4] x, int64[B,S] attention_mask) => (float[B,S,4] y)
        <int64[4] split = {{0, 0, 2, 2}}, int64[2] rows = {{-1, 4}}, int64[3] back = {{0, 0, 4}},
         float half = {{0.5}}, int64[1] axes = {{1}}> {{
            h = MatMul(x, w) r = Reshape(h, split)
            heads = Transpose<perm = [0, 2, 1, 3]>(r) keys = Transpose<perm = [0, 2, 3, 1]>(r)
            scores = MatMul(heads, keys) scaled = Mul(scores, half)
            flat = Reshape(h, rows) pooled = {pooled}
            mixed = MatMul(scaled, heads) z = Transpose<perm = [0, 2, 1, 3]>(mixed)
            y = Reshape(z, back)
        }}""",
        opset,
        w=normal(4, 4),
    )


def feeds(*shapes: tuple[int, int], seed: int = 0) -> list[Feed]:
    """Batches whose last tokens are padding, which holds huge values."""
    rng = np.random.default_rng(seed)
    found: list[Feed] = []
    for batch, length in shapes:
        mask = np.ones((batch, length), np.int64)
        mask[0, length - length // 3 :] = 0
        x = rng.standard_normal((batch, length, 4)).astype(np.float32)
        x[mask == 0] *= 1000
        found.append({"x": x, "attention_mask": mask})
    return found


SHAPES = ((2, 6), (3, 9), (1, 4))
TENSORS = ("x", "h", "heads", "scores", "flat", "pooled", "y")


def requests(*names: str, spec: QSpec = UINT8) -> list[StatRequest]:
    return [StatRequest(name, spec) for name in names]


def made(
    graph: Graph,
    names: Sequence[str] = TENSORS,
    calibrator: Calibrator | None = None,
    spec: QSpec = UINT8,
    max_memory: int = 1 << 30,
    mask: bool = True,
    widen: bool = False,
) -> Collector:
    chosen = CollectorOptions(max_memory, mask, threads=1, widen=widen)
    return collector(graph, requests(*names, spec=spec), calibrator or MinMax(), evaluate, chosen)


def bounds(ranges: Ranges) -> dict[str, tuple[float, float]]:
    return {name: (float(span.lo), float(span.hi)) for name, span in ranges.found.items()}


def recorded(graph: Graph, names: Sequence[str], data: Sequence[Feed]) -> list[dict[str, Array]]:
    tapped = with_outputs(to_proto(graph), names).SerializeToString()
    session = Session(tapped, SessionOptions(threads=1))
    return [session.run(feed) for feed in data]


def real(name: str, values: Array, mask: Array) -> Array:
    """Rows of real tokens, by hand, last axis kept."""
    if name in ("x", "h", "y"):
        values = values[mask == 1]
    if name in ("heads", "scores"):
        values = values.transpose(0, 2, 1, 3)[mask == 1]
    if name == "flat":
        values = values[mask.ravel() == 1]
    return values.reshape(-1, values.shape[-1])


@BOTH
@pytest.mark.parametrize("opset", [12, 17, 18])
def test_ranges_are_the_extrema_of_real_tokens(calibrator: Calibrator, opset: int) -> None:
    """Of several lengths; axes of reductions are attributes or inputs with the opset."""
    graph, data = encoder(opset), feeds(*SHAPES)
    found = bounds(collect(made(graph, calibrator=calibrator), data))
    runs = recorded(graph, TENSORS, data)
    for name in TENSORS:
        rows = [
            real(name, run[name], f["attention_mask"]) for run, f in zip(runs, data, strict=True)
        ]
        values = np.concatenate([r.ravel() for r in rows])
        assert found[name] == (values.min(), values.max()), name


def test_the_two_paths_agree_per_channel_too() -> None:
    names = ("x", "h", "heads", "flat", "pooled", "y")
    data, graph = feeds(*SHAPES), encoder()
    found = collect(made(graph, names, spec=CHANNELS), data)
    runs = recorded(graph, names, data)
    for name in names:
        rows = [
            real(name, run[name], f["attention_mask"]) for run, f in zip(runs, data, strict=True)
        ]
        values = np.concatenate(rows)
        span = found.found[name]
        assert np.array_equal(span.lo, values.min(axis=0)), name
        assert np.array_equal(span.hi, values.max(axis=0)), name


@pytest.mark.parametrize("axis", [1, -3, 3, -1])
def test_channels_on_either_side_of_the_tokens(axis: int) -> None:
    """heads is [batch, head, token, value]: padding goes, whichever axis holds the channels."""
    spec = QSpec("int8", symmetric=True, granularity="channel", axis=axis)
    data, graph = feeds(*SHAPES), encoder()
    span = collect(made(graph, ["heads"], spec=spec), data).found["heads"]
    values = [
        np.moveaxis(run["heads"], 2, 1)[f["attention_mask"] == 1]
        for run, f in zip(recorded(graph, ["heads"], data), data, strict=True)
    ]
    rest = (0, 2) if axis in (1, -3) else (0, 1)
    assert np.array_equal(span.lo, np.concatenate(values).min(axis=rest))


def test_the_first_axis_may_hold_the_channels() -> None:
    graph = parse("g (float[3,N] x) => (float[3,N] y) { y = Neg(x) }")
    spec = QSpec("int8", symmetric=True, granularity="channel", axis=0)
    data = [{"x": np.array([[1, 2], [3, 9], [5, 6]], np.float32)}]
    assert collect(made(graph, ["y"], spec=spec), data).found["y"].hi.tolist() == [-1, -3, -5]


@BOTH
def test_padding_counts_where_it_is_asked_to(calibrator: Calibrator) -> None:
    data = feeds(*SHAPES)
    found = bounds(collect(made(encoder(), ["x"], calibrator, mask=False), data))
    assert found["x"][1] == max(f["x"].max() for f in data) > 500


@BOTH
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", range(5))
def test_one_bad_value_is_a_reason_and_spares_the_others(
    calibrator: Calibrator, bad: float, place: int
) -> None:
    """Wherever it stands: ONNX Runtime's ReduceMin sees NaN in the first place alone."""
    graph = parse(
        """g (float[N,5] x) => (float[N,5] a, float[N,5] b) {
            a = Neg(x) n = IsNaN(x) i = IsInf(x) o = Or(n, i) b = Cast<to = 1>(o) }"""
    )
    x = np.ones((4, 5), np.float32)
    x[2, place] = bad
    found = collect(made(graph, ["a", "b"], calibrator), [{"x": x[:2]}, {"x": x}])
    assert found.missing == {"a": "no range: NaN or infinity among its values"}
    assert bounds(found)["b"] == (0, 1)


@BOTH
def test_bad_values_of_padding_do_not_count(calibrator: Calibrator) -> None:
    (data,) = feeds((2, 6))
    data["x"][data["attention_mask"] == 0] = np.nan
    found = collect(made(encoder(), ["x", "h", "flat"], calibrator), [data])
    assert found.missing == {}


def test_one_probe_alone_proves_no_token_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all sizes are 1, every axis looks like every other."""
    ones = {"x": (1, 1, 4), "attention_mask": (1, 1)}
    monkeypatch.setattr(collect_module, "probed_shapes", lambda *_: [{}, {}, ones])
    assert [t.token_axis for t in made(encoder(), ["x"]).taps] == [None]


def test_tensors_without_values_say_so() -> None:
    graph = parse("g (float[N,2] x) => (float[N,2] y) { y = Neg(x) }")
    found = collect(made(graph, ["y"]), [{"x": np.empty((0, 2), np.float32)}])
    assert found.missing == {"y": "no range: no values seen"}


def test_scalars_have_a_range() -> None:
    graph = parse(
        "g (float[N,2] x) => (float s, float[N,2] y) { s = ReduceMax<keepdims = 0>(x) y = Neg(x) }"
    )
    data = [{"x": np.full((2, 2), v, np.float32)} for v in (1.0, 7.0, -2.0)]
    assert bounds(collect(made(graph, ["s", "y"]), data))["s"] == (-2, 7)


@BOTH
@pytest.mark.parametrize("count", [2, 400])
def test_ranges_of_few_values_are_widened(calibrator: Calibrator, count: int) -> None:
    """8 values of a feed, in rows of 4: both paths count values, not rows."""
    graph = parse("g (float[2,4] x) => (float[2,4] y) { y = Neg(x) }")
    rng = np.random.default_rng(0)
    data = [{"x": rng.standard_normal((2, 4)).astype(np.float32)} for _ in range(count)]
    seen = collect(made(graph, ["y"], calibrator=calibrator), data).found["y"]
    found = collect(made(graph, ["y"], calibrator=calibrator, widen=True), data).found["y"]
    expected = widened(seen, 8 * count)
    assert (found.lo, found.hi) == (expected.lo, expected.hi)
    assert (found.hi > seen.hi) == (count == 2)


@pytest.mark.parametrize("calibrator", [Values(), Percentile(), Entropy()], ids=lambda c: c.name)
def test_groups_within_a_budget_give_the_same_ranges(calibrator: Calibrator) -> None:
    data = feeds(*SHAPES)
    whole = bounds(collect(made(encoder(), calibrator=calibrator), data))
    tight = made(encoder(), calibrator=calibrator, max_memory=3 * 2 * 9 * 9 * 4)
    groups = [len(g) for g in tight._groups(data[1], tight.taps)]
    assert sum(groups) == len(TENSORS) and len(groups) > 1
    assert bounds(collect(tight, data)) == whole


def test_no_group_exceeds_the_budget_whatever_the_length() -> None:
    """Scores grow with the square of the length: a first short feed says little of a long one."""
    budget = 4096
    tight = made(encoder(), calibrator=Values(), max_memory=budget)
    fetched: list[int] = []
    run = tight.session.run

    def watched(feed: Mapping[str, Array], names: Sequence[str] | None = None) -> dict[str, Array]:
        values = run(feed, names)
        fetched.append(sum(v.nbytes for v in values.values() if v.dtype == np.float32))
        return values

    tight.session.run = watched  # type: ignore[method-assign]
    collect(tight, feeds((1, 4), (2, 16), (1, 20)))
    assert max(fetched) <= budget


def test_batches_are_split_until_they_fit() -> None:
    data = feeds((8, 8))
    whole = bounds(collect(made(encoder(), calibrator=Values()), data))
    tight = made(encoder(), calibrator=Values(), max_memory=2 * 2 * 8 * 8 * 4)
    found = bounds(collect(tight, data))
    for name, ends in whole.items():  # the runtime may add in another order for another batch
        assert found[name] == pytest.approx(ends, rel=1e-5)
    assert tight.feeds_seen == 1


@pytest.mark.parametrize("spec", [UINT8, CHANNELS])
def test_a_divided_batch_is_one_to_a_moving_average(spec: QSpec) -> None:
    data = feeds((8, 8), (2, 5), seed=1)
    rule, names = MovingAverage(), ("x", "h", "y")
    whole = collect(made(encoder(), names, rule, spec), data)
    options = CollectorOptions(threads=1, widen=False, parts=halves)
    into = collector(encoder(), requests(*names, spec=spec), rule, evaluate, options)
    divided = collect(into, data)
    for name in names:
        one, other = whole.found[name], divided.found[name]
        np.testing.assert_allclose(one.lo, other.lo, rtol=1e-5)  # of batches of another size
        np.testing.assert_allclose(one.hi, other.hi, rtol=1e-5)


def halves(feed: Feed) -> list[Feed]:
    middle = len(feed["x"]) // 2
    return [{n: v[part] for n, v in feed.items()} for part in (slice(middle), slice(middle, None))]


def with_positions() -> Graph:
    """Positions (1, S, 4), the same for all samples, and one that is copied for each sample."""
    return parse(
        """g (float[B,S,4] x) => (float[B,S,4] y)
        <int64[1] zero = {0}, int64[1] one = {1}, int64 row = {0}> {
            size = Shape(x) rest = Slice(size, one, two) length = Slice(rest, zero, one)
            positions = Slice(table, zero, length, one)
            ones = ConstantOfShape<value = float[1] {1.0}>(size) first = Mul(ones, corner)
            moved = Add(x, positions) y = Add(moved, first)
        }""",
        17,
        two=np.array([2], np.int64),
        table=normal(1, 64, 4),
        corner=normal(1, 1, 4, seed=3),
    )


@pytest.mark.parametrize(
    "calibrator", [Values(), Percentile(), MovingAverage()], ids=lambda c: c.name
)
def test_parts_of_a_batch_count_what_they_share_once(calibrator: Calibrator) -> None:
    rng = np.random.default_rng(0)
    data = [{"x": rng.standard_normal((n, s, 4)).astype(np.float32)} for n, s in ((4, 40), (1, 9))]
    names = ("positions", "first")

    def seen(max_memory: int) -> tuple[dict[str, tuple[float, float]], dict[str, list[object]]]:
        options = CollectorOptions(max_memory, threads=1)
        into = collector(with_positions(), requests(*names), calibrator, evaluate, options, names)
        found = bounds(collect(into, data))
        for feed in data:
            into.update_background(feed)
        rows = {name: stats.rows.tolist() for name, stats in into.channels().items()}
        return found, rows

    whole, tight = seen(1 << 30), seen(2 * 2 * 40 * 4 * 4)
    assert tight == whole
    assert len(whole[1]["positions"]) == 40 + 9
    assert len(whole[1]["first"]) == 4 * 40 + 9  # as many as there are samples


def test_what_was_fetched_goes_as_it_is_observed() -> None:
    """Where two observers read one tensor it stays for the second."""
    roomy = made(encoder(), ("x", "h", "h", "y"), Values())
    fetched: list[weakref.ref[Array]] = []
    run = roomy.session.run

    def watched(feed: Mapping[str, Array], names: Sequence[str] | None = None) -> dict[str, Array]:
        values = run(feed, names)
        fetched[:] = [weakref.ref(v) for v in values.values()]
        return values

    roomy.session.run = watched  # type: ignore[method-assign]
    (feed,) = feeds((2, 6))
    left = []
    for _tap, kept in roomy._fetch([feed], roomy.taps):
        kept.clear()
        left.append(sum(ref() is not None for ref in fetched))
    assert left == [2, 2, 1, 0]


def test_feeds_that_a_bound_says_will_fit_are_not_counted() -> None:
    roomy = made(encoder(), calibrator=Values())
    runs: list[Sequence[str]] = []
    run = roomy.session.run

    def watched(feed: Mapping[str, Array], names: Sequence[str] | None = None) -> dict[str, Array]:
        runs.append(names or ())
        return run(feed, names)

    roomy.session.run = watched  # type: ignore[method-assign]
    collect(roomy, feeds((2, 8), (4, 9), (1, 16)))
    assert len(runs) == 1 + 3  # sizes once, then each feed


def test_one_sample_over_the_budget_is_an_error() -> None:
    tight = made(encoder(), calibrator=Values(), max_memory=500)
    with pytest.raises(DataError, match=r"tensor 'scores' has 512 bytes .*--max-memory 500"):
        collect(tight, feeds((1, 8)))


def test_reduced_tensors_need_no_budget() -> None:
    collect(made(encoder(), max_memory=1), feeds((4, 64)))


def test_no_feed_is_an_error() -> None:
    with pytest.raises(DataError, match="the calibration data is empty"):
        collect(made(encoder()), [])


def test_progress_counts_feeds() -> None:
    seen: list[int] = []
    collect(made(encoder()), feeds(*SHAPES), seen.append)
    assert seen == [1, 2, 3]


@pytest.mark.parametrize("calibrator", [MinMax(), Percentile(bins=256)], ids=lambda c: c.name)
def test_memory_does_not_grow_with_the_number_of_feeds(calibrator: Calibrator) -> None:
    def stream(count: int) -> Iterator[Feed]:
        for i in range(count):
            yield from feeds((4, 64), seed=i)  # over 100 KB of scores each

    def peak(count: int) -> int:
        ready = made(encoder(), calibrator=calibrator)
        collect(ready, stream(2))
        tracemalloc.start()
        try:
            collect(ready, stream(count))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak(3), peak(30)
    assert many < few + 200_000


def test_the_graph_is_left_alone() -> None:
    graph = encoder()
    before = to_proto(graph).SerializeToString(deterministic=True)
    collect(made(graph), feeds((2, 6)))
    assert to_proto(graph).SerializeToString(deterministic=True) == before


@BOTH
def test_background_text_changes_watched_channels_only(calibrator: Calibrator) -> None:
    """Ranges, extrema and the sample are those of the data; padding does not count here either."""
    data, (text,) = feeds((2, 6), (3, 5)), feeds((2, 7), seed=7)
    text = {**text, "x": text["x"] * 3}
    plain, other = (
        collector(encoder(), [StatRequest("h", UINT8)], calibrator, evaluate, watched=["h"])
        for _ in range(2)
    )
    before, after = collect(plain, data), collect(other, data)
    other.update_background(text)
    assert other.feeds_seen == 2 and vars(after.found["h"]) == vars(before.found["h"])
    stats, alone = other.channels()["h"], plain.channels()["h"]
    np.testing.assert_array_equal(stats.hi, alone.hi)
    np.testing.assert_array_equal(stats.rows, alone.rows)
    h = text["x"][text["attention_mask"] == 1] @ normal(4, 4)
    assert stats.background_extrema is not None and alone.background_extrema is None
    np.testing.assert_allclose(
        stats.background_extrema, (h.min(0), h.max(0)), rtol=1e-5
    )  # float32 sums of 4


def test_channels_are_the_last_axis_of_fixed_size() -> None:
    """Two channels of a transposed key; scores have none, and say nothing."""
    graph = encoder()
    ready = collector(
        graph, [], MinMax(), evaluate, CollectorOptions(mask=False), watched=["h", "keys", "scores"]
    )
    data = feeds(*SHAPES)
    collect(ready, data)
    found = ready.channels()
    assert list(found) == ["h", "keys"]
    session = Session(with_outputs(to_proto(graph), ["h", "keys"]).SerializeToString())
    keys = np.concatenate([session.run(f)["keys"].max((0, 1, 3))[None] for f in data])
    assert found["keys"].hi.tolist() == keys.max(0).tolist()
    assert found["keys"].rows.shape[1] == 2 and found["h"].rows.shape[1] == 4


def test_another_number_of_channels_in_background_text_is_a_fault() -> None:
    """The last axis of scores is as long as the text: no channels, whatever the data's lengths."""
    graph, (first, second, _) = encoder(), feeds(*SHAPES)
    for seen_first in (True, False):
        chosen = CollectorOptions(1 << 30, threads=1)
        found = collector(graph, [], MinMax(), evaluate, chosen, watched=("scores", "h"))
        if seen_first:
            found.update(first)
        else:
            found.update_background(first)
        found.update_background(second)
        if not seen_first:
            found.update(second)
        assert set(found.channels()) == {"h"}
