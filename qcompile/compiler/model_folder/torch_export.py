"""A transformers model as an ONNX folder: by optimum, else by ``torch.onnx.export``.

The only module that knows torch, transformers and optimum; they are imported when a model is
exported, and need the extra ``export``. optimum-onnx requires transformers below 4.58, so with a
newer one, or if optimum does not know an architecture, torch exports alone. In both cases the file
is compared with the torch model before it is accepted.

transformers sees a view of the folder: links to the files that ``layout.py`` accepts. Pickles and
Python files are not in it, so nothing can open them.
"""

from __future__ import annotations

import io
import logging
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qcompile.compiler.model_folder import layout, tasks, torch_parity
from qcompile.compiler.model_folder.layout import Folder
from qcompile.compiler.model_folder.tasks import Task
from qcompile.compiler.model_folder.torch_parity import Parity, Vocabulary
from qcompile.errors import GateError, ModelError, QCompileError
from qcompile.ir.model_io import read_model
from qcompile.quant import Array
from qcompile.system.json_values import Record, members

MODEL = "model.onnx"
OPSET = 18
INSTALL = "pip install -e '.[export]' in a checkout"
# Versions that the extra installs: optimum-onnx requires transformers below 4.58.
TOGETHER = ("optimum-onnx 0.1.0", "transformers 4.57.6", "torch 2.13.0")
OLDEST = (4, 56)  # transformers: the first version whose from_pretrained has the argument dtype
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_AXES = {0: "batch_size", 1: "sequence_length"}
_INDEX = "model.safetensors.index.json"
_TOKENS = ("last_hidden_state",)


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
class FolderAccount(Record):
    """The inputs of a folder that was compiled; ``exported`` if it had no ONNX file."""

    source: str
    folder: Folder
    exported: Exported | None

    JSON = members("source **folder export=exported?")


@dataclass(frozen=True)
class ExportAccount(Record):
    """The inputs of a folder that was exported."""

    source: str
    folder: Folder
    exported: Exported

    JSON = members("source export=exported **folder")


@dataclass(frozen=True)
class Source:
    """A loaded torch model, its folder, the task and opset to export, and notes for the report."""

    model: Any
    view: Path
    task: Task
    opset: int
    notes: list[str] = field(default_factory=list)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the model's inputs; token_type_ids only if it has several types of them."""
        import inspect

        parameters = inspect.signature(self.model.forward).parameters
        several = getattr(self.model.config, "type_vocab_size", 0) > 1
        return tuple(n for n in _INPUTS if n in parameters and (several or n != _INPUTS[2]))

    @property
    def vocabulary(self) -> Vocabulary:
        """The values that inputs may have."""
        config = self.model.config
        longest = int(getattr(config, "max_position_embeddings", 0) or 512)
        return Vocabulary(
            int(config.vocab_size),
            int(getattr(config, "pad_token_id", None) or 0),
            int(getattr(config, "type_vocab_size", 0)),
            max(1, longest - 2),  # RoBERTa counts positions from two
        )


Route = Callable[[Source, Path], str]


def export_folder(
    folder: Folder,
    dest: Path,
    task: Task | None = None,
    opset: int = OPSET,
    routes: tuple[Route, ...] | None = None,
) -> Exported:
    """Write ``model.onnx``, its data file and the tokenizer into ``dest``, an empty folder.

    ``task`` None is read from config.json. Raises ModelError: no weights or only pickled ones,
    unknown architecture, weights that do not fit the task, missing packages; GateError if the
    outputs of the file differ from the torch model's.
    """
    chosen = task or tasks.task_of(folder.path)
    check_weights(folder)
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        view, exported = Path(scratch, "view"), Path(scratch, "made")
        _make_view(folder, view)
        source = Source(_load(view, chosen), view, chosen, opset)
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
        link.symlink_to((folder.path / name).resolve())


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
        model, info = getattr(transformers, task.auto).from_pretrained(
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
            _check_inputs(out / MODEL)
            return description
        except ImportError as e:
            source.notes.append(f"{name}: {_first_line(e)} ({INSTALL} takes {', '.join(TOGETHER)})")
        except Exception as e:  # exporters raise whatever they meet
            source.notes.append(f"{name}: {_first_line(e)}")
    raise ModelError(f"the model cannot be exported: {'; '.join(source.notes)}")


def _check_inputs(path: Path) -> None:
    """Raises ModelError if a file has inputs that a tokenizer does not give."""
    model, _storage = read_model.read_model(path)
    for tensor in model.graph.input:
        if tensor.name not in _INPUTS:
            raise ModelError(f"the file has input {tensor.name!r}, expected tokens only")


def _compared(source: Source, path: Path, route: str) -> Parity:
    """Compare the file with the model. Raises what ``compare_with_torch`` does, with the route."""
    try:
        return torch_parity.compare_with_torch(path, _reference(source), source.vocabulary)
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

    names, model, outputs = source.inputs, source.model, source.task.outputs

    class Narrow(torch.nn.Module):  # type: ignore[misc]
        """These inputs by position and these outputs only: others confuse the tracer."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *values: Any) -> tuple[Any, ...]:
            by_name = self.model(**dict(zip(names, values, strict=True)), return_dict=True)
            return tuple(by_name[name] for name in outputs)

    feed = torch_parity.example_feed(names, source.vocabulary, *torch_parity.SHAPES[0])
    tensors = tuple(torch.from_numpy(feed[name]) for name in names)
    narrow = Narrow().eval()  # the exporter restores the model to the mode of its wrapper
    axes = dict.fromkeys(names, _AXES)
    axes |= dict.fromkeys(outputs, _AXES if source.task.by_token else {0: _AXES[0]})
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


def _reference(source: Source) -> Callable[[Mapping[str, Array]], Mapping[str, Array]]:
    """The torch model as a function of arrays."""
    import torch

    def run(feed: Mapping[str, Array]) -> Mapping[str, Array]:
        with torch.no_grad():
            tensors = {name: torch.from_numpy(value) for name, value in feed.items()}
            outputs = source.model(**tensors, return_dict=True)
        return {name: outputs[name].numpy() for name in source.task.outputs}

    return run


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
