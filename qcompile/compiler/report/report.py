"""The report of a compilation: what was asked, done, refused and measured. Serializes to JSON."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Annotated

from qcompile import __version__
from qcompile.calibration.calibration_file import CalibrationAccount
from qcompile.compiler.config.recipe import Recipe
from qcompile.compiler.report import html
from qcompile.compiler.report.channel_views import ChannelSite
from qcompile.compiler.report.ledger import LedgerRow, Summary
from qcompile.compiler.report.notes import Note
from qcompile.compiler.report.records import (
    Forecast,
    SaturationAccount,
    SearchAccount,
    SizeAccount,
    TrainingAccount,
    TuningAccount,
)
from qcompile.ir.quantized_operators import QUANTIZED_LINEARS
from qcompile.planning import Skip
from qcompile.rewriting.instruments import PassRecord
from qcompile.runtime import kernels
from qcompile.runtime.evaluation.closeness import Gates, Verdict
from qcompile.runtime.latency import Comparison
from qcompile.runtime.profiler import Profile
from qcompile.system.json_values import Record, members
from qcompile.system.processor import Environment
from qcompile.targets.target import Mode

# A list of numbers as json.dumps indents it; strings hold no line breaks.
_NUMBER = r"-?\d[\d.eE+-]*"
_NUMBERS = re.compile(rf"\[\n\s+({_NUMBER}(?:,\n\s+{_NUMBER})*)\n\s+\]")


@dataclass(frozen=True)
class Report(Record):
    """All that is known about one compilation."""

    source: str
    target: str
    mode: Mode
    recipe: Recipe
    digest: str
    pipeline: str
    gates: Gates
    qcompile: str = __version__
    environment: Environment = field(default_factory=kernels.environment)
    passes: list[PassRecord] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    ledger: list[LedgerRow] = field(default_factory=list)
    calibration: Annotated[CalibrationAccount | None, "empty in modes without ranges"] = None
    search: Annotated[SearchAccount | None, "empty where there was none"] = None
    sizes: Annotated[SizeAccount | None, "empty without --max-size"] = None
    tuning: Annotated[TuningAccount | None, "empty without --tune"] = None
    training: Annotated[TrainingAccount | None, "empty where the model was not trained"] = None
    float_bytes: int = 0
    float_content: Annotated[list[Summary], "the float model's bytes by kind and type"] = field(
        default_factory=list
    )
    bytes: int = 0
    model_sha256: str = ""
    operators: Annotated[dict[str, int], "of the graph that ONNX Runtime runs"] = field(
        default_factory=dict
    )
    int8_products: int = 0
    provider_missing: Annotated[
        str | None, "what ran the models where the target's own provider is missing"
    ] = None
    requirements: Annotated[
        dict[str, int], "rules of the target, and how many nodes were held to each"
    ] = field(default_factory=dict)
    saturation: SaturationAccount | None = None
    verdict: Verdict | None = None
    forecast: Annotated[Forecast | None, "empty where nothing is timed here"] = None
    speed: Comparison | None = None
    profile: list[Profile] = field(default_factory=list)
    channels: Annotated[
        list[ChannelSite], "what the page of docs/report.md draws; its keys may change"
    ] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    memory: Annotated[dict[str, int], "most bytes of the process until the end of each stage"] = (
        field(default_factory=dict)
    )

    JSON = members(
        "qcompile environment source target mode recipe recipe_digest=digest pipeline gates passed "
        "failures notes=note_texts float_bytes float_content bytes size_ratio model_sha256 "
        "operators int8_linears int8_products away=provider_missing requirements saturation{} "
        "verify=verdict forecast{} bench=speed profile channels calibration{} search{} sizes{} "
        "tuning{} training{} seconds memory passes skips ledger"
    )

    @property
    def passed(self) -> bool:
        """True if no gate failed."""
        return not self.failures

    @property
    def note_texts(self) -> list[str]:
        """The notes as people read them."""
        return [note.text for note in self.notes]

    @property
    def size_ratio(self) -> float:
        """Compiled over original file size."""
        return self.bytes / self.float_bytes if self.float_bytes else 1.0

    @property
    def int8_linears(self) -> int:
        """Int8 matrix multiplications and convolutions by a weight that ONNX Runtime runs."""
        linears = sum(n for op, n in self.operators.items() if op in QUANTIZED_LINEARS)
        return linears - self.int8_products

    def to_json(self) -> str:
        """JSON text; infinities become null, since JSON has none."""
        indented = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        return _NUMBERS.sub(_on_one_line, indented) + "\n"

    def to_html(self) -> str:
        """The report as one HTML file that needs no other file."""
        return html.page(self.to_dict())


def _on_one_line(numbers: re.Match[str]) -> str:
    return "[" + re.sub(r",\s+", ", ", numbers[1]) + "]"


def sha256(data: bytes) -> str:
    """Content hash of a model file."""
    return hashlib.sha256(data).hexdigest()
