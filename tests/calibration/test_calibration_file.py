"""A calibration survives being written: equal values, equal bytes, and nothing unsound comes in."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompile.calibration import calibration_file
from qcompile.calibration.calibration_file import FORMAT, Calibration, CalibrationAccount
from qcompile.errors import DataError
from qcompile.quant import Array, ChannelStats, Range, Ranges
from qcompile.rewriting.testing import normal
from qcompile.system import npz_archive


def stats(channels: int = 3, rows: int = 5) -> ChannelStats:
    sample = normal(rows, channels)
    return ChannelStats(sample.min(0), sample.max(0), sample)


def made() -> Calibration:
    ranges = Ranges(
        {
            "x/é": Range(np.array(-0.1), np.array(1 / 3)),
            "w": Range(np.array([-1.0, 0.0]), np.array([1.5, 2.0]), -1),
        },
        {"dead": "no range: no values seen"},
    )
    far = replace(stats(), background_extrema=(stats().lo * 2, stats().hi * 3))
    channels = {"x/é": stats(), "empty": stats(2, 1), "far": far}
    return Calibration(ranges, channels, CalibrationAccount(feeds=3))


def packed(value: Calibration) -> bytes:
    stream = io.BytesIO()
    calibration_file.write_calibration(stream, value)
    return stream.getvalue()


def test_round_trip_is_exact(tmp_path: Path) -> None:
    path = tmp_path / "c.npz"
    path.write_bytes(packed(made()))
    found = calibration_file.read_calibration(path)
    assert packed(found) == packed(made())
    assert (
        found.account == CalibrationAccount(feeds=3)
        and found.ranges.missing == made().ranges.missing
    )
    for name, span in made().ranges.found.items():
        read = found.ranges.found[name]
        assert (read.lo.tolist(), read.hi.tolist(), read.axis) == (
            span.lo.tolist(), span.hi.tolist(), span.axis,
        )  # fmt: skip
    np.testing.assert_array_equal(found.channels["x/é"].rows, stats().rows)
    assert (
        found.channels["x/é"].background_extrema is None
        and found.channels["far"].background_extrema is not None
    )
    np.testing.assert_array_equal(
        found.channels["far"].background_extrema, made().channels["far"].background_extrema
    )


def test_order_of_entry_does_not_show() -> None:
    one, two = made(), made()
    two.channels["x/é"] = two.channels.pop("x/é")
    assert list(one.channels) != list(two.channels) and packed(one) == packed(two)


def test_covers_and_copy() -> None:
    one = made()
    assert one.covers({"w", "dead"}) and not one.covers({"w", "unknown"})
    other = one.copy()
    other.ranges.drop("w")
    other.channels.clear()
    assert one.ranges.get("w") is not None and one.channels


def swapped(key: str, value: Any) -> Callable[[dict[str, Any], dict[str, Array]], None]:
    def change(manifest: dict[str, Any], arrays: dict[str, Array]) -> None:
        (arrays if key in arrays else manifest)[key] = value

    return change


UNSOUND = [
    (swapped("ranges", [{"tensor": "x"}]), "axis"),
    (swapped("ranges", [{"tensor": "x", "axis": "0"}]), "not an integer"),
    (swapped("ranges", 3), "not iterable"),
    (swapped("missing", []), "items"),
    (swapped("channels", ["a", "b", "c", "d"]), "channels/3/lo"),
    (swapped("account", None), "expected an object"),
    (swapped("range/0/lo", np.array([np.nan, 0.0])), "NaN"),
    (swapped("range/0/lo", np.array([9.0, 9.0])), "inverted"),
    (swapped("range/0/lo", np.array(["a", "b"])), "could not convert"),
    (swapped("channels/0/rows", np.zeros((2, 9), np.float32)), "shapes"),
    (swapped("channels/0/rows", np.zeros((2, 2))), "not finite float32"),
    (swapped("channels/0/lo", np.array([np.inf, 0], np.float32)), "not finite float32"),
    (swapped("channels/1/reach_lo", np.zeros(2, np.float32)), "two values per channel"),
    (swapped("channels/1/reach_hi", np.full(3, np.nan, np.float32)), "not finite float32"),
]


@pytest.mark.parametrize(("change", "said"), UNSOUND)
def test_unsound_contents_are_one_error(
    tmp_path: Path, change: Callable[[dict[str, Any], dict[str, Array]], None], said: str
) -> None:
    path = tmp_path / "c.npz"
    path.write_bytes(packed(made()))
    manifest, arrays = npz_archive.read_archive(path, FORMAT, calibration_file.VERSION)
    change(manifest, arrays)
    with path.open("wb") as file:
        npz_archive.write_archive(file, manifest, arrays.items())
    with pytest.raises(DataError, match=f"cannot be read as a {FORMAT}") as caught:
        calibration_file.read_calibration(path)
    assert said in str(caught.value)
