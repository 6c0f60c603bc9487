"""Second moments over all rows: sums that no split of the data changes, and what follows them."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qcompile.calibration import calibration_file, resume, second_moments
from qcompile.calibration.calibration_file import Calibration
from qcompile.calibration.channel_observer import ChannelObserver
from qcompile.calibration.collector import Collector, CollectorOptions, collect, collector
from qcompile.calibration.second_moments import MomentSum
from qcompile.calibrators.minmax import MinMax
from qcompile.data.feeds import Feed
from qcompile.errors import DataError
from qcompile.quant import Array, ChannelStats, Ranges
from qcompile.rewriting.testing import normal, parse
from qcompile.runtime.session import evaluate
from qcompile.runtime.spilled_arrays import KeptChannels, Store

Keep = Callable[[Array], Array]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, the last one smaller, and several matrix multiplications."""
    monkeypatch.setattr(second_moments, "_BLOCK", 3)
    monkeypatch.setattr(second_moments, "_ROWS", 16)


@pytest.fixture(params=["memory", "files"])
def keep(request: pytest.FixtureRequest) -> Keep | None:
    return None if request.param == "memory" else Store().array


def summed(*parts: Array, total: MomentSum | None = None) -> MomentSum:
    total = total or MomentSum()
    for part in parts:
        total.add(part)
    return total


def direct(rows: Array) -> Array:
    """The definition, in float64; rows of zeros add nothing."""
    wide = rows.astype(np.float64)
    wide /= np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-300)
    return wide.T @ wide


def near(count: int) -> float:
    """Rounding to the grid moves a value u, at most 1, by 2^-19 at most: a product of two of one
    row by 2 · 2^-19 + 2^-38. The sum is then rounded to float32."""
    return count * (2.0**-18 + 2.0**-38 + 2.0**-24)


def same(one: MomentSum, two: MomentSum) -> bool:
    """All bits of the float64 sums; the mean, a sum of floats in another order, may round the other
    way to float32."""
    found, other = one.total(), two.total()
    exact, expected = (total.state()["second_moments"] for total in (one, two))
    close = bool(np.allclose(found.mean, other.mean, rtol=2.0**-23, atol=1e-12))
    moments = np.array_equal(found.second, other.second) and np.array_equal(exact, expected)
    return moments and found.count == other.count and close


@pytest.mark.parametrize("channels", [1, 3, 7])
@pytest.mark.parametrize("count", [1, 16, 100])
def test_the_sum_is_what_it_says(channels: int, count: int) -> None:
    rows = normal(count, channels) * np.float32(1e20)
    rows[0] = 1e-30
    found = summed(rows).total()
    assert found.second.dtype == found.mean.dtype == np.float32 and found.count == count
    np.testing.assert_allclose(found.second, direct(rows), rtol=0, atol=near(count))
    np.testing.assert_array_equal(found.second, found.second.T)
    np.testing.assert_allclose(found.mean, rows.mean(0, np.float64), rtol=2.0**-23)


def test_rows_of_zeros_add_nothing_to_the_moments_but_count_in_the_mean() -> None:
    rows = normal(20, 5)
    plain, other = summed(rows).total(), summed(rows, np.zeros((20, 5), np.float32)).total()
    np.testing.assert_array_equal(plain.second, other.second)
    assert (plain.count, other.count) == (20, 40)
    np.testing.assert_allclose(other.mean, plain.mean / 2, rtol=2.0**-22)


def test_no_rows_have_no_moments() -> None:
    for nothing in (MomentSum(), summed(np.zeros((0, 4), np.float32))):
        assert nothing.state() == {}
        with pytest.raises(ValueError, match="no values"):
            nothing.total()


