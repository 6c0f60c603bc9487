"""Models on ONNX Runtime's CUDA provider: float32, the float16 of others, and ours, in one run.

    python -m benchmarks.cuda MODEL.onnx [--length 128] [--batches 1,8,32,128] [--json FILE]
        [--data DATA --tokenizer DIR] [--model-type bert] [--limit 240]
    python -m benchmarks.cuda MODEL.onnx --ranges [--data DATA --tokenizer DIR]

Builds float32 (the model as it is), float16 by onnxruntime.transformers (fusions of --model-type),
and qcompile's target cuda: float (float16), weights of 8 and of 4 bits. For each, once: the nodes
that do not run on the GPU, by ONNX Runtime's own profile, memory on the GPU, and cosine to float32
on the CPU. Then, in alternating rounds with one session at a time until --limit seconds have
passed: latency at each batch size, with inputs and outputs on the GPU, with and without a CUDA
graph. Ratios are of medians of the same round. Cosines are those of random tokens unless --data
has text.

--ranges compares calibration instead: ranges of all quantized tensors as --provider cuda and as
the CPU measure them, against the bound of _provider_ranges.py; exit code 1 beyond it.

Without a GPU it says so and exits with 0. --provider CPUExecutionProvider rehearses the whole run
on the CPU, where the fused float16 operators have no kernels: their rows have the reason. Ranges
are then those of the same model with the sums of its linear layers in another order.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks._bound_session import BoundSession, nvidia_smi, placement, used_memory
from benchmarks._provider_ranges import calibrated, in_another_order, moves
from qcompile import Options, QCompileError, Recipe, compile
from qcompile.data.feeds import Feed, input_specs
from qcompile.data.open_data import open_data
from qcompile.data.synthetic import synthetic_feeds
from qcompile.ir import Graph
from qcompile.ir.analysis.shape_inference import infer
from qcompile.ir.model_io.read_model import load as load_graph
from qcompile.runtime import kernels
from qcompile.runtime.evaluation.closeness import Gates, judge
from qcompile.runtime.session import CUDA, Session, provider_or_cpu, version

FLOAT = "float32"
_COMPARED = 8  # the batch size at which placement and closeness are measured, or the largest one
_SAMPLES = 64  # texts of --data that are compared


@dataclass
class Row:
    """A model, and what was found. ``milliseconds``: by batch size, a list for each round.

    failure, graph_failure: why it does not run, or not as a CUDA graph; empty where it does.
    """

    name: str
    path: Path | None = None
    failure: str = ""
    graph_failure: str = ""
    nodes: int = 0
    elsewhere: dict[str, int] = field(default_factory=dict)
    memory: int | None = None
    cosine: float | None = None
    worst: float | None = None
    milliseconds: dict[int, list[float]] = field(default_factory=dict)
    graph_milliseconds: dict[int, list[float]] = field(default_factory=dict)


# ---- models


def transformers_float16(model: Path, out: Path, model_type: str) -> Path:
    """onnxruntime.transformers' fusions and float16, inputs and outputs as they were."""
    tool = importlib.import_module("onnxruntime.transformers.optimizer")
    with redirect_stdout(sys.stderr):
        optimized = tool.optimize_model(
            str(model), model_type=model_type, num_heads=0, hidden_size=0, opt_level=0, use_gpu=True
        )
        optimized.convert_float_to_float16(keep_io_types=True)
        optimized.save_model_to_file(str(out))
    return out


def ours(model: Path, out: Path, recipe: Recipe) -> Path:
    """Compiled for cuda; not verified, since the CPU may lack its operators."""
    compile(model, recipe=recipe, options=Options(verify=False, bench=False)).save(out)
    return out


def build(model: Path, folder: Path, model_type: str) -> Iterator[Row]:
    """All models; one that cannot be built has the reason."""
    yield Row(FLOAT, model)
    weights = Recipe(target="cuda", mode="weight-only")
    makers: dict[str, Callable[[Path], Path]] = {
        "onnxruntime.transformers float16": lambda p: transformers_float16(model, p, model_type),
        "qcompile float16": lambda p: ours(model, p, Recipe(target="cuda", mode="float")),
        "qcompile weights of 8 bits": lambda p: ours(model, p, weights),
        "qcompile weights of 4 bits": lambda p: ours(
            model, p, Recipe(target="cuda", mode="weight-only", weight_bits=4, embedding_bits=4)
        ),
    }
    for i, (name, make) in enumerate(makers.items()):
        path, failure = _built(make, folder / f"{i}.onnx")
        yield Row(name, path, failure)


def _built(make: Callable[[Path], Path], out: Path) -> tuple[Path | None, str]:
    """The file, or why there is none."""
    failure = ""
    with warnings.catch_warnings():
        # Where it fails, onnxruntime.transformers leaves a folder to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            return make(out), failure
        except Exception as e:  # peers raise anything; the table is printed without this one
            failure = _reason(e)
        gc.collect()
    return None, failure


