"""A transformers model as an ONNX folder: by optimum, else by ``torch.onnx.export``.

The only module that knows torch, transformers and optimum; they are imported when a model is
exported, and need the extra ``export``. optimum-onnx requires transformers below 4.58, so with a
newer one, or if optimum does not know an architecture, torch exports alone. In both cases the file
is compared with the torch model before it is accepted.

transformers sees a view of the folder: links to the files that ``layout.py`` accepts. Pickles and
Python files are not in it, so nothing can open them.
"""

from __future__ import annotations

import importlib
import io
import logging
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from qcompile.compiler.model_folder import layout, tasks, torch_parity
from qcompile.compiler.model_folder.forward_inputs import (
    FED,
    IDS,
    TYPES,
    ForwardInputs,
    forward_inputs,
)
from qcompile.compiler.model_folder.layout import Folder
from qcompile.compiler.model_folder.tasks import Task
from qcompile.compiler.model_folder.torch_parity import SHAPES, Parity, Vocabulary, example_feed
from qcompile.errors import GateError, ModelError, OutputError, QCompileError
from qcompile.ir.model_io import read_model
from qcompile.quant import Array
from qcompile.system.json_values import Record, members

MODEL = "model.onnx"
OPSET = 18
INSTALL = "pip install -e '.[export]' in a checkout"
# Versions that CI's constraints name: optimum-onnx requires transformers below 4.58.
TOGETHER = ("optimum-onnx 0.1.0", "transformers 4.57.6", "torch 2.13.0")
OLDEST = (4, 56)  # transformers: the first version whose from_pretrained has the argument dtype
_AXES = {0: "batch_size", 1: "sequence_length"}
_INDEX = "model.safetensors.index.json"
_TOKENS = ("last_hidden_state",)
_EMBEDDINGS = ("text_embeds", "pooler_output")
# Models of one part, by what stands for "Model" in their names.
_PARTS = ("TextModelWithProjection", "TextModel", "EncoderModel")


@dataclass(frozen=True)
class Exported(Record):
    """The exported ``files`` by name, the exporter that made them, and how close they are."""

    files: tuple[str, ...]
    task: Task
    route: str
    opset: int
    parity: Parity
    notes: tuple[str, ...] = ()

    JSON = members("summary task=task.name route opset parity notes")

    def __str__(self) -> str:
        return f"{self.task.name} by {self.route}, opset {self.opset}; {self.parity}"

    @property
    def summary(self) -> str:
        """Everything in one line."""
        return str(self)


@dataclass(frozen=True)
class VariantFile:
    """A file that has another name than the float model."""

    variant: str
    float: Annotated[str, "the float model's file"]
    purpose: str


@dataclass(frozen=True)
class FolderAccount(Record):
    """The inputs of a folder that was compiled; ``exported`` if it had no ONNX file.

    ``variants``: by file; None if none was asked for.
    """

    source: str
    folder: Folder
    exported: Exported | None
    variants: Annotated[dict[str, VariantFile] | None, "what each file is"] = None

    JSON = members("source **folder export=exported? variants?")


@dataclass(frozen=True)
class ExportAccount(Record):
    """The inputs of a folder that was exported."""

    source: str
    folder: Folder
    exported: Exported

    JSON = members("source export=exported **folder")


@dataclass(frozen=True)
class Source:
    """A loaded torch model and what is known about it.

    view: its folder. outputs: those that the file must have, with the axes whose sizes vary. notes:
    for the report.
    """

    model: Any
    view: Path
    task: Task
    opset: int
    inputs: ForwardInputs
    vocabulary: Vocabulary
    outputs: Mapping[str, Mapping[int, str]]
    notes: list[str] = field(default_factory=list)


Route = Callable[[Source, Path], str]


