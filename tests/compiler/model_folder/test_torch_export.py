"""Exporting: what may be opened, which refusals come before torch, and both routes with it.

Tests with torch need the extra ``export``; CI has none, so they skip there.
"""

from __future__ import annotations

import configparser
import importlib.util
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from packaging.requirements import Requirement
from tokenizers import Tokenizer

from qcompile.compiler.model_folder import layout, torch_export, torch_parity
from qcompile.compiler.model_folder.torch_parity import TOLERANCE, Vocabulary, example_feed
from qcompile.errors import ModelError
from qcompile.runtime.session import Session
from tests.command_line import ROOT, assert_one_line, run

# torch and transformers warn where they are imported, which exporting does late.
pytestmark = pytest.mark.filterwarnings("ignore")
VOCABULARY = Vocabulary(size=1000, padding=0, segments=2, longest=128)


def installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in names)


needs_torch = pytest.mark.skipif(
    not installed("torch", "transformers"), reason="needs torch and transformers (extra export)"
)
needs_optimum = pytest.mark.skipif(
    not installed("torch", "transformers", "optimum"), reason="needs optimum (extra export)"
)


def folder(root: Path, **files: object) -> Path:
    """A transformers folder; ``__`` stands for a dot in names."""
    root.mkdir(exist_ok=True)
    for name, content in {"config__json": {"architectures": ["BertModel"]}, **files}.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (root / name.replace("__", ".")).write_text(text)
    return root


def test_pickled_weights_are_refused_with_the_next_step(tmp_path: Path) -> None:
    root = folder(tmp_path / "in", pytorch_model__bin="no pickle")
    for command in ("export", "compile"):
        result = run(command, root, "-o", tmp_path / "out")
        assert_one_line(result, 2, "as a pickle only (pytorch_model.bin)", "save_pretrained")
    assert not (tmp_path / "out").exists()


def test_no_weights_at_all(tmp_path: Path) -> None:
    root = folder(tmp_path / "in")
    assert_one_line(run("export", root, "-o", tmp_path / "out"), 2, "no .safetensors weights")
    assert_one_line(run("compile", root, "-o", tmp_path / "out"), 2, "no .safetensors weights to")


def test_a_folder_of_onnx_files_is_sent_to_compile(tmp_path: Path) -> None:
    root = folder(tmp_path / "in", model__onnx="x")
    assert_one_line(run("export", root, "-o", tmp_path / "out"), 2, f"qcompile compile {root} -o")


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({"weight_map": {"w": "../secret.safetensors"}}, "'../secret.safetensors', which the"),
        ({"weight_map": {"w": "/etc/passwd"}}, "'/etc/passwd', which the folder does not hold"),
        ({"weight_map": {"w": "pytorch_model.bin"}}, "'pytorch_model.bin'"),
        ({"weight_map": []}, "has no weight_map"),
        ({}, "has no weight_map"),
        ("{", "is not JSON"),
    ],
)
def test_an_index_names_weights_of_its_folder(tmp_path: Path, index: object, said: str) -> None:
    files = {"model__safetensors": "x", "model__safetensors__index__json": index}
    with pytest.raises(ModelError, match=said.replace(".", r"\.")):
        torch_export.check_weights(layout.read_folder(folder(tmp_path / "in", **files)))


def test_an_unknown_architecture_needs_a_task(tmp_path: Path) -> None:
    files = {"model__safetensors": "x", "config__json": {"architectures": ["OddModelForTwo"]}}
    result = run("export", folder(tmp_path / "in", **files), "-o", tmp_path / "out")
    assert_one_line(result, 2, "'OddModelForTwo'", "give --task")