def _reason(e: BaseException) -> str:
    return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}"


# ---- measuring


@dataclass(frozen=True)
class Inputs:
    """``timed``: a feed for each batch size. ``compared``: those for closeness."""

    timed: dict[int, Feed]
    compared: list[Feed]


def inputs_of(model: Path, args: argparse.Namespace) -> Inputs:
    """Random tokens of --length, and the texts of --data if there are any."""
    graph = load_graph(model)
    infer(graph)
    timed = {
        size: synthetic_feeds(graph, _sizes(graph, size, args.length), 1, 0, length=args.length)[0]
        for size in args.batches
    }
    if not args.data:
        return Inputs(timed, [timed[_nearest(timed)]])
    specs = input_specs(graph)
    texts = open_data(
        args.data, specs, tokenizer=args.tokenizer, samples=_SAMPLES, batch_size=_COMPARED
    )
    return Inputs(timed, list(texts))


def _sizes(graph: Graph, batch: int, length: int) -> dict[str, int]:
    """Sizes of the inputs' open dimensions: the first is the batch, others are lengths."""
    found: dict[str, int] = {}
    for spec in input_specs(graph):
        for axis, dim in enumerate(spec.shape or ()):
            if isinstance(dim, str):  # an open one
                found.setdefault(dim, length if axis else batch)
    return found


def _nearest(batches: dict[int, Feed]) -> int:
    return _COMPARED if _COMPARED in batches else max(batches)


def examine(row: Row, inputs: Inputs, float_model: Path, provider: str) -> None:
    """Placement, memory with all batch sizes bound, and closeness of one model, in place."""
    if row.path is None:
        return
    try:
        key = _nearest(inputs.timed)
        row.nodes, row.elsewhere = placement(row.path, provider, inputs.timed[key])
        gc.collect()
        before = used_memory()
        session = BoundSession(row.path, provider)
        for size, feed in inputs.timed.items():
            session.bind(size, feed)
        after = used_memory()
        row.memory = None if before is None or after is None else max(after - before, 0)
        row.cosine, row.worst = _closeness(session, inputs.compared, float_model)
    except QCompileError as e:
        row.failure, row.path = str(e), None


def _closeness(
    session: BoundSession, feeds: Sequence[Feed], float_model: Path
) -> tuple[float, float]:
    """Mean and worst cosine of a sample to the float model on the CPU, of the worst output."""
    reference = Session(float_model)

    def pairs() -> Iterator[tuple[Any, Any, Feed]]:
        for feed in feeds:
            session.bind(0, feed)  # no batch has this size
            yield reference.run(feed), session.outputs(0), feed

    outputs = judge(pairs(), Gates(min_cosine=None, min_worst_cosine=None)).outputs
    return min(o.mean_cosine for o in outputs), min(o.worst_cosine for o in outputs)


def measure(rows: Sequence[Row], inputs: Inputs, args: argparse.Namespace, end: float) -> int:
    """Rounds over all models until ``end`` (of time.monotonic), at least one; their number."""
    rounds = 0
    while rounds < args.rounds and (not rounds or time.monotonic() < end):
        for row in rows:
            _time(row, inputs.timed, args, graph=False)
            if args.provider == CUDA and not row.graph_failure:
                _time(row, inputs.timed, args, graph=True)
        rounds += 1
        print(f"round {rounds} of at most {args.rounds}", file=sys.stderr)
    return rounds


def _time(row: Row, feeds: dict[int, Feed], args: argparse.Namespace, *, graph: bool) -> None:
    """One round of one model, in place: the median at each batch size."""
    if row.path is None:
        return
    times = row.graph_milliseconds if graph else row.milliseconds
    try:
        session = BoundSession(row.path, args.provider, graph=graph)
        for size, feed in feeds.items():
            session.bind(size, feed)
            found = session.milliseconds(size, args.seconds)
            times.setdefault(size, []).append(median(found))
    except Exception as e:  # pybind exceptions of ONNX Runtime have no common base
        if not graph:
            row.failure, row.path = _reason(e), None
        else:
            row.graph_failure = _reason(e)
            times.clear()
    gc.collect()


# ---- printing


def table(rows: Sequence[Row], batches: Sequence[int]) -> str:
    """Two Markdown tables: what runs where, and latencies."""
    first = [
        "| model | nodes | not on the GPU | GPU memory, MB | cosine, mean | worst |",
        "|---|---|---|---|---|---|",
        *(_what(row) for row in rows),
    ]
    names = "".join(f" {size}: ms | {FLOAT} over it | graph, ms |" for size in batches)
    second = [
        f"| model |{names} texts/s, most |",
        "|---|" + "---|" * (3 * len(batches) + 1),
        *(_speed(row, rows[0], batches) for row in rows if not row.failure),
    ]
    graphs = [
        f"{row.name}, no CUDA graph: {row.graph_failure}" for row in rows if row.graph_failure
    ]
    return "\n".join([*first, "", *second, "", *graphs]).rstrip()