def export_folder(
    folder: Folder,
    dest: Path,
    task: Task | None = None,
    opset: int = OPSET,
    routes: tuple[Route, ...] | None = None,
    dropped: tuple[str, ...] = (),
) -> Exported:
    """Write ``model.onnx``, its data file and the tokenizer into ``dest``, an empty folder.

    ``task`` None is read from config.json. ``dropped``: inputs that the file shall not have. Raises
    ModelError: a model of images, no weights or only pickled ones, unknown architecture, weights
    that do not fit the task, an input that would be lost, missing packages; GateError if the
    outputs of the file differ from the torch model's.
    """
    tasks.check_text(folder.path)
    chosen = task or tasks.task_of(folder.path)
    check_weights(folder)
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        view, exported = Path(scratch, "view"), Path(scratch, "made")
        _make_view(folder, view)
        source = _inspect(_load(view, chosen), view, folder.path, chosen, opset, dropped)
        route = _by_first_route(source, exported, routes or (by_optimum, by_torch))
        parity = _compared(source, exported / MODEL, route)
        files = sorted(p.name for p in exported.iterdir() if p.name.startswith(MODEL))
        for name in files:
            shutil.move(exported / name, dest / name)
        _add_tokenizer(folder, source, dest)
    return Exported(
        files=tuple(files),
        task=chosen,
        route=route,
        opset=opset,
        parity=parity,
        notes=tuple(source.notes),
    )


def check_weights(folder: Folder) -> None:
    """Raises ModelError if a folder has no safetensors, or its index names missing ones."""
    if not any(name.endswith(".safetensors") for name in folder.weights):
        pickled = next((s.name for s in folder.skipped if "pickle" in s.reason), None)
        raise ModelError(
            f"folder {str(folder.path)!r} holds no .safetensors weights"
            if pickled is None
            else f"folder {str(folder.path)!r} holds weights as a pickle only ({pickled}), which "
            "runs code when opened: if you trust it, load it in transformers and save it "
            "again with save_pretrained"
        )
    if _INDEX not in folder.weights:
        return
    shards = tasks.read_json(folder.path / _INDEX).get("weight_map")
    named = set(shards.values()) if isinstance(shards, dict) else set()
    foreign = sorted(str(name) for name in named - set(folder.weights))
    if foreign or not named:
        raise ModelError(
            f"{_INDEX} names weights {foreign[0]!r}, which the folder does not hold"
            if foreign
            else f"{_INDEX} has no weight_map of file names"
        )


def _make_view(folder: Folder, view: Path) -> None:
    """Links to the files that may be opened, and to no others."""
    for name in (*folder.companions, *folder.weights):
        link = view / name
        link.parent.mkdir(parents=True, exist_ok=True)
        _link((folder.path / name).resolve(), link)


