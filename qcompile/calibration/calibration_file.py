"""The result of calibration as a file: ranges, reasons for missing ones, statistics of channels.

It holds everything that the rest of a compilation needs of the data, so with it no data is needed.
The file is an .npz (``npz_archive.py``). Tensor names, which may contain any character, are in its
manifest; arrays are numbered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Annotated, Any

import numpy as np

from qcompile.errors import DataError
from qcompile.quant import Array, ChannelStats, Range, Ranges
from qcompile.system import npz_archive
from qcompile.system.json_values import Record, from_json, members

FORMAT, VERSION = "qcompile calibration", 1
# Keys of ``background_extrema`` in the file.
_BACKGROUND_KEYS = ("reach_lo", "reach_hi")


@dataclass(frozen=True)
class CalibrationAccount(Record):
    """How a calibration was made."""

    calibrator: str = ""
    feeds: int = 0
    held_out: Annotated[int, "feeds kept to verify with"] = 0
    tensors: int = 0
    general_text: Annotated[bool, "sentences that ship with qcompile were run too"] = False
    padding_left_out: bool = False
    provider: Annotated[str, "that ran the float model: cpu or cuda"] = "cpu"

    JSON = members(
        "calibrator feeds held_back=held_out tensors general_text padding_left_out provider"
    )


@dataclass(frozen=True)
class Calibration:
    """The result of calibration; ``account`` is the part that the report shows."""

    ranges: Ranges
    channels: dict[str, ChannelStats] = field(default_factory=dict)
    account: CalibrationAccount = CalibrationAccount()

    def covers(self, tensors: set[str]) -> bool:
        """True where each tensor has a range, or a reason to have none."""
        return tensors <= {*self.ranges.found, *self.ranges.missing}

    def copy(self) -> Calibration:
        """A copy for passes: they replace ranges and statistics, but never write into arrays."""
        ranges = Ranges(dict(self.ranges.found), dict(self.ranges.missing))
        return Calibration(ranges, dict(self.channels), self.account)


def write_calibration(file: IO[bytes], calibration: Calibration) -> None:
    """Write to a binary stream; equal calibrations give equal bytes."""
    ranges = sorted(calibration.ranges.found.items())
    channels = sorted(calibration.channels.items())
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "account": calibration.account.to_dict(),
        "ranges": [{"tensor": name, "axis": span.axis} for name, span in ranges],
        "missing": calibration.ranges.missing,
        "channels": [name for name, _ in channels],
    }
    npz_archive.write_archive(file, manifest, _arrays(ranges, channels))


def _arrays(
    ranges: list[tuple[str, Range]], channels: list[tuple[str, ChannelStats]]
) -> Iterator[tuple[str, Array]]:
    """Made one by one: moments are large."""
    for i, (_, span) in enumerate(ranges):
        yield f"range/{i}/lo", span.lo
        yield f"range/{i}/hi", span.hi
    for i, (_, stats) in enumerate(channels):
        for key, values in _members(stats):
            yield f"channels/{i}/{key}", values


def _members(stats: ChannelStats) -> Iterator[tuple[str, Array]]:
    yield from (("lo", stats.lo), ("hi", stats.hi), ("rows", stats.rows))
    if stats.background_extrema is not None:
        yield from zip(_BACKGROUND_KEYS, stats.background_extrema, strict=True)
    if stats.moments is not None and stats.mean is not None:
        yield "moments", stats.moments[_upper(len(stats.moments))]
        yield "mean", stats.mean
        yield "count", np.array(stats.count, np.int64)


def read_calibration(path: Path) -> Calibration:
    """Read a file. Raises DataError where it is missing, damaged, or not a calibration."""
    manifest, arrays = npz_archive.read_archive(path, FORMAT, VERSION)
    try:
        return _calibration(manifest, arrays)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        message = (str(e) or type(e).__name__).splitlines()[0]
        raise DataError(f"{str(path)!r} cannot be read as a {FORMAT}: {message}") from e


def _calibration(manifest: Mapping[str, Any], arrays: Mapping[str, Array]) -> Calibration:
    ranges = {}
    for i, row in enumerate(manifest["ranges"]):
        axis = row["axis"]
        if axis is not None and type(axis) is not int:
            raise ValueError(f"axis {axis!r} is not an integer")
        ranges[str(row["tensor"])] = Range(arrays[f"range/{i}/lo"], arrays[f"range/{i}/hi"], axis)
    missing = {str(k): str(v) for k, v in manifest["missing"].items()}
    channels = {
        str(name): _stats(arrays, f"channels/{i}/") for i, name in enumerate(manifest["channels"])
    }
    account = from_json(CalibrationAccount, manifest["account"])
    return Calibration(Ranges(ranges, missing), channels, account)


def _stats(arrays: Mapping[str, Array], prefix: str) -> ChannelStats:
    lo, hi, rows = (arrays[prefix + k] for k in ("lo", "hi", "rows"))
    background = [arrays[prefix + k] for k in _BACKGROUND_KEYS if prefix + k in arrays]
    if not (lo.ndim == 1 and rows.ndim == 2 and lo.shape == hi.shape == rows.shape[1:]):
        shapes = f"{lo.shape}, {hi.shape} and {rows.shape}"
        raise ValueError(f"statistics of channels have shapes {shapes}")
    if len(background) == 1 or any(a.shape != lo.shape for a in background):
        raise ValueError("background extrema are not two values per channel")
    if any(a.dtype != np.float32 or not np.isfinite(a).all() for a in (lo, hi, rows, *background)):
        raise ValueError("statistics of channels are not finite float32")
    stats = ChannelStats(lo, hi, rows, (background[0], background[1]) if background else None)
    return _with_moments(stats, arrays, prefix) if prefix + "moments" in arrays else stats


def _with_moments(stats: ChannelStats, arrays: Mapping[str, Array], prefix: str) -> ChannelStats:
    packed, mean, count = (arrays[prefix + k] for k in ("moments", "mean", "count"))
    channels = len(stats.lo)
    if packed.shape != (channels * (channels + 1) // 2,) or mean.shape != stats.lo.shape:
        raise ValueError(f"moments of {channels} channels have shape {packed.shape}")
    if any(a.dtype != np.float32 or not np.isfinite(a).all() for a in (packed, mean)):
        raise ValueError("moments are not finite float32")
    if count.shape != () or count.dtype != np.int64 or count < 1:
        raise ValueError(f"moments are of {count} rows")
    moments, upper = np.empty((channels, channels), np.float32), _upper(channels)
    moments[upper] = moments.T[upper] = packed
    if (moments.diagonal() < 0).any():
        raise ValueError("moments are negative")
    return replace(stats, moments=moments, mean=mean, count=int(count))


def _upper(channels: int) -> Array:
    """The half of a symmetric matrix that is written: on and above the diagonal, bool."""
    upper: Array = np.tri(channels, dtype=bool).T
    return upper