def _what(row: Row) -> str:
    if row.failure:
        return f"| {row.name} | {row.failure} | | | | |"
    elsewhere = ", ".join(f"{n} {op}" for op, n in sorted(row.elsewhere.items())) or "none"
    memory = "-" if row.memory is None else f"{row.memory / 1e6:.0f}"
    return (
        f"| {row.name} | {row.nodes} | {elsewhere} | {memory} | {row.cosine:.5f} | "
        f"{row.worst:.5f} |"
    )


def _speed(row: Row, reference: Row, batches: Sequence[int]) -> str:
    cells = []
    for size in batches:
        mine, theirs = row.milliseconds[size], reference.milliseconds.get(size, [])
        ratio = [b / a for a, b in zip(mine, theirs, strict=False)]
        graph = row.graph_milliseconds.get(size)
        cells += [
            f"{median(mine):.2f}",
            f"{median(ratio):.2f}" if ratio else "-",
            f"{median(graph):.2f}" if graph else "-",
        ]
    every = [row.milliseconds, row.graph_milliseconds]
    most = max(size / median(ms) * 1e3 for times in every for size, ms in times.items())
    return f"| {row.name} | {' | '.join(cells)} | {most:.0f} |"


def setup(args: argparse.Namespace) -> str:
    """Card, driver, versions and length of the texts."""
    card = nvidia_smi("name,driver_version") or "no GPU"
    here = kernels.environment()
    return (
        f"{card}; {args.provider}; onnxruntime {version()}, onnx {here.onnx}, numpy {here.numpy}; "
        f"{args.length} tokens"
    )


def compare_ranges(args: argparse.Namespace) -> None:
    """Print how far ranges of the two providers lie apart. Raises SystemExit beyond the bound."""
    feeds = inputs_of(args.model, args).compared
    here = calibrated(args.model, feeds, "cpu")
    if args.provider == CUDA:
        there = calibrated(args.model, feeds, "cuda")
    else:
        with tempfile.TemporaryDirectory() as folder:
            model = in_another_order(args.model, Path(folder) / "reordered.onnx")
            there = calibrated(model, feeds, "cpu")
    found = moves(here, there)
    print(setup(args))
    if not found:
        sys.exit("cuda: no tensor has a range")
    worst, beyond = found[0], [move for move in found if move.share > here.bound]
    print(
        f"{len(found)} ranges; the largest difference is {worst.share:.2e} of the range's largest "
        f"magnitude, of {worst.tensor!r}; bound {here.bound:.2e}"
    )
    if args.json is not None:
        figures = {"setup": setup(args), "bound": here.bound, "moves": [*map(asdict, found)]}
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if beyond:
        sys.exit(f"cuda: {len(beyond)} of {len(found)} ranges differ by more than the bound")


def compare_models(args: argparse.Namespace) -> None:
    """Print two tables: what runs where, and latencies. Raises QCompileError."""
    end = time.monotonic() + args.limit
    with tempfile.TemporaryDirectory() as folder:
        inputs = inputs_of(args.model, args)
        rows = list(build(args.model, Path(folder), args.model_type))
        for row in rows:
            print(f"examining {row.name}", file=sys.stderr)
            examine(row, inputs, args.model, args.provider)
        rounds = measure(rows, inputs, args, end)
    about = f"{setup(args)}, {rounds} rounds"
    print(table(rows, args.batches), about, sep="\n\n")
    if args.json is not None:
        found = {"setup": about, "models": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")


def main() -> None:
    """Compare models, or ranges; without a GPU, say so."""
    args = arguments()
    if provider_or_cpu(args.provider) != args.provider:
        print(f"no GPU here: onnxruntime {version()} cannot run a model on {args.provider}")
        return
    try:
        (compare_ranges if args.ranges else compare_models)(args)
    except QCompileError as e:
        sys.exit(f"cuda: {e}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--length", type=int, default=128, help="tokens of a text")
    parser.add_argument("--batches", type=_numbers, default=[1, 8, 32, 128], metavar="N,N")
    parser.add_argument("--data", help="texts to compare outputs on")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--model-type", default="bert", help="of onnxruntime.transformers")
    parser.add_argument("--provider", default=CUDA)
    parser.add_argument("--ranges", action="store_true", help="compare calibrated ranges instead")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.2, help="of a batch size in a round")
    parser.add_argument("--limit", type=float, default=240, help="no round begins after (seconds)")
    parser.add_argument("--json", type=Path, help="write all figures here too")
    return parser.parse_args()


def _numbers(text: str) -> list[int]:
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise ValueError(text)
    return found


if __name__ == "__main__":
    main()
