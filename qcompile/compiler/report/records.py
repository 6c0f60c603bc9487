"""The parts of a report that stages and searches hand over, each as its JSON shows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from qcompile.runtime.evaluation.int16_saturation import Saturation
from qcompile.system.json_values import Record, members


@dataclass(frozen=True)
class Forecast(Record):
    """What was expected of the speed before any work, with the machine's instruction set."""

    isa: str
    gain: Annotated[float, "of integers over float in products"]
    share: Annotated[float, "of float's time in products"]
    speedup: Annotated[float, "of compiled over float"]

    JSON = members("isa gain share speedup summary")

    @property
    def summary(self) -> str:
        """The same in words."""
        share, gain = f"{self.share:.0%} of float's time", f"up to {self.gain:.2g} times as fast"
        return f"about {self.speedup:.1f}x: products take {share}, {self.isa} does them {gain}"


@dataclass(frozen=True)
class SaturationAccount:
    """Whether answers are the same on x86 without VNNI (docs/processors.md)."""

    isa: Annotated[str, "that the model is compiled for"]
    same_without_vnni: bool
    linears: int
    can_saturate: Annotated[int, "of the linears"]
    did_saturate: Annotated[int, "of the linears, on the samples looked at"]
    advice: Annotated[str, "empty where answers are the same"]
    rows: list[Saturation]


@dataclass(frozen=True)
class RankedItem:
    """One item of a search, by the error of the outputs where it alone is quantized."""

    item: str
    role: str
    layer: int | None
    error_alone: Annotated[float | None, "null: there was no time to measure it"]


@dataclass(frozen=True)
class LiftedItem:
    """One item that a search gave more bits."""

    item: str
    error_alone: float | None


@dataclass(frozen=True)
class SearchAccount:
    """What a search for tensors to lift did."""

    items: int
    measurements: int
    compilations: int
    ranking: Annotated[list[RankedItem], "the most sensitive first"]
    lifted: list[LiftedItem]


@dataclass(frozen=True)
class Trial:
    """One form against the best so far: the ratio of their times, and its interval."""

    form: str
    choice: str
    ratio: Annotated[float | None, "null where it is the same graph"]
    low: float | None
    high: float | None
    kept: bool


@dataclass(frozen=True)
class TuningAccount:
    """What ``--tune`` timed, in which shapes of the inputs."""

    shapes: dict[str, list[int]]
    trials: Annotated[list[Trial], "each other form, timed beside the best so far"]
