"""Figures of models under load, as ``bench --streams`` prints them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from qcompile.system.json_values import Record, members


@dataclass(frozen=True)
class UnderLoad(Record):
    """One model under load. Rates and the mean wait for a stream are medians over rounds."""

    p99_ms: float
    runs_per_second: float
    samples_per_second: float
    capacity: Annotated[float, "runs per second if requests always waited"]
    queue_ms: float
    waiting: Annotated[int, "requests not yet started at the end of a round, at most"]
    unanswered: Annotated[int, "requests given up after twice the time of a round, all rounds"]
    saturated: Annotated[bool, "requests arrive at the capacity or faster: the queue grows"]
    load_ms: float | None = None
    first_run_ms: float | None = None
    resident: int | None = None
    peak: int | None = None
    ratio: Annotated[float | None, "of runs per second to the reference's, within rounds"] = None
    ratio_low: float | None = None
    ratio_high: float | None = None

    JSON = members(
        "p99_ms runs_per_second samples_per_second capacity queue_ms waiting unanswered saturated "
        "load_ms first_run_ms resident_bytes=resident peak_bytes=peak throughput_ratio=ratio? "
        "throughput_ratio_low=ratio_low? throughput_ratio_high=ratio_high?"
    )


@dataclass(frozen=True)
class ServerSetup(Record):
    """How models were loaded. ``threads`` of each stream are those of the comparison."""

    streams: int
    sessions: Annotated[int, "per model of ONNX Runtime"]
    cores: Annotated[int, "that this process may use"]
    arrival: Annotated[float | None, "requests per second; null: back to back"]
    seconds: Annotated[float, "of load, for each model in each round"]
    seed: int
    feeds: int
    smallest: Annotated[dict[str, list[int]], "sizes of the feeds; the largest are in shapes"]
    floor_ms: Annotated[float, "what a request takes here with a model that does nothing"]
    base: Annotated[int | None, "of a process before it loads a model, not included below"]
    notes: Annotated[list[str], "what makes figures hard to compare"]

    JSON = members(
        "streams sessions cores arrival seconds seed feeds smallest_shapes=smallest floor_ms "
        "base_bytes=base notes"
    )
