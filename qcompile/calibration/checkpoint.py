"""Calibration that is not finished, as a file: what each observer has seen of the feeds so far."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from qcompile.calibration.collector import Collector
from qcompile.errors import DataError
from qcompile.quant.affine import Array
from qcompile.system import npz_archive

FORMAT, VERSION = "qcompile checkpoint", 1
Checkpoint = tuple[dict[str, Any], dict[str, Array]]


def states(made: Collector) -> list[dict[str, Array]] | None:
    """Of all observers; None where one of them keeps none."""
    found = [tap.observer.state() for tap in made.taps]
    known = [state for state in found if state is not None]
    return known if len(known) == len(found) else None


def write(file: IO[bytes], made: Collector, known: list[dict[str, Array]]) -> None:
    """Write to a binary stream what the collector knows between two feeds."""
    shapes = [[[[n, list(s)] for n, s in key], sizes] for key, sizes in made.counted.items()]
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "feeds": made.feeds_seen,
        "tensors": [tap.tensor for tap in made.taps],
        "faults": [tap.fault for tap in made.taps],
        "counted": shapes,  # how feeds are divided depends on it
    }
    arrays = {f"{i}/{name}": a for i, state in enumerate(known) for name, a in state.items()}
    npz_archive.write(file, manifest, arrays)


def read(path: Path) -> Checkpoint:
    """Manifest and arrays. Raises DataError where the file is missing, damaged or another's."""
    return npz_archive.read(path, FORMAT, VERSION)


def restore(made: Collector, found: Checkpoint) -> None:
    """Bring a fresh collector to where the checkpoint was.

    Raises DataError where it is another's; the collector is spoilt then.
    """
    manifest, arrays = found
    try:
        if manifest["tensors"] != [tap.tensor for tap in made.taps]:
            raise ValueError("it is of other tensors")
        for i, (tap, fault) in enumerate(zip(made.taps, manifest["faults"], strict=True)):
            tap.observer.restore(_own(arrays, f"{i}/"))
            tap.fault = str(fault)
        for key, sizes in manifest["counted"]:
            shapes = tuple((str(n), tuple(map(int, s))) for n, s in key)
            made.counted[shapes] = {str(t): int(size) for t, size in sizes.items()}
        made.feeds_seen = int(manifest["feeds"])
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise DataError(f"a checkpoint of calibration does not fit: {e}") from e


def _own(arrays: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
