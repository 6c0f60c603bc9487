"""What calibration found, as a value that can be kept: ranges, reasons, samples of channels.

Everything that the rest of a compilation needs of the data is in it, so whoever has it needs no
data. The file is an .npz (``archive.py``); names of tensors, which may hold anything, stand in its
manifest, and arrays are numbered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any

import numpy as np

from qcompile.errors import DataError
from qcompile.quant import Array, ChannelStats, Range, Ranges
from qcompile.system import npz_archive
from qcompile.system.json_values import read

FORMAT, VERSION = "qcompile calibration", 1
_REACH = ("reach_lo", "reach_hi")


@dataclass(frozen=True)
class CalibrationAccount:
    """How a calibration was made."""

    calibrator: str = ""
    feeds: int = 0
    held_back: Annotated[int, "feeds kept to verify with"] = 0
    tensors: int = 0
    general_text: Annotated[bool, "sentences that ship with qcompile were run too"] = False
    padding_left_out: bool = False


@dataclass(frozen=True)
class Calibration:
    """What calibration found; ``account`` is what the report says of it."""

    ranges: Ranges
    channels: dict[str, ChannelStats] = field(default_factory=dict)
    account: CalibrationAccount = CalibrationAccount()

    def covers(self, tensors: set[str]) -> bool:
        """True where each tensor has a range, or a reason to have none."""
        return tensors <= {*self.ranges.found, *self.ranges.missing}

    def copy(self) -> Calibration:
        """Safe from passes, which enter other ranges and channels but never write into arrays."""
        ranges = Ranges(dict(self.ranges.found), dict(self.ranges.missing))
        return Calibration(ranges, dict(self.channels), self.account)


def write_calibration(file: IO[bytes], made: Calibration) -> None:
    """Write to a binary stream; equal calibrations are equal bytes."""
    arrays: dict[str, Array] = {}
    ranges, channels = sorted(made.ranges.found.items()), sorted(made.channels.items())
    for i, (_, span) in enumerate(ranges):
        arrays |= {f"range/{i}/lo": span.lo, f"range/{i}/hi": span.hi}
    for i, (_, stats) in enumerate(channels):
        arrays |= {f"channels/{i}/{k}": getattr(stats, k) for k in ("lo", "hi", "rows")}
        if stats.reach is not None:
            arrays |= {f"channels/{i}/{k}": a for k, a in zip(_REACH, stats.reach, strict=True)}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "account": asdict(made.account),
        "ranges": [{"tensor": name, "axis": span.axis} for name, span in ranges],
        "missing": made.ranges.missing,
        "channels": [name for name, _ in channels],
    }
    npz_archive.write_archive(file, manifest, arrays)


def read_calibration(path: Path) -> Calibration:
    """Read a file. Raises DataError where it is missing, damaged, or no calibration."""
    manifest, arrays = npz_archive.read_archive(path, FORMAT, VERSION)
    try:
        return _calibration(manifest, arrays)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        said = (str(e) or type(e).__name__).splitlines()[0]
        raise DataError(f"{str(path)!r} cannot be read as a {FORMAT}: {said}") from e


def _calibration(manifest: Mapping[str, Any], arrays: Mapping[str, Array]) -> Calibration:
    found = {}
    for i, row in enumerate(manifest["ranges"]):
        axis = row["axis"]
        if axis is not None and type(axis) is not int:
            raise ValueError(f"axis {axis!r} is no number")
        found[str(row["tensor"])] = Range(arrays[f"range/{i}/lo"], arrays[f"range/{i}/hi"], axis)
    missing = {str(k): str(v) for k, v in manifest["missing"].items()}
    channels = {
        str(name): _stats(arrays, f"channels/{i}/") for i, name in enumerate(manifest["channels"])
    }
    account = read(CalibrationAccount, manifest["account"])
    return Calibration(Ranges(found, missing), channels, account)


def _stats(arrays: Mapping[str, Array], prefix: str) -> ChannelStats:
    lo, hi, rows = (arrays[prefix + k] for k in ("lo", "hi", "rows"))
    reach = [arrays[prefix + k] for k in _REACH if prefix + k in arrays]
    if not (lo.ndim == 1 and rows.ndim == 2 and lo.shape == hi.shape == rows.shape[1:]):
        shapes = f"{lo.shape}, {hi.shape} and {rows.shape}"
        raise ValueError(f"statistics of channels have shapes {shapes}")
    if len(reach) == 1 or any(a.shape != lo.shape for a in reach):
        raise ValueError("the reach of channels is not two values each")
    if any(a.dtype != np.float32 or not np.isfinite(a).all() for a in (lo, hi, rows, *reach)):
        raise ValueError("statistics of channels are not finite float32")
    return ChannelStats(lo, hi, rows, (reach[0], reach[1]) if reach else None)
