"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from qcompile.compiler.config.recipe import GATES, Recipe
from qcompile.compiler.model_folder.model_file import model_file
from qcompile.compiler.stages.options import SizeLimit
from qcompile.quant.types import FEW_BITS
from qcompile.runtime.evaluation.closeness import Gates
from qcompile.runtime.session import custom_operators
from qcompile.system.byte_sizes import parse_bytes

F = TypeVar("F", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)


class ModelPath(click.Path):
    """A model file; a folder stands for the one model in it."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:
        """The file. Raises ModelError where a folder holds none or several."""
        return model_file(Path(str(super().convert(value, param, ctx))))


MODEL = ModelPath(path_type=Path)


class Size(click.ParamType[int]):
    """Bytes, written as 800MB, 2GiB or a number."""

    name = "SIZE"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Bytes as an int."""
        if isinstance(value, int):
            return value
        try:
            return parse_bytes(str(value))
        except ValueError as e:
            self.fail(str(e), param, ctx)


class Widths(click.ParamType[tuple[int, ...]]):
    """Numbers of bits, written as 4,3,2."""

    name = "N[,N...]"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        """The numbers, each once."""
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        if any(part not in map(str, FEW_BITS) for part in parts):
            self.fail(
                f"{value!r} is not a list of bit widths from 2 to 7, expected for example 4,3,2",
                param,
                ctx,
            )
        return tuple(dict.fromkeys(map(int, parts)))


class Columns(click.ParamType[tuple[str, ...]]):
    """The name of a column of text, or of two that hold a pair, written as A or A,B."""

    name = "A[,B]"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        """The names."""
        if isinstance(value, tuple):
            return value
        names = tuple(name.strip() for name in str(value).split(","))
        if "" in names or len(names) > 2 or len(set(names)) < len(names):
            self.fail(f"{value!r} is not one name of a column, or two names", param, ctx)
        return names


class LimitOfSize(click.ParamType[SizeLimit]):
    """Bytes as for ``Size``, or a share of the float model's files, written as 18%."""

    name = "SIZE|PERCENT"

    def convert(self, value: Any, param: Any, ctx: Any) -> SizeLimit:
        """The limit."""
        if isinstance(value, SizeLimit):
            return value
        try:
            return SizeLimit.parse(str(value))
        except ValueError as e:
            self.fail(str(e), param, ctx)


class Ranged(click.ParamType[tuple[str, tuple[int, ...]]]):
    """``name=1`` or ``name=1,2,3``: a name and whole numbers, at most ``most``."""

    name = "NAME=N[,N...]"

    def __init__(self, separator: str = ",", most: int | None = None) -> None:
        self.separator, self.most = separator, most
        self.name = "NAME=N" if most == 1 else f"NAME=N[{separator}N...]"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, tuple[int, ...]]:
        """(name, numbers)."""
        if isinstance(value, tuple):
            return value
        name, equals, numbers = str(value).partition("=")
        try:
            sizes = tuple(int(n) for n in numbers.split(self.separator))
        except ValueError:
            sizes = ()
        many = self.most is not None and len(sizes) > self.most
        if not (name and equals and sizes) or min(sizes) < 1 or many:
            self.fail(f"{value!r} is not {self.name} with numbers of 1 and more", param, ctx)
        return name, sizes


@dataclass(frozen=True, kw_only=True)
class OutputArguments:
    """What is shown of the result. ``verbose`` is for the handling of errors in ``cli.py``."""

    quiet: bool
    verbose: bool
    as_json: bool

    @property
    def for_people(self) -> bool:
        """True if the next command is shown."""
        return not (self.quiet or self.as_json)


def output_options(command: F) -> F:
    """-q, -v and --json, for ``OutputArguments``."""
    command = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")(
        command
    )
    command = click.option("-v", "--verbose", is_flag=True, help="Show tracebacks and details.")(
        command
    )
    return click.option("-q", "--quiet", is_flag=True, help="Print errors only.")(command)


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """How --data is read; None is the data's own default."""

    tokenizer: Path | None
    samples: int | None
    batch_size: int | None
    max_length: int | None
    text_columns: tuple[str, ...]


