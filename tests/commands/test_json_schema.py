"""What commands print with --json is JSON, fits its schema, and has no key that is not in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jsonschema
import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from qcompile.commands.cli import main
from qcompile.compiler.model_folder import layout
from qcompile.compiler.model_folder.tasks import TASKS
from qcompile.compiler.model_folder.torch_export import ExportAccount, Exported
from qcompile.compiler.model_folder.torch_parity import Parity
from qcompile.ir.model_io.to_proto import to_proto
from qcompile.planning import Skip
from qcompile.rewriting.testing import encoder
from qcompile.system.json_values import Record, Unbounded, members
from tests.compiler.model_folder.written_folder import write_folder
from tools import json_schema

SCHEMA = json_schema.FILE
PLAIN = ("--recipe", "per-tensor", "--target", "qdq", "--threads", 1)


def schema() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(SCHEMA.read_text())
    return found


def validator(command: str) -> jsonschema.Draft202012Validator:
    whole = schema()
    return jsonschema.Draft202012Validator({"$defs": whole["$defs"], "$ref": f"#/$defs/{command}"})


def undocumented(value: Any, part: dict[str, Any], where: str = "") -> Iterator[str]:
    """Keys of objects that their schema lists no property for."""
    if "$ref" in part:
        part = schema()["$defs"][part["$ref"].rpartition("/")[2]]
        yield from undocumented(value, part, where)
    for option in part.get("anyOf", ()):
        if jsonschema.Draft202012Validator({"$defs": schema()["$defs"], **option}).is_valid(value):
            yield from undocumented(value, option, where)
    if isinstance(value, list) and "items" in part:
        for i, item in enumerate(value):
            yield from undocumented(item, part["items"], f"{where}[{i}]")
    if isinstance(value, dict) and "properties" in part:
        for key, item in value.items():
            if key not in part["properties"]:
                yield f"{where}.{key}"
            else:
                yield from undocumented(item, part["properties"][key], f"{where}.{key}")


def faults(command: str, text: str) -> list[str]:
    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    value = json.loads(text, parse_constant=no_constant)
    found = [f"{e.json_path}: {e.message}" for e in validator(command).iter_errors(value)]
    keys = undocumented(value, {"$ref": f"#/$defs/{command}"})
    return [*found, *(f"{k} is not in {SCHEMA.name}" for k in keys)]


def run(*args: object) -> str:
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its data, and two compiled forms of it, one found by a search."""
    made = tmp_path_factory.mktemp("json")
    onnx.save(to_proto(encoder(1, width=16, outlier=40.0)), made / "m.onnx")
    ids = np.random.default_rng(3).integers(0, 64, (32, 7))
    np.savez(made / "x.npz", ids=ids, attention_mask=np.ones_like(ids))
    common = (
        "compile",
        made / "m.onnx",
        "--data",
        made / "x.npz",
        "--no-cache",
        "--force",
        "--json",
    )
    (made / "a.json").write_text(run(*common, "-o", made / "a.onnx", "--threads", 1))
    searched = (*PLAIN, "--min-cosine", 0.995, "--no-bench")
    (made / "b.json").write_text(run(*common, "-o", made / "b.onnx", *searched))
    return made