@pytest.mark.skipif(installed("torch", "transformers"), reason="has what others lack")
def test_missing_extras_are_one_line(tmp_path: Path) -> None:
    root = folder(tmp_path / "in", model__safetensors="x")
    result = run("export", root, "-o", tmp_path / "out")
    assert_one_line(result, 2, "needs torch and transformers", "pip install -e '.[export]'")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_name_that_is_neither(tmp_path: Path) -> None:
    assert_one_line(run("export", "/no/folder", "-o", tmp_path / "o"), 2, "neither a folder nor a")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT for two labels with random weights, made in a process of its own."""
    root = tmp_path_factory.mktemp("trained") / "bert"
    code = (
        "import sys; from pathlib import Path; from models._random_encoders import write; "
        "write('bert', 'text-classification', Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, str(root)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return root


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "in"))


@needs_optimum
def test_optimum_exports(copied: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = json.loads(run("export", copied, "-o", out, "--json").stdout)
    assert found["export"]["task"] == "text-classification"  # as config.json says
    assert found["export"]["route"].startswith("optimum-onnx ")
    assert 0 <= found["export"]["parity"]["worst"] < TOLERANCE
    names = {p.name for p in out.iterdir()}
    assert {"model.onnx", "config.json", "tokenizer.json", "qcompile.json"} <= names
    assert not names & {"model.safetensors"}
    assert (out / "config.json").read_bytes() == (copied / "config.json").read_bytes()
    encoder = run("export", copied, "-o", out, "--task", "feature-extraction")
    assert encoder.exit_code == 0, encoder.output  # the same weights without the head
    assert "differs from torch by" in encoder.stdout and "next:" in encoder.stdout
    assert [o.name for o in onnx.load(out / "model.onnx").graph.output] == ["last_hidden_state"]


@needs_torch
def test_torch_exports_where_optimum_cannot(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with transformers 5, for which optimum-onnx has no release: the same model comes out."""
    out, alone = tmp_path / "out", tmp_path / "alone"
    monkeypatch.setitem(sys.modules, "optimum.exporters.onnx", None)
    found = json.loads(run("export", copied, "-o", alone, "--json").stdout)["export"]
    assert found["route"].startswith("torch.onnx.export") and found["parity"]["worst"] < TOLERANCE
    (note,) = found["notes"]
    assert note.startswith("optimum: ModuleNotFoundError") and torch_export.INSTALL in note
    assert "together: optimum-onnx 0.1.0, transformers 4.57.6" in note
    monkeypatch.undo()
    if not installed("optimum"):
        return
    assert run("export", copied, "-o", out).exit_code == 0
    feed = example_feed(("input_ids", "attention_mask", "token_type_ids"), VOCABULARY, 2, 9)
    one, other = (Session(f / "model.onnx").run(feed)["logits"] for f in (out, alone))
    np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE * np.abs(one).max())


@needs_torch
def test_where_no_route_works_all_refusals_are_told(copied: Path, tmp_path: Path) -> None:
    def by_luck(_source: object, _made: Path) -> str:
        raise RuntimeError("no luck\nat all")

    with pytest.raises(ModelError, match=r"cannot be exported: luck: RuntimeError: no luck$"):
        torch_export.export_folder(layout.read_folder(copied), tmp_path, routes=(by_luck,))


@needs_torch
def test_a_file_that_wants_more_than_tokens_is_not_taken(copied: Path, tmp_path: Path) -> None:
    """As optimum's of Longformer, which has a global_attention_mask."""

    def by_luck(source: torch_export.Source, made: Path) -> str:
        torch_export.by_torch(source, made)
        proto = onnx.load(made / "model.onnx")
        proto.graph.input.append(onnx.ValueInfoProto(name="global_attention_mask"))
        onnx.save(proto, made / "model.onnx")
        return "luck"

    said = "cannot be exported: luck: the file has input 'global_attention_mask', expected input"
    with pytest.raises(ModelError, match=said):
        torch_export.export_folder(layout.read_folder(copied), tmp_path, routes=(by_luck,))
    (tmp_path / "out").mkdir()
    made = torch_export.export_folder(
        layout.read_folder(copied), tmp_path / "out", routes=(by_luck, torch_export.by_torch)
    )
    assert made.route.startswith("torch.onnx.export") and len(made.notes) == 1


