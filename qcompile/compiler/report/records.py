"""The parts of a report that stages and searches provide, each with its JSON keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, TypeAlias

from qcompile.runtime.evaluation.agreement import Agreement
from qcompile.runtime.evaluation.int16_saturation import Saturation
from qcompile.system.json_values import Record, Unbounded, members

Limit: TypeAlias = float | None
Share: TypeAlias = float | None


@dataclass(frozen=True)
class Forecast(Record):
    """The speed-up predicted before any work, with the machine's instruction set."""

    isa: str
    gain: Annotated[float, "of int8 over float in matrix multiplications and convolutions"]
    share: Annotated[float, "of float's time in matrix multiplications and convolutions"]
    speedup: Annotated[float, "of compiled over float"]

    JSON = members("isa gain share speedup summary")

    @property
    def summary(self) -> str:
        """The same in words."""
        gain = f"up to {self.gain:.2g} times as fast in int8"
        return (
            f"about {self.speedup:.1f}x: matrix multiplications and convolutions take "
            f"{self.share:.0%} of float's time, {self.isa} runs them {gain}"
        )


@dataclass(frozen=True)
class BoundCost:
    """What it costs that no int8 sum can saturate: rounding noise over that of plain 8 bits.

    Predicted from scales; the ledger has it for each tensor (``bound_db``).
    """

    tensors: Annotated[int, "weights and activations whose values are bounded"]
    mean_db: float
    worst_db: float
    worst: Annotated[str, "the tensor with the largest cost"]
    avoided_by: Annotated[str, "key of a recipe, for a model that runs where sums are exact"]


@dataclass(frozen=True)
class SaturationAccount:
    """Whether outputs are the same on x86 without VNNI (docs/processors.md)."""

    isa: Annotated[str, "that the model is compiled for"]
    same_without_vnni: Annotated[bool, "by bound; false also where no bound is known, see rows"]
    linears: int
    can_saturate: Annotated[int, "of these operators"]
    did_saturate: Annotated[int, "of these operators, on the samples looked at"]
    advice: Annotated[str, "empty where outputs are the same"]
    rows: list[Saturation]
    cost: Annotated[BoundCost | None, "of the bound; null where nothing is bounded"] = None


@dataclass(frozen=True)
class RankedItem:
    """One item of a search, by the error of the outputs where it alone is quantized."""

    item: str
    role: str
    layer: int | None
    error_alone: Annotated[float | None, "null: there was no time to measure it"]


@dataclass(frozen=True)
class RaisedItem:
    """One item whose precision a search raised."""

    item: str
    error_alone: float | None


@dataclass(frozen=True)
class SearchAccount(Record):
    """What a search for tensors to raise did."""

    items: int
    measurements: int
    compilations: int
    ranking: Annotated[list[RankedItem], "the most sensitive first"]
    raised: list[RaisedItem]

    JSON = members("items measurements compilations ranking lifted=raised")


@dataclass(frozen=True)
class WidthDrop:
    """What a weight costs at a width: the outputs' closeness where it alone has that width."""

    bits: int
    error: Annotated[float, "1 - cosine, or half of 1 - R² if that is more"]
    worst_cosine: float


@dataclass(frozen=True)
class WeightDrops:
    """What one weight costs at several widths, the one that it has without precision first."""

    item: str
    role: str
    layer: int | None
    measured: list[WidthDrop]


@dataclass(frozen=True)
class WeightBits:
    """The bits that a search chose for one weight."""

    item: str
    role: str
    layer: int | None
    bits: int
    bytes: Annotated[int, "of its integers in the file, by arithmetic"]
    measured: Annotated[list[WidthDrop], "also at its bits without --max-size"]


@dataclass(frozen=True)
class SizePoint:
    """One model that was compiled and verified on the way."""

    bytes: int
    mean_cosine: Annotated[float | None, "of the worst output; null if nothing was compared"]
    worst_cosine: float | None
    latency_ratio: Annotated[float | None, "compiled over float; null if nothing was timed"]
    passed: Annotated[bool, "the accuracy gates"]
    chosen: bool


@dataclass(frozen=True)
class SizeAccount:
    """What ``--max-size`` measured, compiled and chose."""

    limit: Annotated[int, "most bytes"]
    measurements: int
    compilations: int
    weights: Annotated[list[WeightBits], "the most sensitive first"]
    points: Annotated[list[SizePoint], "the smallest first"]


@dataclass(frozen=True)
class Trial:
    """One choice of lowering against the best so far: the ratio of their times, its interval."""

    form: str
    choice: str
    ratio: Annotated[float | None, "null where it is the same graph"]
    low: float | None
    high: float | None
    kept: bool


@dataclass(frozen=True)
class TuningAccount:
    """What ``--tune`` timed, and on which input shapes."""

    shapes: dict[str, list[int]]
    trials: Annotated[list[Trial], "each other choice, timed against the best so far"]


@dataclass(frozen=True)
class TrainingPoint:
    """One evaluation of the training."""

    step: Annotated[int, "0: calibrated, not trained"]
    epoch: float
    loss: Annotated[float | None, "mean over the steps since the last point"]
    metric: Unbounded


@dataclass(frozen=True)
class Untrained:
    """A tensor whose range stayed as it was calibrated."""

    tensor: str
    reason: str


@dataclass(frozen=True)
class TrainingMetric:
    """The metric of the task on the evaluation data, times 100, of each form of the model.

    Where the data has no labels, the mean cosine to the float model's answers.
    """

    name: str
    samples: int
    float: Annotated[Unbounded, "of the float model"]
    calibrated: Annotated[Unbounded, "quantized by calibration alone"]
    trained: Annotated[Unbounded, "of the torch module with trained quantizers"]
    compiled: Annotated[Unbounded, "of the file that is written"]
    drop: Annotated[Unbounded, "points, float minus compiled"]
    max_drop: Annotated[Limit, "the gate; null if it is off"]
    flips: Annotated[
        Share,
        "share of texts or tokens that the file puts into another class than the float model; null "
        "where the model has no classes",
    ] = None


@dataclass(frozen=True)
class TrainingAccount:
    """What ``train`` learned, and how closely the file repeats the torch module."""

    objective: str
    distilled: Annotated[bool, "from the float model alone, without labels"]
    device: str
    torch: Annotated[str, "its version"]
    seconds: float
    steps: int
    best_step: Annotated[int, "whose state was kept, the best on the evaluation data"]
    batch_size: int
    learning_rate: float
    range_rate: float
    seed: int
    weights: Annotated[int, "constants that were trained, quantized or not"]
    ranges: Annotated[int, "scales and zero points that were trained"]
    untrained: list[Untrained]
    curve: list[TrainingPoint]
    float_agreement: Annotated[Agreement, "the float model in torch and in ONNX Runtime"]
    agreement: Annotated[Agreement | None, "trained module and file; null if not verified"] = None
    metric: Annotated[TrainingMetric | None, "null if not verified"] = None
