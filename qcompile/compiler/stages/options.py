"""What the caller of a compilation asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from qcompile.compiler.cluster.connect import workers_of
from qcompile.compiler.cluster.workers import Workers
from qcompile.compiler.config.lockfile import Lock
from qcompile.compiler.config.recipe import Recipe
from qcompile.compiler.report.notes import Note
from qcompile.data.open_data import Data
from qcompile.data.tokenizer import folder_near
from qcompile.errors import DataError
from qcompile.ir.model_io.read_model import Source
from qcompile.runtime import providers
from qcompile.runtime.evaluation.closeness import Gates
from qcompile.runtime.evaluation.user_metric import Metric
from qcompile.system.byte_sizes import parse_bytes
from qcompile.system.progress import Progress, Silent
from qcompile.system.resume_cache import Cache


@dataclass(frozen=True)
class SizeLimit:
    """The most bytes of the compiled model's files: a number, or a share of the float model's.

    Raises ValueError unless exactly one is given, ``bytes`` is at least 1, and ``share`` is over 0
    and at most 1.
    """

    bytes: int | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        if (self.bytes is None) == (self.share is None):
            raise ValueError("a limit of size is either bytes or a share")
        if self.bytes is not None and self.bytes < 1:
            raise ValueError(f"a size of {self.bytes} bytes is not a limit, expected 1 or more")
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(
                f"{self.share:.6g} is not a share, expected over 0 % and at most 100 %"
            )

    @classmethod
    def parse(cls, text: str) -> SizeLimit:
        """The limit ``16MB``, ``12.5MiB`` or ``18%``. Raises ValueError."""
        number, percent, rest = text.strip().partition("%")
        if not percent:
            return cls(bytes=_parse(text))
        try:
            share = float(number) / 100
        except ValueError:
            share = float("nan")
        if rest or not 0 < share <= 1:
            raise ValueError(f"{text!r} is not a size limit, {_EXPECTED}")
        return cls(share=share)

    def of(self, float_bytes: int) -> int:
        """Bytes, where the float model's files have ``float_bytes``."""
        return int(float_bytes * self.share) if self.share is not None else self.bytes or 0

    def __str__(self) -> str:
        return f"{self.share * 100:g}%" if self.share is not None else f"{self.bytes}"


_EXPECTED = "expected for example 16MB, 12.5MiB or 18% (of the float model, at most 100%)"


def _parse(text: str) -> int:
    try:
        size = parse_bytes(text)
    except ValueError:
        size = 0
    if size < 1:
        raise ValueError(f"{text!r} is not a size limit, {_EXPECTED}")
    return size


_Options = TypeVar("_Options", "TrainingOptions", "CompileOptions")


def _with_paths(options: _Options, *names: str) -> None:
    """Fields whose paths were given as text become paths. Raises DataError for anything else."""
    for name in names:
        value = getattr(options, name)
        is_default = hasattr(type(options), name) and value is None
        if is_default or isinstance(value, Path):
            continue
        if not isinstance(value, str):
            kind = type(value).__name__
            raise DataError(f"{name}: expected the path of a file or folder, found {kind}")
        object.__setattr__(options, name, Path(value))


# Why training refuses a stream, and the next step.
ONE_FILE = "training reads rows in random order: write them as one .jsonl file first (docs/data.md)"


@dataclass(frozen=True)
class TrainingOptions:
    """How to train a model with its quantizers in the loop; texts as .jsonl, .csv or .txt.

    Paths may be given as text. Raises DataError for data that is no path of a file.

    Attributes:
        data: texts, with labels unless ``distill`` is set; streamed, of any size.
        evaluation: labelled texts that choose the best checkpoint and decide the gate.
        config: of the model, as transformers' config.json has it: its head and its labels.
        distill: learn the float model's own outputs, so that no labels are needed.
        epochs: passes over the data; None is 3, or as many as ``steps`` or ``seconds`` last.
        steps: most steps of the optimizer.
        seconds: most time.
        learning_rate: of weights and biases, at its peak, twice that for weights of 3 bits, four
            times for 2 bits, with ``distill`` a quarter for 8 bits; None is 2.5e-5.
        range_rate: of the logarithms of scales.
        batch_size: texts in a step.
        max_drop: points that the metric may lose against the float model; None for any.
        state: file from which an interrupted run resumes; None keeps none.
    """

    data: Path
    evaluation: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    distill: bool = False
    epochs: float | None = None
    steps: int | None = None
    seconds: float | None = None
    learning_rate: float | None = None
    range_rate: float = 1e-3
    batch_size: int = 32
    max_drop: float | None = 1.0
    state: Path | None = None

    def __post_init__(self) -> None:
        _with_paths(self, "data", "evaluation", "state")