def data_options(command: F) -> F:
    """How --data is read, for ``DataArguments``."""
    batch = "Samples per batch of text or .npz.  [default: 8]"
    samples = (
        "Samples to use, at most: the first of one file, drawn from streams such as Parquet or "
    )
    samples += "several files.  [default: all; text: 256]"
    return _data_options(command, samples, batch)


def text_options(command: F) -> F:
    """The same where --data is to train on, and a sample of it to calibrate on."""
    samples = "Texts to calibrate on, drawn from --data.  [default: 256]"
    return _data_options(command, samples, "Texts in a step of training.  [default: 32]")


def _data_options(command: F, samples: str, batch: str) -> F:
    command = click.option(
        "--text-columns",
        type=Columns(),
        default=(),
        help="Columns of .csv, or keys of .jsonl, that hold the text, or the pair of texts.  "
        "[default: text, or text_a,text_b]",
    )(command)
    command = click.option(
        "--max-length",
        type=click.IntRange(1),
        help="Length in tokens at which text is cut off.  [default: the tokenizer's own limit, "
        "128 at most]",
    )(command)
    command = click.option("--batch-size", type=click.IntRange(1), help=batch)(command)
    command = click.option("--samples", type=click.IntRange(1), help=samples)(command)
    return click.option(
        "--tokenizer",
        type=PATH,
        help="Folder that holds tokenizer.json, for text data.  [default: the model's folder]",
    )(command)


def _load_libraries(
    context: click.Context, _option: click.Parameter, libraries: tuple[Path, ...]
) -> None:
    """Give every session of the command these operators."""
    context.with_resource(custom_operators(libraries))


custom_ops_option = click.option(
    "--custom-ops",
    type=PATH,
    multiple=True,
    expose_value=False,
    callback=_load_libraries,
    help="Library (.so) of custom operators of the model; its code runs here. Repeatable.",
)


_GATES = {
    "min_cosine": "Lowest mean cosine similarity of an output to the float model's.",
    "min_worst_cosine": "Lowest cosine similarity of any sample.",
    "min_r2": "Lowest R² of output columns that vary on the same scale: 1 means equal, 0 no "
    "better than a constant.",
    "min_single_r2": "Lowest R² of an output with one number per sample.",
    "min_sqnr": "Lowest signal-to-quantization-noise ratio (SQNR) in dB.",
    "max_flips": "Largest share of samples or tokens whose argmax may change.",
    "max_abs": "Largest absolute difference of any output value.",
    "max_latency_ratio": "Largest ratio of latencies, compiled over float.",
    "max_size_ratio": "Largest ratio of sizes, compiled over float.",
    "min_metric": "Lowest value of --metric.",
}
_COMPILE_ONLY_GATES = ("max_latency_ratio", "max_size_ratio", "min_metric")
ACCURACY_GATES = tuple(n for n in _GATES if n not in ("max_latency_ratio", "max_size_ratio"))


@dataclass(frozen=True, kw_only=True)
class GateArguments(Gates):
    """One option per gate; gates without an option in a command keep their defaults."""

    def make_gates(self, recipe: Recipe | None = None) -> Gates:
        """The gates that were given, else those of the recipe, else the defaults."""
        base = self.default_gates()
        gates = base if recipe is None else recipe.make_gates(base)
        return replace(gates, **{name: getattr(self, name) for name in gates_given()})

    def default_gates(self) -> Gates:
        """The gates where nothing is said of them."""
        return Gates()


def gates_given() -> tuple[str, ...]:
    """The gates that the command line sets."""
    source = click.get_current_context().get_parameter_source
    return tuple(n for n in GATES if source(n) not in (None, ParameterSource.DEFAULT))


def gate_options(*, compiling: bool, measuring: bool = False) -> Callable[[F], F]:
    """Options for ``GateArguments``, with their defaults. Some exist only when ``compiling``, that
    of a metric also when ``measuring`` one."""

    def decorate(command: F) -> F:
        defaults = Gates()
        left_out = set() if compiling else set(_COMPILE_ONLY_GATES)
        left_out -= {"min_metric"} if measuring else set()
        for field in reversed(fields(Gates)):
            if field.name in left_out:
                continue
            default = getattr(defaults, field.name)
            text = _GATES[field.name] + ("" if default is not None else "  [default: off]")
            flag = "--" + field.name.replace("_", "-")
            option = click.option(
                flag, type=float, default=default, show_default=default is not None, help=text
            )
            command = option(command)
        return command

    return decorate
