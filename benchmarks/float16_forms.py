"""What float16 costs, form by form and model by model, on machines without a GPU.

    python -m benchmarks.float16_forms FOLDER [--match GLOB] [--json FILE]

FOLDER: any tree of .onnx files, as for benchmarks/robustness/battery.py. Each is compiled on random
inputs in every form with float16: ``cuda`` in modes float and weight-only, ``tensorrt`` and ``qdq``
in mode static with ``--float16``.

nodes: compute nodes that the target's rules were checked on. A node that has no CUDA kernel, or
breaks a rule of TensorRT, is an error, which stands in the row in place of the figures.
float16: share of the float results that are float16; the report names the reason for each other.
cosine: of the outputs to those of the same model, with the same integers and scales, that has
float32 between the integers; every float16 result is rounded. Mean and worst sample.
noise, last bits: the mean cosine, where random noise takes the place of that rounding: of the size
of float16's rounding, and of float32's. A cosine as low in "noise" is what any rounding of that
size does between these integers; one as low in "last bits" parts any two kernels in float32.
to float32: mean cosine of the same outputs to those of the float32 model; without: the same for the
form without ``--float16``.
bytes: of the file, with float16 over without; for cuda over the float32 model.

Prints a table, and in how many rows every node met the rules; exit code 1 if a form is an error or
under --min-cosine (default .9999, mean), or if there is no row.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

import qcompile
from benchmarks._rounding_noise import FLOAT16, FLOAT32, with_noise
from benchmarks.robustness._battery_feeds import BatteryFeeds, random_feeds
from benchmarks.robustness.battery import listed
from models._common import fail
from qcompile import Gates, Options, QCompileError
from qcompile.compiler.stages.models import in_float32
from qcompile.data.feeds import Feed
from qcompile.quant import Array
from qcompile.runtime.evaluation.closeness import Closeness, judge
from qcompile.runtime.evaluation.float16_emulation import rounding_form
from qcompile.runtime.session import Session, SessionOptions, version

_OPEN = Gates(**dict.fromkeys(Gates.__dataclass_fields__))
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
_RULES = ("kernels", "operators")  # of cuda and tensorrt, each checked on every compute node


@dataclass(frozen=True)
class Form:
    """A target, a mode, and whether float16 is asked for or comes with the target."""

    target: str
    mode: str
    asked: bool

    @property
    def name(self) -> str:
        return f"{self.target} {self.mode}" + (" --float16" if self.asked else "")


FORMS = (
    Form("cuda", "float", asked=False),
    Form("cuda", "weight-only", asked=False),
    Form("tensorrt", "static", asked=True),
    Form("qdq", "static", asked=True),
)


@dataclass(frozen=True)
class Row:
    """One model in one form; ``error``: a line, with which the figures mean nothing."""

    model: str
    form: str
    nodes: int = 0
    halves: float = 0.0
    mean: float = 0.0
    worst: float = 0.0
    noise: float = 0.0
    last_bits: float = 0.0
    to_float: float = 0.0
    without: float | None = None
    bytes_ratio: float = 0.0
    error: str = ""

    def text(self) -> str:
        """A row of the table."""
        if self.error:
            return f"| {self.model} | {self.form} | {self.error} | | | | | | | |"
        cosine = f"{self.mean:.6f}, {self.worst:.6f} | {self.noise:.6f} | {self.last_bits:.6f}"
        without = "" if self.without is None else f"{self.without:.5f}"
        return (
            f"| {self.model} | {self.form} | {self.nodes} | {self.halves:.0%} | {cosine} "
            f"| {self.to_float:.5f} | {without} | {self.bytes_ratio:.2f} |"
        )


def measure(model: Path, name: str, form: Form, feeds: BatteryFeeds) -> Row:
    """Compile a model in one form, and compare it with the same model in float32."""
    fresh = feeds.fresh[0]
    try:
        result = _compiled(model, form, feeds, float16=form.asked)
        plain = _compiled(model, form, feeds, float16=False).model if form.asked else b""
        wide = in_float32(result.model)
        rounded = _outputs(rounding_form(result.model), fresh)
        truth = _outputs(model, fresh)
        exact = _outputs(wide.path, fresh)
        outputs = _closeness(exact, rounded, fresh)
        noise, last_bits = (
            _mean(exact, _outputs(with_noise(result.model, bits), fresh), fresh)
            for bits in (FLOAT16, FLOAT32)
        )
        without = _mean(truth, _outputs(plain, fresh), fresh) if plain else None
        to_float = _mean(truth, rounded, fresh)
    except QCompileError as e:
        return Row(name, form.name, error=str(e).splitlines()[0])
    checked = result.report.requirements
    nodes = next((checked[rule] for rule in _RULES if rule in checked), None)
    return Row(
        name,
        form.name,
        sum(result.report.operators.values()) if nodes is None else nodes,
        _halves(result.model),
        min((o.mean_cosine for o in outputs), default=1.0),
        min((o.worst_cosine for o in outputs), default=1.0),
        noise,
        last_bits,
        to_float,
        without,
        len(result.model) / (len(plain) or model.stat().st_size),
    )


def _outputs(model: bytes | Path, feeds: list[Feed]) -> list[dict[str, Array]]:
    session = Session(model, SessionOptions(threads=1, optimize=False))
    return [session.run(feed) for feed in feeds]


def _closeness(
    old: list[dict[str, Array]], new: list[dict[str, Array]], feeds: list[Feed]
) -> list[Closeness]:
    return judge(zip(old, new, feeds, strict=True), _OPEN).outputs


def _mean(old: list[dict[str, Array]], new: list[dict[str, Array]], feeds: list[Feed]) -> float:
    return min((o.mean_cosine for o in _closeness(old, new, feeds)), default=1.0)


def _compiled(model: Path, form: Form, feeds: BatteryFeeds, *, float16: bool) -> qcompile.Result:
    given: dict[str, Any] = {"target": form.target, "mode": form.mode, "float16": float16}
    options = Options(bench=False, verify=False, threads=1)
    return qcompile.compile(model, feeds.calibration, gates=_OPEN, options=options, **given)


def _halves(model: bytes) -> float:
    """Share of float16 among the float results of nodes whose type is written in the file."""
    graph = onnx.load_from_string(model).graph
    kinds = [v.type.tensor_type.elem_type for v in graph.value_info]
    found = [kind for kind in kinds if kind in _FLOATS]
    return found.count(onnx.TensorProto.FLOAT16) / max(len(found), 1)


def main(argv: list[str] | None = None) -> None:
    """Measure all models in all forms."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--match", default="*", help="glob over paths within the folder")
    parser.add_argument("--part", default="1/1", help="NUMBER/COUNT: every COUNT-th model")
    parser.add_argument("--min-cosine", type=float, default=0.9999)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(argv)
    if not given.folder.is_dir():
        fail(f"{str(given.folder)!r} is no folder")
    print(f"onnxruntime {version()}, onnx {onnx.__version__}", flush=True)
    print(
        "| model | form | nodes | float16 | cosine | noise | last bits | to float32 | without | "
        "bytes |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    rows = []
    for name, _ in listed(given.folder, given.match, given.part):
        feeds = random_feeds(given.folder / name)
        if not feeds.calibration:
            print(f"| {name} | takes no random inputs | | | | | | | | |", flush=True)
            continue
        for form in FORMS:
            rows.append(measure(given.folder / name, name, form, feeds))
            print(rows[-1].text(), flush=True)
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    whole = sum(not row.error for row in rows)
    print(f"every node has a kernel or meets the rules in {whole} of {len(rows)} rows")
    missed = [row for row in rows if row.error or row.mean < given.min_cosine]
    print(f"{len(rows) - len(missed)} of {len(rows)} at cosine {given.min_cosine:g} or more")
    sys.exit(1 if missed or not rows else 0)


if __name__ == "__main__":
    main()