@dataclass(frozen=True)
class CompileOptions:
    """How to compile, in addition to the recipe: data handling, checks, limits.

    Paths may be given as text. Raises DataError for other values in their place.

    Attributes:
        tokenizer: folder that holds tokenizer.json, for text data; None is that of the model.
        samples: the most samples to read; None is all, of text 256.
        batch_size: samples per batch of text or .npz; None is 8.
        max_length: the most tokens of a text; None is the tokenizer's own limit, 128 at most.
        text_columns: names of the columns with the text, or with the pair; empty for ``text``, or
            ``text_a`` and ``text_b``.
        max_memory: bytes that the process may use in addition to its libraries (about 300 MB).
        threads: of ONNX Runtime; 0 is one per core.
        provider: ``cpu`` or ``cuda``, that runs the float model to calibrate, and what is measured
            to rank tensors; None is the CPU, and for ranking the target's own.
        verify: compare the result with the float model.
        bench: time both models.
        bench_rounds: rounds in which each is timed once.
        profile: where anything is timed, also take the time of each kind of operator.
        tune: time the target's lowering options and keep the faster ones.
        force: return the result although a gate failed.
        dump_dir: folder for the graph after each pass, as text.
        metric: the user's own measure of feeds and outputs, or its name, for ``Gates.min_metric``.
        search_time: seconds to search for tensors that need more bits if an accuracy gate fails; 0
            is no search.
        search_state: file that keeps the measurements of an interrupted search.
        max_size: the most bytes of the result; bits of weights are chosen by measured sensitivity.
        fewest_bits: not as close as possible within ``max_size``, but as small as the gates allow.
        bits_state: file that keeps the measurements of an interrupted search for bits.
        stem: of the output's file name, for a file of weights next to it.
        lock: the build to repeat; its recipe is the one used.
        keep_lock: the result has a light lock, for ``Result.save_lock``.
        keep_calibration: the result has the calibration too, which a full lock needs.
        training: train the planned model before its quantizers are inserted.
        client: a ``dask.distributed.Client`` whose workers calibrate and measure (docs/scale.md);
            None is this process.
        cache: where calibration is kept, so that an interrupted run can resume; call its ``forget``
            once the result is written.
    """

    tokenizer: Path | None = None
    samples: int | None = None
    batch_size: int | None = None
    max_length: int | None = None
    text_columns: tuple[str, ...] = ()
    max_memory: int | None = None
    threads: int = 0
    provider: providers.Choice | None = None
    verify: bool = True
    bench: bool = True
    bench_rounds: int = 6
    profile: bool = False
    tune: bool = False
    force: bool = False
    dump_dir: Path | None = None
    metric: Metric | str | None = None
    search_time: float = 0.0
    search_state: Path | None = None
    max_size: SizeLimit | None = None
    fewest_bits: bool = False
    bits_state: Path | None = None
    stem: str = "model"
    lock: Lock | None = None
    keep_lock: bool = False
    keep_calibration: bool = False
    training: TrainingOptions | None = None
    cache: Cache | None = None
    client: Any | None = None

    def __post_init__(self) -> None:
        _with_paths(self, "tokenizer", "dump_dir", "search_state", "bits_state")

    @property
    def workers(self) -> Workers:
        """Who does the work. Raises ClusterError where the client's workers cannot."""
        return workers_of(self.client)

    def forget(self) -> None:
        """Remove what an interrupted run would have resumed from: the result is written."""
        if self.cache is not None:
            self.cache.forget()
        if self.training is not None and self.training.state is not None:
            self.training.state.unlink(missing_ok=True)


@dataclass(frozen=True)
class Request:
    """All arguments of one compilation.

    name: of the model in the report, by default its file name. notes: from the caller, for the
    report.
    """

    model: Source
    data: Data | None
    recipe: Recipe = field(default_factory=Recipe)
    gates: Gates = field(default_factory=Gates)
    options: CompileOptions = field(default_factory=CompileOptions)
    progress: Progress = field(default_factory=Silent)
    name: str | None = None
    notes: tuple[Note, ...] = ()

    @property
    def tokenizer(self) -> Path | None:
        """The folder of the tokenizer: as asked for, else of the model; None if it has none."""
        return self.options.tokenizer or folder_near(self.model)

    @property
    def source(self) -> str:
        """The name of the model's file."""
        model = self.model
        return Path(model).name if isinstance(model, str | Path) else "model in memory"
