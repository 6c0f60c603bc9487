"""The oldest onnxruntime that a file needs, from the forms of weights in it."""

from __future__ import annotations

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
from qcompile.targets.runtime_versions import FORMS, SUPPORTED, newest_form
from tools import first_runtime

ROOT = Path(__file__).parent.parent.parent
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
OFF = Gates(min_cosine=None, min_worst_cosine=None, min_r2=None, max_size_ratio=None)


def made(
    op: str, kind: int = onnx.TensorProto.UINT8, domain: str = "", **attributes: Any
) -> onnx.ModelProto:
    """A node with these attributes that reads a constant of this type."""
    node = onnx.helper.make_node(op, ["w"], ["y"], domain=domain, **attributes)
    constant = onnx.helper.make_tensor("w", kind, [2], [1, 0])
    return onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [], [constant]))


def contrib(op: str, **attributes: Any) -> onnx.ModelProto:
    return made(op, domain="com.microsoft", **attributes)


@pytest.mark.parametrize(
    ("model", "provider", "since"),
    [
        (made("Cast", onnx.TensorProto.INT4, to=3), CPU, (1, 23)),
        (made("Cast", onnx.TensorProto.UINT4, to=3), CPU, (1, 23)),
        (made("Cast", onnx.TensorProto.INT8, to=1), CPU, None),
        (made("DequantizeLinear", onnx.TensorProto.INT4), CPU, None),
        (made("DequantizeLinear", onnx.TensorProto.UINT2), CPU, (1, 24)),
        (contrib("MatMulNBits", bits=4), CPU, None),
        (contrib("MatMulNBits", bits=2), CPU, (1, 24)),
        (contrib("MatMulNBits", bits=8), CPU, (1, 23)),
        (contrib("MatMulNBits", bits=8, accuracy_level=4), CPU, None),
        (contrib("MatMulNBits", bits=8), CUDA, None),
        (made("MatMulNBits", bits=2), CPU, None),
        (contrib("GatherBlockQuantized", bits=4), CPU, (1, 23)),
        (contrib("GatherBlockQuantized", bits=4), CUDA, (1, 23)),
        (contrib("GatherBlockQuantized", bits=2), CPU, (1, 27)),
    ],
)
def test_what_a_node_needs(
    model: onnx.ModelProto, provider: str, since: tuple[int, int] | None
) -> None:
    form = newest_form(model, provider)
    assert (form.since if form else None) == since


def test_a_body_counts_too_and_the_newest_decides() -> None:
    inner = contrib("GatherBlockQuantized", bits=2).graph.node[0]
    body = onnx.helper.make_graph([inner], "b", [], [])
    model = made("Cast", onnx.TensorProto.INT4, to=3)
    model.graph.node.append(
        onnx.helper.make_node("If", ["c"], ["z"], then_branch=body, else_branch=body)
    )
    form = newest_form(model, CPU)
    assert form is not None and form.since == (1, 27)


def notes(**settings: Any) -> list[str]:
    text = "g (int64[B,9] ids) => (float[B,9,128] y) { e = Gather(t, ids) y = MatMul(e, w) }"
    model = model_proto(text, t=normal(600, 128), w=normal(128, 128))
    recipe = Recipe(**settings)
    options = Options(bench=False, threads=1)
    feeds = [first_runtime.feed()]
    result = qcompile.compile(model, feeds, recipe=recipe, gates=OFF, options=options)
    return list(result.report.note_texts)


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"weight_bits": 4}, "onnxruntime 1.23 or later: it has INT4 and UINT4 that a Cast"),
        (
            {"mode": "weight-only", "weight_bits": 2, "weight_block": 32},
            "onnxruntime 1.24 or later: it has MatMulNBits of 2 bits",
        ),
        (
            {"mode": "weight-only", "embedding_bits": 2, "forms": (("table", "packed"),)},
            "onnxruntime 1.27 or later: it has GatherBlockQuantized of 2 bits",
        ),
        (
            {"target": "qdq", "mode": "weight-only", "weight_bits": 2},
            "onnxruntime 1.24 or later: it has INT2 and UINT2",
        ),
    ],
)
def test_the_report_says_it(settings: dict[str, Any], note: str) -> None:
    assert any(note in text for text in notes(**settings))


def test_an_older_runtime_is_refused_by_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "version", lambda: "1.22.1")
    with pytest.raises(ModelError, match=r"found onnxruntime 1\.22\.1, expected 1\.23 or later"):
        notes(weight_bits=4)


@pytest.mark.parametrize("settings", [{}, {"mode": "weight-only"}, {"mode": "float"}])
def test_ordinary_files_have_no_such_note(settings: dict[str, Any]) -> None:
    assert not any("or later: it has" in text for text in notes(**settings))


def test_the_oldest_one_is_what_the_package_asks_for() -> None:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    wanted = f"onnxruntime>={'.'.join(map(str, SUPPORTED))}"
    assert wanted in config["options"]["install_requires"].split()


def test_the_page_has_the_table() -> None:
    page = (ROOT / "docs" / "lowbit.md").read_text(encoding="utf-8")
    for form in FORMS:
        assert f"| {form.name} | {'.'.join(map(str, form.since))} |" in page


def test_the_tool_compares_with_what_it_kept(tmp_path: Path) -> None:
    first_runtime.write(tmp_path, ["cpu-static-4"])
    assert list(first_runtime.compared(tmp_path)) == ["cpu-static-4: the same"]
    (tmp_path / "other.onnx").write_bytes(b"no model")
    (tmp_path / "other.npz").write_bytes((tmp_path / "cpu-static-4.npz").read_bytes())
    (_, failed) = first_runtime.compared(tmp_path)
    assert failed.startswith("other: ") and "the same" not in failed
