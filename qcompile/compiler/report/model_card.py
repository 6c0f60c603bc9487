"""The model card of a compiled folder, README.md, from its reports and the float model's card.

Keys of the front matter: https://huggingface.co/docs/hub/model-cards. What the float model's card
says in its text is about the float model, so the card links to it in place of repeating it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from qcompile import __version__
from qcompile.compiler.report.report import Report
from qcompile.system.safe_yaml import load_yaml
from qcompile.targets.runtime_versions import OLDEST

CARD = "README.md"
_RANDOM, _NEWER_RUNTIME = "made-up-inputs", "oldest-runtime"  # codes of notes
_KEPT = (
    "language", "license", "license_name", "license_link", "library_name", "pipeline_tag", "tags",
    "datasets",
)  # fmt: skip
MOST = 1 << 16  # characters of a card that are read for its front matter
_FENCE = "---"
_SENTENCE_TRANSFORMERS = "sentence-transformers"
_ORT_CLASS = {"AutoModel": "ORTModelForFeatureExtraction"}  # others differ by Auto alone
_HEADER = ("file", "for", "size", "of float", "cosine, mean", "worst", "latency", "speed-up")


@dataclass(frozen=True)
class CardFacts:
    """What the card needs besides the reports.

    name: of the folder. repository: on the hub, to which it is uploaded, or None. base_model: the
    float model's name on the hub, or None. float_card: text of its README.md, "" without one. task,
    auto_class: by the names of optimum and transformers, None if unknown. embeds_sentences: for a
    folder of sentence-transformers.
    """

    name: str
    repository: str | None
    base_model: str | None
    float_card: str
    task: str | None
    auto_class: str | None
    embeds_sentences: bool


@dataclass(frozen=True)
class CardRow:
    """One file. dtype: by which transformers.js loads it, "" for none."""

    file: str
    purpose: str
    dtype: str
    report: Report


def model_card(facts: CardFacts, rows: Sequence[CardRow]) -> str:
    """The text of README.md, with its front matter."""
    front = yaml.safe_dump(_front(facts), sort_keys=False, allow_unicode=True)
    parts = [
        f"{_FENCE}\n{front}{_FENCE}",
        f"# {facts.name}",
        _origin(facts),
        _table(rows),
        "\n".join(_measured(rows)),
        "## How to load",
        *_loading(facts, rows),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def front_matter(card: str) -> dict[str, Any]:
    """The metadata at the top of a model card; empty where there are none that can be read."""
    lines = card[:MOST].lstrip("\ufeff").splitlines()
    if not lines or lines[0].strip() != _FENCE:
        return {}
    end = next((i for i, line in enumerate(lines[1:], 1) if line.strip() == _FENCE), None)
    if end is None:
        return {}
    try:
        found = load_yaml("\n".join(lines[1:end]))
    except ValueError:
        return {}
    return {str(k): v for k, v in found.items()} if isinstance(found, dict) else {}


def _front(facts: CardFacts) -> dict[str, Any]:
    """The float card's keys that hold for this model too, and what the model was made from."""
    old = front_matter(facts.float_card)
    front = {key: old[key] for key in _KEPT if key in old}
    if facts.embeds_sentences:
        front.setdefault("library_name", _SENTENCE_TRANSFORMERS)
        front.setdefault("pipeline_tag", "sentence-similarity")
    elif facts.task is not None:
        front.setdefault("pipeline_tag", facts.task)
    tags = front.get("tags") or []
    listed = [str(tag) for tag in (tags if isinstance(tags, list) else [tags])]
    front["tags"] = list(dict.fromkeys([*listed, "onnx", "qcompile"]))
    if facts.base_model is not None:
        front["base_model"] = facts.base_model
    front["base_model_relation"] = "quantized"
    return front


def _origin(facts: CardFacts) -> str:
    base = facts.base_model
    source = f"[{base}](https://huggingface.co/{base})" if base else "a float model"
    about = (
        f" Its card says what the model is for and what its limits are: {source}." if base else ""
    )
    return f"ONNX files made from {source} by qcompile {__version__}.{about}"


def _table(rows: Iterable[CardRow]) -> str:
    lines = [_cells(_HEADER), _cells("---" for _ in _HEADER)]
    return "\n".join([*lines, *(_cells(_figures(row)) for row in rows)])


