"""Integer sums of compiled models on two processors: the same to the last bit, where promised.

    python -m benchmarks.robustness.same_sums FOLDER --other COMMAND
        [--form static,qdq] [--match GLOB] [--part 1/4] [--json FILE]

COMMAND starts a Python whose ONNX Runtime saturates, such as ``qemu-x86_64 -cpu Haswell python``;
it needs numpy and onnxruntime. FOLDER: any tree of .onnx files, or none for the graphs of
``_integer_graphs.py``. Each model is compiled in each form on random inputs, with all
defaults (form ``as-is``: it is taken as it is). Each of its integer operators is then run alone, on
the model's own data and on inputs that make sums of pairs as large as possible, here and there, and
compared with the exact sums (``_operator_probes.py``). Exit code 1 if any model is wrong or silent.

| verdict | meaning |
|---|---|
| same | the report promises the same sums everywhere, and they are |
| wrong | the report promises it, but some sum differs from the exact one |
| stated | the report does not promise it, and says for which operators, and why |
| silent | the report does not promise it, and gives no reason; or another operator differs |
| none | no integers are multiplied |
| refused | nothing was compiled |
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import onnx

import qcompile
from benchmarks.robustness import _integer_graphs
from benchmarks.robustness._battery_feeds import BatteryFeeds, random_feeds
from benchmarks.robustness._operator_probes import Probe, probes
from benchmarks.robustness.battery import listed
from models._common import fail
from qcompile.compiler.config.recipe import Recipe
from qcompile.compiler.report.records import SaturationAccount
from qcompile.compiler.stages import saturation_check
from qcompile.compiler.stages.options import CompileOptions
from qcompile.data.feeds import Feed
from qcompile.errors import QCompileError
from qcompile.runtime import session as runtime
from qcompile.runtime.evaluation.closeness import Gates

Array = npt.NDArray[Any]
AS_IS = "as-is"
# How to compile: a recipe, and whether with data.
FORMS: dict[str, tuple[Recipe, bool]] = {
    "static": (Recipe(target="cpu", mode="static"), True),
    "attention": (Recipe(target="cpu", mode="static", attention="all"), True),
    "dynamic-attention": (Recipe(target="cpu", mode="dynamic", attention="all"), True),
    "dynamic": (Recipe(target="cpu", mode="dynamic"), False),
    "weight-only": (Recipe(target="cpu", mode="weight-only"), False),
    "qdq": (Recipe(target="qdq", mode="static"), True),
    "tensorrt": (Recipe(target="tensorrt", mode="static"), True),
}
_WHOLE_FILES = 3  # feeds on which the outputs of the whole model are compared
_LOOSE = Gates(*[None] * len(Gates.__dataclass_fields__))


@dataclass(frozen=True)
class Outcome:
    """One model in one form.

    ``operators``: integer operators that were run alone; ``differ``: those of them with other sums,
    here or there. ``stated``: operators that the report says may differ. ``outputs``: largest
    relative RMS difference of the whole model's outputs, where float kernels also differ; None
    where they could not be compared.
    """

    file: str
    form: str
    verdict: str
    operators: int = 0
    differ: tuple[str, ...] = ()
    stated: tuple[str, ...] = ()
    outputs: float | None = None
    detail: str = ""


class Worker:
    """A process with an ONNX Runtime, started by a command; it ends with the context."""

    def __init__(self, command: Sequence[str]) -> None:
        script = Path(__file__).with_name("_sums_worker.py")
        self._process = subprocess.Popen(
            [*command, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, model: onnx.ModelProto | Path, feeds: Sequence[Feed]) -> list[list[Array]]:
        """The outputs for each feed, in order. Raises RuntimeError where the runtime fails."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            path = model if isinstance(model, Path) else folder / "model.onnx"
            if not isinstance(model, Path):
                path.write_bytes(model.SerializeToString())
            pairs = [(folder / f"{i}.npz", folder / f"{i}.out.npz") for i in range(len(feeds))]
            for (given, _), feed in zip(pairs, feeds, strict=True):
                np.savez(given, allow_pickle=False, **feed)
            answer = self._ask({"model": str(path), "feeds": [[str(a), str(b)] for a, b in pairs]})
            if answer != "ok":
                raise RuntimeError(answer)
            return [_arrays(made) for _, made in pairs]

    def _ask(self, request: dict[str, Any]) -> str:
        pipes: list[IO[str] | None] = [self._process.stdin, self._process.stdout]
        given, answers = (pipe for pipe in pipes if pipe is not None)
        given.write(json.dumps(request) + "\n")
        given.flush()
        answer = answers.readline().strip()
        if not answer:
            fail(f"the other Python ended with code {self._process.wait()}")
        return answer

    def saturates(self) -> bool:
        """True where its uint8 by int8 sums saturate."""
        sample = _integer_graphs.saturating_sum()
        [[total]] = self.run(sample.model, [sample.feed])
        return int(total.item()) != sample.exact

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


def _arrays(path: Path) -> list[Array]:
    with np.load(path) as arrays:
        return [arrays[name] for name in arrays.files]


def check(path: Path, form: str, workers: Sequence[Worker], label: str = "") -> Outcome:
    """Compile one model, and compare its sums on all workers."""
    name = label or path.name
    feeds = random_feeds(path)
    try:
        with tempfile.TemporaryDirectory() as folder:
            made = path if form == AS_IS else _compiled(path, form, feeds, Path(folder))
            return _compared(made, name, form, feeds, workers)
    except QCompileError as e:
        return Outcome(name, form, "refused", detail=str(e).splitlines()[0])