def outputs(folder: Path) -> Iterator[tuple[str, str]]:
    """Command and what it printed."""
    model, a, b, data = (folder / n for n in ("m.onnx", "a.onnx", "b.onnx", "x.npz"))
    for name in ("a", "b"):
        yield "compile", (folder / f"{name}.json").read_text()
        yield "compile", (folder / f"{name}.report.json").read_text()
    yield "verify", run("verify", model, a, "--data", data, "--json")
    yield "verify", run("verify", model, model, "--data", data, "--json")  # infinite SQNR
    quick = ("--rounds", 1, "--seconds", 0.01, "--dim", "B=2", "--dim", "S=5", "--json", "-")
    yield "bench", run("bench", model, a, *quick)
    yield "bench", run("bench", model, "--profile", *quick)
    yield "bench", run("bench", model, a, "--streams", 2, "--arrival", 2000, *quick)
    ranked = ("sensitivity", model, "--data", data, *PLAIN, "--no-cache", "--json")
    yield "sensitivity", run(*ranked, "--lift", 1, "-o", folder / "p.yaml")
    yield "sensitivity", run(*ranked, "--measure", "alone", "--by", "role")
    yield "inspect", run("inspect", a, "--json")
    yield "inspect", run("inspect", model, "--json")
    source = write_folder(folder / "models")
    yield "folder", run("compile", source, "-o", folder / "out", "--no-bench", "--json")
    yield "export", json.dumps(exported(source))
    yield "diff", run("diff", a, b, "--json")
    yield "diff", run("diff", a, a, "--json")
    for command in ("passes", "calibrators", "targets", "recipes"):
        yield command, run(command, "--json")


def exported(folder: Path) -> dict[str, Any]:
    """What export tells, which here has no torch to run with."""
    found = Parity(1e-6, "logits", ((2, 16),))
    made = Exported(("model.onnx",), TASKS[0], "optimum-onnx 0.1.0", 18, found, ("a note",))
    return ExportAccount("models", layout.read_folder(folder), made).to_dict()


def test_every_output_fits_its_schema(folder: Path) -> None:
    seen = set[str]()
    for command, text in outputs(folder):
        assert faults(command, text) == [], command
        seen.add(command)
    parts = set(re.findall(r"#/\$defs/(\w+)", SCHEMA.read_text()))
    assert seen | parts | {"demo"} == set(schema()["$defs"])  # demo prints what compile does
    assert seen | {"demo"} == set(json_schema.COMMANDS)


def test_the_schema_itself_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())


def test_the_file_is_what_the_records_say() -> None:
    assert SCHEMA.read_text() == json_schema.text(), "run python -m tools.json_schema"


@dataclass
class _Changed(Record):
    key: Annotated[list[tuple[str, float]] | None, "a remark"]
    bounds: Unbounded
    JSON = members("renamed=key? bounds both{}")

    @property
    def both(self) -> Skip | None:
        """Said of it. And more."""
        return None


def test_a_change_of_a_record_changes_the_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(json_schema.COMMANDS, "inspect", _Changed)
    assert SCHEMA.read_text() != json_schema.text()
    pair = [{"type": "string"}, {"type": "number"}]
    items = {"type": "array", "prefixItems": pair, "minItems": 2, "maxItems": 2}
    optional = [{"$ref": "#/$defs/Skip"}, {"type": "object", "maxProperties": 0}]
    made = json.loads(json_schema.text())["$defs"]
    assert made["_Changed"]["properties"] == {
        "renamed": {"type": "array", "items": items, "description": "a remark"},
        "bounds": {"type": ["number", "null"]},
        "both": {"anyOf": optional, "description": "Said of it"},
    }
    assert made["_Changed"]["required"] == ["bounds", "both"]


def test_what_json_cannot_hold_is_no_record() -> None:
    with pytest.raises(TypeError, match="has no place in JSON"):
        json_schema.Schemas().of(list[complex])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"samples"', '"simples"', "'samples' is a required property"),
        ('"samples"', '"more": 1, "samples"', ".more is not in output.json"),
        ('"mean_cosine"', '"own": 0, "mean_cosine"', ".outputs[0].own is not in"),
        ('"failures": []', '"failures": null', "$.failures: None is not of type 'array'"),
    ],
)
def test_the_check_sees_a_fault(folder: Path, old: str, new: str, said: str) -> None:
    command = ("verify", folder / "m.onnx", folder / "a.onnx", "--data", folder / "x.npz", "--json")
    text = run(*command)
    assert old in text
    assert any(said in fault for fault in faults("verify", text.replace(old, new)))
    with pytest.raises(ValueError, match="Infinity is no JSON"):
        faults("verify", text.replace('"samples": ', '"samples": Infinity, "x": '))