def _link(file: Path, link: Path) -> None:
    """A link to the file. Windows makes symbolic ones only for users who may, and hard ones only on
    the same drive; else the file is copied. Raises OutputError where there is no room."""
    for attempt in (link.symlink_to, link.hardlink_to):
        with suppress(OSError):
            attempt(file)
            return
    try:
        shutil.copyfile(file, link)
    except OSError as e:
        raise OutputError(f"{str(file)!r} cannot be copied: {e.strerror}") from e


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings and logs of the exporters: what matters is in ``Exported``."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _load(view: Path, task: Task) -> Any:
    """The model in float32, all of its weights from the folder. Raises ModelError."""
    try:
        import torch
        import transformers
    except ImportError as e:
        raise ModelError(f"export needs torch and transformers ({e}): {INSTALL}") from e
    numbers = re.findall(r"\d+", transformers.__version__)
    if tuple(map(int, numbers[:2])) < OLDEST:
        raise ModelError(
            f"transformers {transformers.__version__} is too old, expected "
            f"{'.'.join(map(str, OLDEST))} or newer: {INSTALL}"
        )
    transformers.utils.logging.disable_progress_bar()
    try:
        model, info = _model_class(view, task).from_pretrained(
            view,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as e:  # transformers raises whatever it meets
        raise ModelError(
            f"transformers {transformers.__version__} cannot load the model: {_first_line(e)}"
        ) from e
    # transformers initializes a missing pooler at random; token outputs do not depend on it.
    missing = sorted(
        n for n in info["missing_keys"] if "pooler" not in n or task.outputs != _TOKENS
    )
    if missing:
        raise ModelError(
            f"the weights hold no {missing[0]!r}, so they are not those of a model for "
            f"{task.name}: give another --task"
        )
    return model.eval()


def _model_class(view: Path, task: Task) -> Any:
    """The class that config.json names if it is one of transformers for the task, else the task's.

    The model of an encoder alone (T5EncoderModel) or of one of two towers (CLIPTextModel) has the
    same configuration as the whole, so only its name tells.
    """
    import transformers

    name = tasks.architecture_of(view)
    named = getattr(transformers, name, None) if name is not None and task.is_of(name) else None
    is_model = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
    return named if is_model else getattr(transformers, task.auto)


def _inspect(
    model: Any, view: Path, folder: Path, task: Task, opset: int, dropped: tuple[str, ...]
) -> Source:
    """What the model takes and gives. Raises ModelError for inputs that the file would lose."""
    try:
        inputs = forward_inputs(
            model, tokenizer_gives_types=_tokenizer_gives_types(model, view), dropped=dropped
        )
        vocabulary = _vocabulary(model.config, view)
    except ModelError as e:
        raise ModelError(f"{e}: {_other_ways(model, folder)}") from e
    kind, feed = type(model).__name__, example_feed(inputs.kept, vocabulary, *SHAPES[0])
    try:
        given = _run(model, feed)
    except Exception as e:  # models raise whatever they like where an input is missing
        more = inputs.unknown or ("decoder_input_ids",) * bool(model.config.is_encoder_decoder)
        also = f"; it also takes {', '.join(more)}: {_other_ways(model, folder)}" if more else ""
        raise ModelError(
            f"{kind} does not run on {', '.join(inputs.kept)}: {_first_line(e)}{also}"
        ) from e
    lost = [name for name in inputs.unknown if _matters(model, feed, given, name)]
    if lost:
        drop = " ".join(f"--drop-input {name}" for name in lost)
        raise ModelError(
            f"{kind} takes {', '.join(lost)}, which the exported file would lose, since its valid "
            f"values are not known: qcompile export {drop} leaves it at the model's default; "
            f"{_other_ways(model, folder)}"
        )
    batch, length = SHAPES[0]
    longer = _run(model, example_feed(inputs.kept, vocabulary, batch + 1, length - 1))
    notes = [f"{name} is left at the model's default (--drop-input)" for name in dropped]
    outputs = {name: _open_axes(given[name], longer[name]) for name in _wanted(model, task, given)}
    return Source(model, view, task, opset, inputs, vocabulary, outputs, notes)


def _vocabulary(config: Any, view: Path) -> Vocabulary:
    """The values that inputs may have. Raises ModelError if config.json does not say."""
    size = getattr(config, "vocab_size", None)
    if not isinstance(size, int):
        raise ModelError(f"{type(config).__name__} has no vocab_size, expected a model of text")
    segments = getattr(config, "type_vocab_size", 2)
    longest = int(getattr(config, "max_position_embeddings", 0) or 512)
    return Vocabulary(
        size,
        int(getattr(config, "pad_token_id", None) or 0),
        segments if isinstance(segments, int) else 2,
        max(1, longest - 2),  # RoBERTa counts positions from two
        min(1000, int(getattr(config, "max_2d_position_embeddings", 1)) - 1),
        _tokenizer_config(view).get("padding_side") == "left",
    )


def _tokenizer_config(view: Path) -> dict[str, Any]:
    file = view / "tokenizer_config.json"
    return tasks.read_json(file) if file.is_file() else {}


def _tokenizer_gives_types(model: Any, view: Path) -> bool:
    """True if the model's tokenizer gives token_type_ids, by its settings or by its class."""
    import transformers
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    named = TOKENIZER_MAPPING_NAMES.get(model.config.model_type)
    classes = [named] if isinstance(named, str) else [*(named or ())]
    names = _tokenizer_config(view).get("model_input_names")
    for name in classes:
        try:
            names = names or getattr(getattr(transformers, name), "model_input_names", None)
        except (AttributeError, ImportError, TypeError):  # needs a package that is not here
            continue
    return TYPES in (names or ())


def _run(model: Any, feed: Mapping[str, Array]) -> dict[str, Array]:
    """All outputs of the torch model that are one tensor each."""
    import torch

    with torch.no_grad():
        tensors = {name: torch.from_numpy(value) for name, value in feed.items()}
        outputs = model(**tensors, return_dict=True)
    return {name: v.numpy() for name, v in outputs.items() if isinstance(v, torch.Tensor)}


def _matters(model: Any, feed: Mapping[str, Array], given: Mapping[str, Array], name: str) -> bool:
    """False if the outputs stay the same when an input is zeros or ones, one for each token."""
    for value in (0, 1):
        try:
            found = _run(model, {**feed, name: np.full_like(feed[IDS], value)})
        except Exception:  # of another shape or type, so nothing is known
            return True
        if any(not np.array_equal(found[n], v, equal_nan=True) for n, v in given.items()):
            return True
    return False


def _wanted(model: Any, task: Task, given: Mapping[str, Array]) -> tuple[str, ...]:
    """The outputs that the file must have: the task's, and what a text tower embeds text as.

    Raises ModelError if the model gives none of them.
    """
    is_tower = getattr(model.config, "base_config_key", "") == "text_config"
    names = [*task.outputs, *(n for n in _EMBEDDINGS if is_tower and n in given)]
    if task.outputs == _TOKENS and _TOKENS[0] not in given:
        names = [n for n in _EMBEDDINGS if n in given][:1]
    missing = next((n for n in names if n not in given), None) if names else task.outputs[0]
    if missing is not None:
        had = ", ".join(given) or "no tensor"
        raise ModelError(f"{type(model).__name__} gives {had}, expected {missing} for {task.name}")
    return tuple(dict.fromkeys(names))


def _open_axes(value: Array, other: Array) -> dict[int, str]:
    """The axes whose sizes follow the inputs', given two outputs of the shapes of two inputs."""
    sizes = enumerate(zip(value.shape, other.shape, strict=True))
    return {axis: _AXES.get(axis, f"axis_{axis}") for axis, (one, two) in sizes if one != two}


def _other_ways(model: Any, folder: Path) -> str:
    """What else can be done with a model that this module does not export."""
    import transformers

    kind = type(model).__name__
    ways = []
    for part in _PARTS:
        name = kind.removesuffix("Model").removesuffix("ForConditionalGeneration") + part
        if name != kind and hasattr(transformers, name):
            ways.append(
                f"for {name} alone: transformers.{name}.from_pretrained({str(folder)!r})"
                ".save_pretrained(PART), copy the tokenizer, and export PART"
            )
            break
    optimum_task = _optimum_task(model)
    if optimum_task is not None:
        ways.append(
            f"for the whole model: optimum-cli export onnx --model {folder} --task {optimum_task} "
            "DIR, then qcompile compile DIR with .npz data"
        )
    return "; ".join(ways) or "no other exporter is known for it"


def _optimum_task(model: Any) -> str | None:
    """The task for which optimum exports this model, None if it does not."""
    try:
        from optimum.exporters.tasks import TasksManager

        importlib.import_module("optimum.exporters.onnx.model_configs")  # registers what it exports

        task = TasksManager.infer_task_from_model(model)
        known = TasksManager.get_supported_tasks_for_model_type(
            model.config.model_type, "onnx", library_name="transformers"
        )
    except (ImportError, KeyError, ValueError):
        return None
    return str(task) if task in known else None


def _first_line(e: BaseException) -> str:
    """The first line of an error, after its type unless it is a QCompileError."""
    message = str(e) if isinstance(e, QCompileError) else f"{type(e).__name__}: {e}"
    return message.strip().splitlines()[0][:300]


def _by_first_route(source: Source, out: Path, routes: tuple[Route, ...]) -> str:
    """Export by the first route that works; errors of the others become notes.

    Returns the route's description. Raises ModelError if none works.
    """
    for route in routes:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        name = route.__name__.removeprefix("by_")
        try:
            description = route(source, out)
            _check_interface(source, out / MODEL)
            return description
        except ImportError as e:
            source.notes.append(
                f"{name}: {_first_line(e)} ({INSTALL}; these go together: {', '.join(TOGETHER)})"
            )
        except Exception as e:  # exporters raise whatever they meet
            source.notes.append(f"{name}: {_first_line(e)}")
    raise ModelError(f"the model cannot be exported: {'; '.join(source.notes)}")


def _check_interface(source: Source, path: Path) -> None:
    """Raises ModelError if a file lost an input or an output, or has inputs that cannot be fed."""
    model, _storage = read_model.read_model(path)
    has = {tensor.name for tensor in model.graph.input}
    gives = {tensor.name for tensor in model.graph.output}
    for name in source.inputs.kept:
        if name not in has:
            raise ModelError(f"the file lost input {name!r}")
    for name in sorted(has):
        if name not in FED:
            raise ModelError(f"the file has input {name!r}, expected {', '.join(FED)} only")
        if name in source.inputs.dropped:
            raise ModelError(f"the file has input {name!r}, which is to be dropped")
    for name in source.outputs:
        if name not in gives:
            raise ModelError(f"the file has no output {name!r}")


def _compared(source: Source, path: Path, route: str) -> Parity:
    """Compare the file with the model. Raises what ``compare_with_torch`` does, with the route."""
    try:
        return torch_parity.compare_with_torch(
            path, lambda feed: _run(source.model, feed), source.vocabulary
        )
    except (GateError, ModelError) as e:
        tried = "".join(f"; {note}" for note in source.notes)
        raise type(e)(f"{_first_line(e)}; exported by {route}{tried}") from e


def by_optimum(source: Source, out: Path) -> str:
    """Export as optimum-cli does after it has loaded the model; returns name and version."""
    from importlib.metadata import version

    from optimum.exporters.onnx import onnx_export_from_model

    onnx_export_from_model(
        source.model, out, opset=source.opset, task=source.task.name, do_validation=False
    )
    return f"optimum-onnx {version('optimum-onnx')}"


def by_torch(source: Source, out: Path) -> str:
    """Export by torch's tracing exporter, with dynamic batch and sequence axes."""
    import torch

    names, model, outputs = source.inputs.kept, source.model, tuple(source.outputs)

    class Narrow(torch.nn.Module):  # type: ignore[misc]
        """These inputs by position and these outputs only: others confuse the tracer."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *values: Any) -> tuple[Any, ...]:
            by_name = self.model(**dict(zip(names, values, strict=True)), return_dict=True)
            return tuple(by_name[name] for name in outputs)

    feed = example_feed(names, source.vocabulary, *SHAPES[0])
    tensors = tuple(torch.from_numpy(feed[name]) for name in names)
    narrow = Narrow().eval()  # the exporter restores the model to the mode of its wrapper
    axes = {**dict.fromkeys(names, _AXES), **source.outputs}
    torch.onnx.export(
        narrow,
        tensors,
        str(out / MODEL),
        dynamo=False,
        opset_version=source.opset,
        input_names=list(names),
        output_names=list(outputs),
        dynamic_axes=axes,
    )
    return f"torch.onnx.export, torch {torch.__version__}"


def _add_tokenizer(folder: Folder, source: Source, dest: Path) -> None:
    """Write tokenizer.json if the folder has the tokenizer only in an older format."""
    if folder.tokenizer is not None:
        return
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source.view, use_fast=True, trust_remote_code=False, local_files_only=True
        )
        _check_vocabulary(tokenizer, folder)
        tokenizer.backend_tokenizer.save(str(dest / layout.TOKENIZER))
    except Exception as e:
        source.notes.append(f"no {layout.TOKENIZER} could be made: {_first_line(e)}")


def _check_vocabulary(tokenizer: Any, folder: Folder) -> None:
    """Raises ModelError if a file is missing: transformers 5 then invents a vocabulary."""
    names = {k: n for k, n in tokenizer.vocab_files_names.items() if k != "tokenizer_file"}
    missing = [name for name in names.values() if name not in folder.companions]
    if missing or not names:
        expected = missing[0] if missing else layout.TOKENIZER
        raise ModelError(f"the folder holds no {expected}")