def _compiled(path: Path, form: str, feeds: BatteryFeeds, folder: Path) -> Path:
    recipe, with_data = FORMS[form]
    data = feeds.calibration if with_data else None
    options = CompileOptions(bench=False, verify=False, force=True, search_time=0)
    result = qcompile.compile(path, data, recipe=recipe, gates=_LOOSE, options=options)
    result.save(folder / "out.onnx")
    return folder / "out.onnx"


def _compared(
    path: Path, name: str, form: str, feeds: BatteryFeeds, workers: Sequence[Worker]
) -> Outcome:
    sums = saturation_check.IntegerSums(path)
    account = saturation_check.saturation_account(sums, None, None)
    small = probes(sums, feeds.calibration[0] if feeds.calibration else None)
    differ, errors = set[str](), []
    for probe in small:
        for worker in workers:
            try:
                differ |= {probe.node for _ in _wrong(probe, worker)}
            except RuntimeError as e:
                errors.append(f"{probe.node}: {e}")
    stated = tuple(sorted({f"{row.node} ({row.reason or row.can})" for row in account.rows}))
    verdict = _verdict(account, len(small) + account.linears, differ)
    return Outcome(
        name,
        form,
        verdict,
        len(small),
        tuple(sorted(differ)),
        stated,
        _whole(path, feeds, workers),
        "; ".join(errors),
    )


def _wrong(probe: Probe, worker: Worker) -> Iterator[int]:
    """Feeds for which the sums are not the exact ones."""
    found = worker.run(probe.model, probe.feeds)
    for i, ([outputs], exact) in enumerate(zip(found, probe.expected, strict=True)):
        if not np.array_equal(outputs, exact):
            yield i


def _verdict(account: SaturationAccount, operators: int, differ: set[str]) -> str:
    if account.same_without_vnni and differ:
        return "wrong"
    if account.same_without_vnni:
        return "same" if operators else "none"
    rows = {row.node for row in account.rows}
    return "stated" if rows and differ <= rows else "silent"


def _whole(path: Path, feeds: BatteryFeeds, workers: Sequence[Worker]) -> float | None:
    """The largest RMS difference of outputs, relative to their RMS."""
    few = feeds.calibration[:_WHOLE_FILES]
    try:
        runs = [[a for feed in w.run(path, few) for a in feed] for w in workers]
    except RuntimeError:
        return None
    worst = 0.0
    for first, *others in zip(*runs, strict=True):
        for other in others:
            if first.dtype.kind != "f" or first.shape != other.shape or not first.size:
                continue
            a, b = first.astype(np.float64), other.astype(np.float64)
            finite = np.isfinite(a) & np.isfinite(b)
            scale = float(np.sqrt(np.mean(np.square(a[finite])))) if finite.any() else 0.0
            if scale > 0:
                worst = max(worst, float(np.sqrt(np.mean(np.square(a - b)[finite]))) / scale)
    return worst


def main() -> None:
    """Print a line for each model, and a table; exit code 1 where a promise is not kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", help="default: hand-written graphs")
    parser.add_argument("--other", required=True, help="command of a Python that saturates")
    parser.add_argument("--form", default=",".join(FORMS), help=f"of {', '.join(FORMS)}, {AS_IS}")
    parser.add_argument("--match", default="*", help="glob over paths within the folder")
    parser.add_argument("--part", default="1/1", help="the n-th of so many parts, such as 2/4")
    parser.add_argument("--json", type=Path, help="file to write every outcome to")
    args = parser.parse_args()
    forms = args.form.split(",")
    unknown = [f for f in forms if f not in (*FORMS, AS_IS)]
    if unknown:
        fail(f"unknown form {unknown[0]!r}, expected of: {', '.join((*FORMS, AS_IS))}")
    with (
        Worker([sys.executable]) as here,
        Worker(shlex.split(args.other)) as other,
        tempfile.TemporaryDirectory() as folder,
    ):
        workers = (here, other)
        if not any(worker.saturates() for worker in workers):
            fail(f"no sum saturates here or by {args.other!r}: there is nothing to compare")
        root = args.folder or _integer_graphs.write(Path(folder))
        found = []
        for file, _ in listed(root, args.match, args.part):
            for form in forms:
                found.append(check(root / file, form, workers, file))
                print(_line(found[-1]), flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(o) for o in found], indent=1) + "\n")
    for form in forms:
        counts = Counter(o.verdict for o in found if o.form == form)
        print(f"{form}: {', '.join(f'{n} {v}' for v, n in sorted(counts.items()))}")
    operators = sum(o.operators for o in found)
    print(f"{operators} operators, ONNX Runtime {runtime.version()}")
    sys.exit(1 if any(o.verdict in ("wrong", "silent") for o in found) else 0)


def _line(item: Outcome) -> str:
    outputs = "-" if item.outputs is None else f"{item.outputs:.0e}"
    more = [*(f"differs: {n}" for n in item.differ), *(f"stated: {n}" for n in item.stated[:3])]
    rest = "; ".join([*more, *([item.detail] if item.detail else [])])
    return f"{item.verdict} {item.form} {item.file} {item.operators} outputs {outputs} {rest}"


if __name__ == "__main__":
    main()