@needs_torch
def test_a_transformers_too_old_is_told(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    monkeypatch.setattr(transformers, "__version__", "4.55.0.dev0")
    result = run("export", copied, "-o", tmp_path / "out")
    assert_one_line(result, 2, "transformers 4.55.0.dev0 is too old, expected 4.56", "pip install")


def test_versions_that_are_named_are_those_of_ci() -> None:
    """And within the ranges of the extra."""
    constraints = (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8").split()
    assert {named.replace(" ", "==") for named in torch_export.TOGETHER} <= set(constraints)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extra = list(map(Requirement, setup["options.extras_require"]["export"].split()))
    ranges = {requirement.name: requirement.specifier for requirement in extra}
    for name, version in (named.split() for named in torch_export.TOGETHER):
        assert version in ranges[name]
    assert str(ranges["transformers"]).startswith(f"<6,>={'.'.join(map(str, torch_export.OLDEST))}")


@needs_torch
def test_what_differs_from_torch_is_not_written(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_parity, "TOLERANCE", 0.0)
    result = run("export", copied, "-o", tmp_path / "out")
    assert_one_line(result, 1, "differs from torch: 'logits' by", "at most; exported by ")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@needs_torch
def test_weights_of_another_task_are_refused(copied: Path, tmp_path: Path) -> None:
    result = run("export", copied, "-o", tmp_path / "out", "--task", "question-answering")
    assert_one_line(result, 2, "hold no 'qa_outputs.bias'", "question-answering")


@needs_torch
def test_damaged_weights_are_one_line(copied: Path, tmp_path: Path) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert_one_line(run("export", copied, "-o", tmp_path / "out"), 2, "cannot load the model")


@needs_torch
def test_neither_pickles_nor_code_run(copied: Path, tmp_path: Path) -> None:
    """A pickle beside the weights, code that config.json and the tokenizer ask for."""
    boom = tmp_path / "boom"
    (copied / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(boom)))
    for name in ("modeling_mine.py", "tokenization_mine.py"):
        (copied / name).write_text(f"import pathlib; pathlib.Path({str(boom)!r}).touch()")
    for name, key in (("config.json", "AutoModelForSequenceClassification"),
                      ("tokenizer_config.json", "AutoTokenizer")):  # fmt: skip
        config = json.loads((copied / name).read_text())
        config["auto_map"] = {key: "modeling_mine.Mine"}
        (copied / name).write_text(json.dumps(config))
    (copied / "tokenizer.json").unlink()  # so that the tokenizer is loaded too
    result = run("export", copied, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert not boom.exists()
    assert not list((tmp_path / "out").glob("*.py"))
    (copied / "model.safetensors").unlink()
    assert run("export", copied, "-o", tmp_path / "out").exit_code == 2
    assert not boom.exists()


class Bomb:
    """Writes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


@needs_torch
def test_an_older_tokenizer_becomes_tokenizer_json(copied: Path, tmp_path: Path) -> None:
    vocabulary = json.loads((copied / "tokenizer.json").read_text())["model"]["vocab"]
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (copied / name).unlink(missing_ok=True)  # transformers 5 writes no map
    (copied / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=lambda w: vocabulary[w])))
    result = run("export", copied, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    made = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert made.encode("the").tokens[0] == "[CLS]"
    (copied / "vocab.txt").unlink()
    again = run("export", copied, "-o", tmp_path / "out")
    assert again.exit_code == 0 and "no tokenizer.json could be made" in again.stdout


@needs_torch
def test_compile_exports_first(copied: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("compile", copied, "-o", out, "--mode", "dynamic", "--no-bench")
    assert result.exit_code == 0, result.output
    route = "optimum" if installed("optimum") else "torch.onnx.export"
    assert f"exported: text-classification by {route}" in result.stdout
    manifest = json.loads((out / "qcompile.json").read_text())
    assert manifest["export"]["parity"]["worst"] < TOLERANCE and manifest["source"] == "in"
    assert (out / "model.report.json").is_file() and (out / "tokenizer.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