def _cells(texts: Iterable[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


def _figures(row: CardRow) -> tuple[str, ...]:
    report, speed = row.report, row.report.speed
    purpose = row.purpose or f"{report.target}, {report.mode}"
    compared = [o for o in (report.verdict.outputs if report.verdict else ()) if not o.exact]
    cosines = ("", "")
    if compared:
        least = (min(o.mean_cosine for o in compared), min(o.worst_cosine for o in compared))
        cosines = (f"{least[0]:.4f}", f"{least[1]:.4f}")
    times = ("", "")
    if speed is not None and report.provider_missing is None:
        old, new = (timing.median for timing in speed.timings)
        times = (f"{new:.2f} ms, float {old:.2f}", f"{1 / speed.ratio(1).median:.2f}")
    size = (f"{report.bytes / 1e6:.1f} MB", f"{report.size_ratio:.0%}")
    return (f"`{row.file}`", purpose, *size, *cosines, *times)


def _measured(rows: Sequence[CardRow]) -> list[str]:
    """How the figures were measured, once for each way."""
    found = [_closeness(row.report) for row in rows] + [_speed(row.report) for row in rows]
    found += [_task_metric(row) for row in rows] + [_padding(row.report) for row in rows]
    found += [f"Needs onnxruntime {OLDEST} or later.", *map(_newer_runtime, rows)]
    return [f"- {text}" for text in dict.fromkeys(found) if text]


def _closeness(report: Report) -> str:
    if report.verdict is None:
        return "Not compared with the float model."
    random = any(note.code == _RANDOM for note in report.notes)
    return (
        f"Closeness: cosine to the float model's output, on {report.verdict.samples} "
        f"{'random inputs' if random else 'samples'}; of several outputs the least close."
    )


def _speed(report: Report) -> str:
    speed, about = report.speed, report.environment
    if speed is None or report.provider_missing is not None:
        return ""
    shapes = ", ".join(f"{name} {shape}" for name, shape in list(speed.shapes.items())[:1])
    isa = f" with {about.isa[0]}" if about.isa else ""
    return (
        f"Latency: median of a run, {shapes}, threads: {speed.threads}, {about.machine}{isa}, "
        f"onnxruntime {about.onnxruntime}. Another processor has other figures."
    )


def _task_metric(row: CardRow) -> str:
    training = row.report.training
    if training is None or training.metric is None:
        return ""
    found = training.metric
    return (
        f"Trained with quantization in the loop. {found.name} on {found.samples} samples: "
        f"{found.compiled:.2f}, float {found.float:.2f}."
    )


def _padding(report: Report) -> str:
    if not any(note.code == "padding-skipped" for note in report.notes):
        return ""
    return (
        "Padded positions of a batch are skipped: the output there repeats the last real token "
        "before it. Ignore these positions by attention_mask, as pooling does."
    )


def _newer_runtime(row: CardRow) -> str:
    text = next((note.text for note in row.report.notes if note.code == _NEWER_RUNTIME), "")
    return f"`{row.file}`: {text}." if text else ""


def _loading(facts: CardFacts, rows: Sequence[CardRow]) -> list[str]:
    """Code for each library that finds one of the files."""
    place, first = facts.repository or facts.name, rows[0]
    found = [("ONNX Runtime", "python", _RUNTIME, first.file)]
    if first.report.recipe.pooling == "":  # else it returns what no other library expects
        found = [*_libraries(facts, rows), *found]
    return [
        part
        for library, language, text, file in found
        for part in (f"{library}:", _code(language, text, place, file))
    ]


def _libraries(facts: CardFacts, rows: Sequence[CardRow]) -> Iterator[tuple[str, str, str, str]]:
    """Library, language, code and file."""
    first, web = rows[0], next((row for row in rows if row.dtype), None)
    if _front(facts).get("library_name") == _SENTENCE_TRANSFORMERS:
        pairs = facts.task == "text-classification" and not facts.embeds_sentences
        yield _SENTENCE_TRANSFORMERS, "python", _PAIRS if pairs else _SENTENCES, first.file
    elif facts.auto_class is not None:
        name = _ORT_CLASS.get(facts.auto_class, facts.auto_class.replace("Auto", "ORT", 1))
        bare = PurePosixPath(first.file).name  # optimum looks into folders, and takes no path
        yield "optimum", "python", _OPTIMUM.replace("CLASS", name), bare
    if web is not None and facts.task is not None:
        text = _WEB.replace("DTYPE", web.dtype).replace("TASK", facts.task)
        yield "transformers.js", "js", text, web.file


def _code(language: str, text: str, place: str, file: str) -> str:
    quoted = text.replace('"PLACE"', json.dumps(place)).replace('"FILE"', json.dumps(file))
    return f"```{language}\n{quoted}```"


_SENTENCES = """\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("PLACE", backend="onnx", model_kwargs={"file_name": "FILE"})
vectors = model.encode(["a sentence"])
"""
_PAIRS = """\
from sentence_transformers import CrossEncoder

model = CrossEncoder("PLACE", backend="onnx", model_kwargs={"file_name": "FILE"})
scores = model.predict([("a question", "a passage")])
"""
_OPTIMUM = """\
from optimum.onnxruntime import CLASS

model = CLASS.from_pretrained("PLACE", file_name="FILE")
"""
_WEB = """\
import { pipeline } from "@huggingface/transformers";

const run = await pipeline("TASK", "PLACE", { dtype: "DTYPE" });
"""
_RUNTIME = """\
import onnxruntime

session = onnxruntime.InferenceSession("FILE")
"""