@pytest.mark.parametrize("seed", range(6))
def test_no_split_changes_a_bit(seed: int, keep: Keep | None) -> None:
    """Integers below 2^53 are added: the order does not matter, nor do threads or batches."""
    rng = np.random.default_rng(seed)
    rows = normal(120, 7, seed=seed) * np.exp(4 * normal(120, 1, seed=seed + 50))
    whole = summed(rows)
    cuts = np.sort(rng.integers(0, 121, 9))
    parts = np.split(rows, cuts)
    assert same(summed(*parts, total=MomentSum(keep)), whole)
    assert same(summed(*parts[::-1], total=MomentSum(keep)), whole)
    left, right = summed(*parts[:4], total=MomentSum(keep)), summed(*parts[4:])
    left.merge(right)
    left.merge(MomentSum())
    assert same(left, whole) and same(right, summed(*parts[4:]))
    first = MomentSum(keep)
    first.merge(left)
    assert same(first, whole)


def test_sums_without_a_grid_do_depend_on_the_split() -> None:
    """What the grid is for: without it, these rows give other bits in other batches."""
    rows = normal(120, 7)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert not np.array_equal(unit.T @ unit, unit[:50].T @ unit[:50] + unit[50:].T @ unit[50:])


def test_a_restored_sum_goes_on_and_what_was_lent_stays(keep: Keep | None) -> None:
    rows = normal(90, 7)
    first = summed(rows[:40], total=MomentSum(keep))
    early, state = first.total(), first.state()
    held = early.second.copy(), {k: v.copy() for k, v in state.items()}
    resumed = MomentSum(keep)
    resumed.restore(state)
    for one in (resumed, first):
        assert same(summed(rows[40:], total=one), summed(rows))
    np.testing.assert_array_equal(early.second, held[0])
    for name, values in held[1].items():
        np.testing.assert_array_equal(state[name], values)


def test_another_state_is_refused() -> None:
    state = summed(normal(9, 7)).state()
    with pytest.raises(ValueError, match=r"moments of \(7,\) channels have shape"):
        MomentSum().restore({**state, "second_moments": state["second_moments"][1:]})
    with pytest.raises(KeyError):
        MomentSum().restore({"row_sum": state["row_sum"]})


def peak(total: MomentSum, batches: int, channels: int) -> int:
    batch = normal(64, channels)
    summed(batch, total=total)
    tracemalloc.start()
    try:
        summed(*[batch] * batches, total=total)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_rows_and_is_little_more_than_half_a_matrix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(second_moments, "_BLOCK", 32)
    channels = 400
    few, many = peak(MomentSum(), 2, channels), peak(MomentSum(), 40, channels)
    assert many < few + 10_000
    # One row of blocks, and a batch's rows in float64 twice and in float32.
    assert many < 32 * channels * 8 + 64 * channels * 20 + 100_000
    whole = channels * channels * 8
    assert summed(normal(64, channels)).state()["second_moments"].nbytes < 0.55 * whole
    kept = MomentSum(Store().array)  # nothing but pages of files between batches
    before = peak(kept, 2, channels)
    assert before < whole + 64 * channels * 20 + 100_000
    tracemalloc.start()
    try:
        summed(normal(64, channels), total=kept)
        assert tracemalloc.get_traced_memory()[0] < 200_000
    finally:
        tracemalloc.stop()


# Statistics ------------------------------------------------------------------------------------


def stats(rows: Array) -> ChannelStats:
    observer = ChannelObserver(moments=MomentSum())
    observer.update(rows)
    return observer.stats()


def of(found: ChannelStats) -> tuple[Array, Array]:
    assert found.moments is not None and found.mean is not None
    return found.moments, found.mean


@pytest.mark.parametrize("seed", range(5))
def test_permuted_moments_are_those_of_permuted_rows(seed: int) -> None:
    rows, order = normal(50, 7, seed=seed), np.random.default_rng(seed).permutation(7)
    found, expected = stats(rows).permuted(order), stats(rows[:, order])
    for one, two in zip(of(found), of(expected), strict=True):
        np.testing.assert_array_equal(one, two)
    back = found.permuted(np.argsort(order))
    np.testing.assert_array_equal(of(back)[0], of(stats(rows))[0])
    assert back.count == 50


