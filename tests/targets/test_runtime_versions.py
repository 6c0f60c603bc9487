"""The oldest onnxruntime that a file needs, from its format and the forms of weights in it."""

from __future__ import annotations

from collections.abc import Sequence
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import onnx
import pytest

import qcompile
from qcompile import Gates, Options, Recipe
from qcompile.errors import ModelError
from qcompile.rewriting.testing import model_proto, normal
from qcompile.runtime import session
from qcompile.targets.runtime_versions import (
    FORMS,
    IR_VERSIONS,
    OLDEST,
    OPSETS,
    Feature,
    OldRuntimeError,
    newest_feature,
    release,
)
from tests import newer_runtime
from tools import first_runtime

ROOT = Path(__file__).parent.parent.parent
LATEST = "99.0"
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
OFF = Gates(min_cosine=None, min_worst_cosine=None, min_r2=None, max_size_ratio=None)


def made(op: str, domain: str = "", **attributes: Any) -> onnx.ModelProto:
    """A node with these attributes."""
    node = onnx.helper.make_node(op, ["w"], ["y"], domain=domain, **attributes)
    constant = onnx.helper.make_tensor("w", onnx.TensorProto.UINT8, [2], [1, 0])
    return saved([node], [constant])


def saved(
    nodes: Sequence[onnx.NodeProto] = (),
    constants: Sequence[onnx.TensorProto] = (),
    opset: int = 21,
    ir_version: int = 10,
) -> onnx.ModelProto:
    graph = onnx.helper.make_graph(nodes, "g", [], [], constants)
    opsets = [onnx.helper.make_opsetid("", opset)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)


def contrib(op: str, **attributes: Any) -> onnx.ModelProto:
    return made(op, domain="com.microsoft", **attributes)


@pytest.mark.parametrize(
    ("model", "provider", "since"),
    [
        (contrib("GatherBlockQuantized", bits=2), CPU, (1, 27)),
        (contrib("GatherBlockQuantized", bits=2), CUDA, None),
        (contrib("GatherBlockQuantized", bits=4), CPU, None),
        (made("GatherBlockQuantized", bits=2), CPU, None),
        (contrib("MatMulNBits", bits=2), CPU, None),
        (saved(opset=25), CUDA, None),
        (saved(opset=26), CUDA, (1, 25)),
        (saved(opset=27), CPU, (1, 32)),
        (saved(ir_version=13), CPU, None),
        (saved(ir_version=14), CPU, (1, 32)),
    ],
)
def test_what_a_model_needs(
    model: onnx.ModelProto, provider: str, since: tuple[int, int] | None
) -> None:
    feature = newest_feature(model, provider, LATEST)
    assert (feature.since if feature else None) == since


def test_a_body_counts_too_and_the_newest_decides() -> None:
    inner = contrib("GatherBlockQuantized", bits=2).graph.node[0]
    body = onnx.helper.make_graph([inner], "b", [], [])
    model = saved(opset=26)
    model.graph.node.append(
        onnx.helper.make_node("If", ["c"], ["z"], then_branch=body, else_branch=body)
    )
    feature = newest_feature(model, CPU, LATEST)
    assert feature is not None and feature.since == (1, 27)


def notes(**settings: Any) -> list[str]:
    text = "g (int64[B,9] ids) => (float[B,9,128] y) { e = Gather(t, ids) y = MatMul(e, w) }"
    model = model_proto(text, t=normal(600, 128), w=normal(128, 128))
    recipe = Recipe(**settings)
    options = Options(bench=False, threads=1)
    feeds = [first_runtime.feed()]
    result = qcompile.compile(model, feeds, recipe=recipe, gates=OFF, options=options)
    return list(result.report.note_texts)


PACKED = {"mode": "weight-only", "embedding_bits": 2, "forms": (("table", "packed"),)}


def test_the_report_says_it() -> None:
    note = "onnxruntime 1.27 or later: it has GatherBlockQuantized of 2 bits"
    assert any(note in text for text in notes(**PACKED))


@pytest.mark.parametrize("settings", [{}, {"mode": "weight-only"}, {"weight_bits": 4}])
def test_files_that_all_versions_run_have_no_such_note(settings: dict[str, Any]) -> None:
    assert not any("or later: it has" in text for text in notes(**settings))


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "version", lambda: "1.24.3")


REFUSED = r"found onnxruntime 1\.24\.3, expected 1\.27 or later"


@pytest.mark.usefixtures("old")
def test_a_compilation_is_refused_by_the_version_it_needs() -> None:
    with pytest.raises(ModelError, match=f"the compiled model has .* of 2 bits: {REFUSED}"):
        notes(**PACKED)


@pytest.mark.usefixtures("old")
def test_a_file_is_refused_by_the_version_it_needs(tmp_path: Path) -> None:
    """Wherever it is loaded; what is no model is left to ONNX Runtime's message."""
    data = contrib("GatherBlockQuantized", bits=2).SerializeToString()
    with pytest.raises(ModelError, match=REFUSED):
        session.Session(data)
    with pytest.raises(ModelError, match=REFUSED):
        session.optimized_ops(data)
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(ModelError, match=REFUSED):
        qcompile.session(tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="cannot load the model"):
        session.Session(b"no model")


def test_a_version_that_runs_all_reads_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "version", lambda: "1.33.0.dev1")
    monkeypatch.setattr("qcompile.ir.model_io.read_model.read_model", None)
    session._check_version(b"", CPU)


def test_a_test_is_skipped_only_for_the_installed_version() -> None:
    """Not where it set a version of its own, nor for other errors."""
    for since, expected in (((99, 0), pytest.skip.Exception), ((1, 0), ModelError)):
        error = ModelError("later")
        error.__context__ = OldRuntimeError(Feature("f", since, "wait"), "0.1", "m")
        with pytest.raises(expected), newer_runtime.skips():
            raise error


def required(name: str) -> str:
    """The oldest version of a package in setup.cfg."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["install_requires"].splitlines()
    return next(x.removeprefix(f"{name}>=") for x in lines if x.startswith(f"{name}>="))


def test_the_oldest_one_is_what_the_package_asks_for() -> None:
    assert required("onnxruntime") == OLDEST
    page = (ROOT / "docs" / "platforms.md").read_text(encoding="utf-8")
    assert f"| ONNX Runtime | {OLDEST} and newer |" in page
    tables = (*(form.since for form in FORMS), *OPSETS.values(), *IR_VERSIONS.values())
    assert min(tables) > release(OLDEST)  # nothing that all supported versions run


def test_the_page_has_the_table() -> None:
    page = (ROOT / "docs" / "platforms.md").read_text(encoding="utf-8")
    names = {form.name: form.since for form in FORMS}
    names |= {f"opset {opset}": since for opset, since in OPSETS.items()}
    names |= {f"IR version {ir}": since for ir, since in IR_VERSIONS.items()}
    for name, since in names.items():
        assert f"| {name} | {'.'.join(map(str, since))} |" in page


def test_the_tool_compares_with_what_it_kept(tmp_path: Path) -> None:
    first_runtime.write(tmp_path, ["cpu-static-4", "opset-22"])
    same = ["cpu-static-4: the same", "opset-22: the same"]
    assert list(first_runtime.compared(tmp_path)) == same
    (tmp_path / "other.onnx").write_bytes(b"no model")
    (tmp_path / "other.npz").write_bytes((tmp_path / "cpu-static-4.npz").read_bytes())
    (*_, failed) = sorted(first_runtime.compared(tmp_path), key=lambda line: "same" not in line)
    assert failed.startswith("other: ") and "the same" not in failed
