"""The report of a compilation: what was asked, done, refused and measured. Serializes to JSON."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

from qcompile import __version__
from qcompile.calibration.calibration_file import CalibrationAccount
from qcompile.compiler.cluster.account import ClusterAccount
from qcompile.compiler.config.recipe import Recipe
from qcompile.compiler.report import html
from qcompile.compiler.report.channel_views import ChannelSite
from qcompile.compiler.report.html import units
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
from qcompile.ir.quantized_operators import QUANTIZED_CONVOLUTIONS, QUANTIZED_LINEARS
from qcompile.planning import Skip
from qcompile.rewriting.instruments import PassRecord
from qcompile.runtime import kernels
from qcompile.runtime.evaluation.closeness import Gates, Verdict
from qcompile.runtime.latency import Comparison
from qcompile.runtime.notebook_table import html_table
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
    cluster: Annotated[ClusterAccount | None, "empty without --workers and --cluster"] = None
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
    next_steps: Annotated[list[str], "what may help where a gate failed, three at most"] = field(
        default_factory=list
    )
    seconds: dict[str, float] = field(default_factory=dict)
    memory: Annotated[dict[str, int], "most bytes of the process until the end of each stage"] = (
        field(default_factory=dict)
    )

    JSON = members(
        "qcompile environment source target mode recipe recipe_digest=digest pipeline gates passed "
        "failures next_steps notes=note_texts float_bytes float_content bytes size_ratio "
        "model_sha256 operators int8_linears int8_products away=provider_missing requirements "
        "saturation{} verify=verdict forecast{} bench=speed profile channels calibration{} "
        "search{} sizes{} tuning{} training{} cluster{} seconds memory passes skips ledger"
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

    @property
    def int8_convolutions(self) -> int:
        """How many of them are convolutions."""
        return sum(n for op, n in self.operators.items() if op in QUANTIZED_CONVOLUTIONS)

    @property
    def headline(self) -> str:
        """The result in one line."""
        size = f"{units.size(self.bytes)}, {units.percent(self.size_ratio)} of float"
        facts = [f"{self.source}: {self.target}, {self.mode}", size]
        if self.speed is not None and len(self.speed.timings) > 1:
            facts.append(f"{1 / self.speed.ratio(1).median:.2f}x as fast")
        if self.verdict is not None:
            facts.append(self.verdict.headline)
        failed = units.count(len(self.failures), "failure")
        return "; ".join([*facts, "passed" if self.passed else failed])

    def __repr__(self) -> str:
        return f"<Report {self.headline}>"

    def _repr_html_(self) -> str:
        """The headline table, for notebooks."""
        title = f"{self.source}: target {self.target}, {self.mode}"
        notes = [*(f"gate failed: {failure}" for failure in self.failures), *self.note_texts]
        return html_table(title, ("figure", "float", "compiled"), self._rows(), notes)

    def _rows(self) -> Iterator[tuple[str, str, str]]:
        new = f"{units.size(self.bytes)} ({units.percent(self.size_ratio)})"
        yield "file size", units.size(self.float_bytes), new
        if self.speed is not None and len(self.speed.timings) > 1:
            before, after = (units.milliseconds(t.median) for t in self.speed.timings[:2])
            speed_up = 1 / self.speed.ratio(1).median
            yield "latency, median", before, f"{after} ({speed_up:.2f}x)"
        for output in self.verdict.outputs if self.verdict is not None else ():
            yield f"cosine of {output.name!r}, mean", "1", units.cosine(output.mean_cosine)
            yield f"cosine of {output.name!r}, worst", "1", units.cosine(output.worst_cosine)
        if self.verdict is not None:
            yield "samples compared", "", str(self.verdict.samples)

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