@pytest.mark.parametrize("seed", range(5))
def test_scaled_moments_weigh_rows_by_their_length_before(seed: int) -> None:
    """The error of X f times W / f is that of X times W, so rows count as they did."""
    rows, factor = normal(50, 7, seed=seed), np.exp(normal(7, seed=seed + 9)).astype(np.float32)
    found = stats(rows).scaled(factor)
    exact = direct(rows) * np.outer(factor, factor)
    limit = near(50) * np.outer(factor, factor) + 2.0**-22 * np.abs(exact)  # and two roundings
    assert (np.abs(of(found)[0] - exact) <= limit).all()
    np.testing.assert_array_equal(of(found)[0], of(found)[0].T)
    np.testing.assert_allclose(of(found)[1], of(stats(rows))[1] * factor, rtol=1e-6)
    assert of(found)[0].dtype == of(found)[1].dtype == np.float32
    weight = normal(7, 2)
    error = [np.einsum("io,ij,jo", w, m, w) for w, m in
             ((weight, of(stats(rows))[0]), (weight / factor[:, None], of(found)[0]))]  # fmt: skip
    assert error[1] == pytest.approx(error[0], rel=1e-4)


def test_moments_are_not_asked_for_by_default_and_extrapolation_has_none() -> None:
    observer = ChannelObserver()
    observer.update(normal(40, 3))
    found = observer.stats()
    assert found.moments is found.mean is None and found.count == 0
    assert "second_moments" not in observer.state()
    changed = found.scaled(np.ones(3, np.float32)).permuted(np.arange(3))
    assert changed.moments is changed.mean is None
    assert stats(normal(40, 3)).extrapolated(4).moments is None


def test_observed_background_rows_count_like_those_of_the_data() -> None:
    data, text = normal(30, 5), normal(20, 5, seed=1)
    one, two = ChannelObserver(8, moments=MomentSum()), ChannelObserver(8, moments=MomentSum())
    one.update(data[:10])
    one.update_background(text)
    one.update_background(np.full((3, 5), np.nan, np.float32))
    two.update(data[10:])
    restored = ChannelObserver(8, moments=MomentSum())
    restored.restore(one.state())
    for observer in (one, restored):
        observer.merge(two)
        found = observer.stats()
        np.testing.assert_array_equal(of(found)[0], of(stats(np.concatenate([data, text])))[0])
        assert found.count == 50 and len(found.rows) == 8
    with pytest.raises(KeyError):  # a checkpoint without moments
        ChannelObserver(moments=MomentSum()).restore(plain(data).state())


def plain(rows: Array) -> ChannelObserver:
    observer = ChannelObserver()
    observer.update(rows)
    return observer


def test_kept_statistics_have_moments_in_files() -> None:
    found = stats(normal(40, 7))
    channels = KeptChannels(Store(), {"a": found, "b": replace(found, moments=None)})
    assert channels["b"].moments is None
    assert channels._found["a"][0].moments is None  # not in memory as well
    assert isinstance(channels["a"].moments, np.memmap) and channels["a"].count == 40
    order = np.arange(7)[::-1]
    channels["a"] = channels["a"].permuted(order)
    for one, two in zip(of(channels["a"]), of(found.permuted(order)), strict=True):
        np.testing.assert_array_equal(one, two)


# Files -----------------------------------------------------------------------------------------


def written(path: Path, found: ChannelStats) -> ChannelStats:
    with path.open("wb") as file:
        calibration_file.write_calibration(file, Calibration(Ranges(), {"x": found}))
    return calibration_file.read_calibration(path).channels["x"]


