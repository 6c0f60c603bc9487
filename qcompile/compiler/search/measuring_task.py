"""Scores of a fake-quantized model as work items: a set of switches each, on all feeds.

At most 32 samples are held out to measure on, so an item is not divided any further: its score is
computed as it would be here, in one loop over the feeds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qcompile.compiler.cluster.workers import Kit, Site, Task
from qcompile.compiler.search.sensitivity import Meter, Score
from qcompile.quant import Array
from qcompile.system.temporary_folder import TemporaryFolder

_REFERENCE = "reference"


class Measured(NamedTuple):
    """An item: switches that are on, and how many samples, 0 for all."""

    on: frozenset[int]
    samples: int


@dataclass(frozen=True)
class _Open:
    """Loads both models in a worker. ``model`` has neither its file nor its arrays.

    arrays: files of the values on and off, by the name of the input.
    """

    meter: Meter
    proto: str
    arrays: Mapping[str, tuple[int, str, str]]
    reference: str | bytes

    def __call__(self, site: Site) -> Callable[[Measured], Score]:
        def load(name: str) -> Array:
            values: Array = np.load(site.files[name], mmap_mode="r")
            return values

        arrays = {n: (i, load(on), load(off)) for n, (i, on, off) in self.arrays.items()}
        model = replace(self.meter.model, proto=site.files[self.proto].read_bytes(), arrays=arrays)
        given = self.reference
        reference = given if isinstance(given, bytes) else site.files[given]
        options = replace(self.meter.options, threads=site.threads)
        meter = replace(self.meter, model=model, reference=reference, options=options)
        return lambda item: meter(item.on, item.samples)


@dataclass
class MeasuringTask(Task[Measured, Score]):
    """Scores by one meter."""

    meter: Meter

    def here(self, item: Measured) -> Score:
        """Measure in this process."""
        return self.meter(item.on, item.samples)

    def kit(self) -> Kit:
        """Both models: the reference as its files, the other with its arrays in files."""
        folder, model = self._folder, self.meter.model
        proto = folder.path / "switched.onnx"
        proto.write_bytes(model.proto)
        files, arrays = {proto.name: proto}, {}
        for number, (name, (switch, *values)) in enumerate(model.arrays.items()):
            places = [folder.path / f"{number}-{which}.npy" for which in ("on", "off")]
            for place, value in zip(places, values, strict=True):
                if not place.exists():
                    np.save(place, value)
            files |= {place.name: place for place in places}
            arrays[name] = switch, places[0].name, places[1].name
        reference, more = _files_of(self.meter.reference, self.meter.external)
        bare = self.meter.without_models()
        return Kit(files | more, _Open(bare, proto.name, arrays, reference))

    def label(self, item: Measured) -> str:
        """The switches, as far as they are few."""
        listed = ", ".join(map(str, sorted(item.on)[:3]))
        more = ", …" if len(item.on) > 3 else ""
        return f"measurement of quantizers {listed}{more}"

    @cached_property
    def _folder(self) -> TemporaryFolder:
        return TemporaryFolder()


def measured(on: Collection[int], samples: int) -> Measured:
    """The item of these switches."""
    return Measured(frozenset(on), samples)


def _files_of(
    model: bytes | Path, external: Collection[Path]
) -> tuple[str | bytes, dict[str, Path]]:
    """The model's name and its files, by paths relative to its folder."""
    if isinstance(model, bytes):
        return model, {}
    root = model.resolve().parent
    paths = [model.resolve(), *(p.resolve() for p in external)]
    names = {f"{_REFERENCE}/{p.relative_to(root).as_posix()}": p for p in paths}
    return f"{_REFERENCE}/{model.name}", names
