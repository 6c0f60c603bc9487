"""The account of a compilation: what was asked, done, refused, measured. Serialises to JSON."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from qcompile import __version__
from qcompile.compiler.report import html
from qcompile.compiler.report.ledger import LedgerRow, Summary, to_dicts
from qcompile.compiler.report.notes import Note
from qcompile.ir.quantized_operators import QUANTIZED_LINEARS
from qcompile.planning import Skip
from qcompile.rewriting.instruments import PassRecord
from qcompile.runtime.evaluation.closeness import Gates, Verdict
from qcompile.runtime.latency import Comparison
from qcompile.runtime.profiler import Profile
from qcompile.system.json_values import finite
from qcompile.system.processor import describe

# A list of numbers as json.dumps indents it; strings hold no line breaks.
_NUMBER = r"-?\d[\d.eE+-]*"
_NUMBERS = re.compile(rf"\[\n\s+({_NUMBER}(?:,\n\s+{_NUMBER})*)\n\s+\]")


@dataclass
class Report:
    """Everything a reader may ask of one compilation."""

    source: str
    target: str
    mode: str
    recipe: dict[str, Any]
    digest: str
    pipeline: str
    gates: Gates
    passes: list[PassRecord] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    ledger: list[LedgerRow] = field(default_factory=list)
    calibration: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    tuning: dict[str, Any] = field(default_factory=dict)
    float_bytes: int = 0
    float_content: list[Summary] = field(default_factory=list)
    bytes: int = 0
    model_sha256: str = ""
    operators: dict[str, int] = field(default_factory=dict)
    int8_products: int = 0
    away: str = ""  # what ran the models where the target's own provider is missing
    requirements: dict[str, int] = field(default_factory=dict)  # rule -> nodes held to it
    saturation: dict[str, Any] = field(default_factory=dict)
    verdict: Verdict | None = None
    forecast: dict[str, Any] = field(default_factory=dict)
    speed: Comparison | None = None
    profile: list[Profile] = field(default_factory=list)
    channels: list[dict[str, Any]] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)  # most bytes until the end of each stage

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
        """Integer products and convolutions with a weight in the graph that ONNX Runtime runs."""
        found = sum(n for op, n in self.operators.items() if op in QUANTIZED_LINEARS)
        return found - self.int8_products

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "qcompile": __version__,
            "environment": describe(),
            "source": self.source,
            "target": self.target,
            "mode": self.mode,
            "recipe": self.recipe,
            "recipe_digest": self.digest,
            "pipeline": self.pipeline,
            "gates": asdict(self.gates),
            "passed": not self.failures,
            "failures": self.failures,
            "notes": self.note_texts,
            "float_bytes": self.float_bytes,
            "float_content": [asdict(s) for s in self.float_content],
            "bytes": self.bytes,
            "size_ratio": self.size_ratio,
            "model_sha256": self.model_sha256,
            "operators": dict(sorted(self.operators.items())),
            "int8_linears": self.int8_linears,
            "int8_products": self.int8_products,
            "away": self.away or None,
            "requirements": self.requirements,
            "saturation": self.saturation,
            "verify": self.verdict.to_dict() if self.verdict else None,
            "forecast": self.forecast,
            "bench": self.speed.to_dict() if self.speed else None,
            "profile": [p.to_dict() for p in self.profile],
            "channels": self.channels,
            "calibration": self.calibration,
            "search": self.search,
            "tuning": self.tuning,
            "seconds": self.seconds,
            "memory": self.memory,
            "passes": [asdict(p) for p in self.passes],
            "skips": [asdict(s) for s in self.skips],
            "ledger": to_dicts(self.ledger),
        }

    def to_json(self) -> str:
        """JSON text; infinities become null, since JSON has none."""
        indented = json.dumps(self.plain(), indent=1, allow_nan=False)
        return _NUMBERS.sub(_on_one_line, indented) + "\n"

    def to_html(self) -> str:
        """A page that shows all of it and needs nothing else."""
        return html.page(self.plain())

    def plain(self) -> Any:
        """``to_dict`` with infinities as None."""
        return finite(self.to_dict())


def _on_one_line(numbers: re.Match[str]) -> str:
    return "[" + re.sub(r",\s+", ", ", numbers[1]) + "]"


def sha256(data: bytes) -> str:
    """Content hash of a model file."""
    return hashlib.sha256(data).hexdigest()