def test_a_calibration_file_holds_moments(tmp_path: Path) -> None:
    found = stats(normal(40, 7))
    read = written(tmp_path / "c.npz", found)
    for one, two in zip(of(read), of(found), strict=True):
        np.testing.assert_array_equal(one, two)
    assert read.count == 40
    first = (tmp_path / "c.npz").read_bytes()
    written(tmp_path / "again.npz", read)
    assert (tmp_path / "again.npz").read_bytes() == first
    assert written(tmp_path / "none.npz", replace(found, moments=None, mean=None)).moments is None


UNSOUND = {
    "moments of 7 channels have shape": {"moments": normal(27)},
    "moments of 7 channels": {"mean": normal(6)},
    "not finite float32": {"moments": np.full(28, np.nan, np.float32)},
    "are not finite": {"mean": np.zeros(7)},
    "moments are of 0 rows": {"count": np.array(0)},
    "moments are of": {"count": np.array(1.5)},
    "negative": {"moments": np.full(28, -1, np.float32)},
}


@pytest.mark.parametrize("said", UNSOUND)
def test_unsound_moments_are_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    members = calibration_file._members

    def changed(found: ChannelStats) -> Iterator[tuple[str, Array]]:
        for key, values in members(found):
            yield key, UNSOUND[said].get(key, values)

    monkeypatch.setattr(calibration_file, "_members", changed)
    with pytest.raises(DataError, match=said):
        written(tmp_path / "c.npz", stats(normal(40, 7)))


# Collector -------------------------------------------------------------------------------------

MODEL = """g (float[N,T,4] x, int64[N,T] attention_mask) => (float[N,T,3] y) {
    h = MatMul(x, v) y = MatMul(h, w)
}"""


def feeds(*shapes: tuple[int, int]) -> list[Feed]:
    made = []
    for seed, (batch, length) in enumerate(shapes):
        mask = np.ones((batch, length), np.int64)
        mask[0, length - 2 :] = 0
        x = normal(batch, length, 4, seed=seed)
        x[mask == 0] = 1e6  # padding, which would show
        made.append({"x": x, "attention_mask": mask})
    return made


def ready(max_memory: int = 1 << 27, keep: Keep | None = None) -> Collector:
    graph = parse(MODEL, v=np.eye(4, dtype=np.float32), w=normal(4, 3))
    options = CollectorOptions(max_memory, threads=1, keep=keep)
    return collector(graph, [], MinMax(), evaluate, options, ["h", "y"], ["h"])


def kept_rows(*data: Feed) -> Array:
    return np.concatenate([f["x"][f["attention_mask"] == 1] for f in data])


@pytest.mark.parametrize("max_memory", [1 << 27, 300], ids=["whole", "split"])
def test_collected_moments_leave_padding_out_and_take_the_background_in(
    max_memory: int, keep: Keep | None
) -> None:
    data, (text,) = feeds((2, 6), (3, 5)), feeds((2, 7))
    found = ready(max_memory, keep)
    collect(found, data)
    found.update_background(text)
    channels = found.channels()
    expected = stats(kept_rows(*data, text))  # h is x
    np.testing.assert_array_equal(of(channels["h"])[0], of(expected)[0])
    np.testing.assert_allclose(of(channels["h"])[1], of(expected)[1], rtol=1e-5)
    assert channels["h"].count == len(kept_rows(*data, text))
    assert channels["y"].moments is None


def test_a_checkpoint_of_calibration_holds_moments(tmp_path: Path) -> None:
    data = feeds((2, 6), (3, 5), (1, 9))
    whole, first, resumed = ready(), ready(), ready()
    collect(whole, data)
    collect(first, data[:2])
    observed = resume.states(first)
    assert observed is not None
    with (tmp_path / "s.npz").open("wb") as file:
        resume.write_states(file, first, observed)
    resume.restore(resumed, resume.read_states(tmp_path / "s.npz"))
    collect(resumed, data[2:])
    found, expected = resumed.channels()["h"], whole.channels()["h"]
    np.testing.assert_array_equal(of(found)[0], of(expected)[0])
    assert found.count == expected.count
