"""Results on x86 without VNNI: what is emulated is what is measured there, and users see both."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import qcompile
from qcompile import Gates, Options, Recipe
from qcompile.compiler.report import html
from qcompile.compiler.stages import saturation_check
from qcompile.ir.model_io.to_proto import serialize
from qcompile.quant import Array
from qcompile.rewriting.testing import encoder, model_proto, normal
from qcompile.runtime.evaluation import closeness
from qcompile.runtime.session import Session, SessionOptions
from tests.command_line import run

LOOSE = Gates(min_cosine=None, min_worst_cosine=None, min_r2=None, max_latency_ratio=None)
Feeds = list[dict[str, Array]]
NAMES = (
    "vnni-encoder", "vnni-dynamic", "vnni-qdq", "vnni-convolutions", "quantize-dynamic",
    "quantize-static",
)  # fmt: skip


def tokens() -> Feeds:
    rng = np.random.default_rng(0)
    mask = np.ones((2, 6), np.int64)
    return [{"ids": rng.integers(0, 64, (2, 6)), "attention_mask": mask} for _ in range(8)]


def images() -> Feeds:
    rng = np.random.default_rng(0)
    return [{"x": rng.uniform(0.5, 1, (2, 3, 8, 8)).astype(np.float32)} for _ in range(8)]


def two_convolutions() -> onnx.ModelProto:
    """Filters of one sign, so that neighbouring products add up."""
    return model_proto(
        """g (float[N,3,8,8] x) => (float[N,6,4,4] y)
        { a = Conv<pads = [1,1,1,1]>(x, v)
          b = Relu(a)
          y = Conv<strides = [2,2], pads = [1,1,1,1]>(b, w) }""",
        v=np.abs(normal(8, 3, 3, 3)),
        w=np.abs(normal(6, 8, 3, 3)) - np.float32(0.3),
    )


def outliers() -> bytes:
    return serialize(encoder(2, width=32, outlier=40.0))


def for_vnni(model: bytes | onnx.ModelProto, feeds: Feeds, **settings: Any) -> bytes:
    recipe = Recipe(isa="avx512-vnni", **settings)
    options = Options(bench=False, verify=False)
    return qcompile.compile(model, feeds, recipe=recipe, options=options).model


def by_onnxruntime(how: Callable[[Path, Path], None], model: bytes, folder: Path) -> bytes:
    """A model quantized by ONNX Runtime's own tool, whose log is of no interest here."""
    (folder / "float.onnx").write_bytes(model)
    logging.disable(logging.WARNING)
    try:
        how(folder / "float.onnx", folder / "int8.onnx")
    finally:
        logging.disable(logging.NOTSET)
    return (folder / "int8.onnx").read_bytes()


def dynamic(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source, target, weight_type=QuantType.QInt8)


def static(source: Path, target: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds = iter(images())

        def get_next(self) -> dict[str, Array] | None:
            return next(self.feeds, None)

    quantize_static(
        source, target, Reader(), activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8
    )


def candidate(name: str, folder: Path) -> tuple[bytes, bytes, Feeds]:
    """A float model, a quantized one whose sums saturate, and data."""
    convolutions = two_convolutions().SerializeToString()
    if name == "vnni-encoder":
        return outliers(), for_vnni(outliers(), tokens(), attention="all"), tokens()
    if name == "vnni-dynamic":
        return outliers(), for_vnni(outliers(), tokens(), mode="dynamic"), tokens()
    if name == "vnni-qdq":
        return convolutions, for_vnni(convolutions, images(), target="qdq"), images()
    if name == "vnni-convolutions":
        return convolutions, for_vnni(convolutions, images()), images()
    if name == "quantize-dynamic":
        return outliers(), by_onnxruntime(dynamic, outliers(), folder), tokens()
    return convolutions, by_onnxruntime(static, convolutions, folder), images()


@pytest.mark.parametrize("name", NAMES)
def test_the_emulated_figures_are_the_measured_ones(name: str, tmp_path: Path) -> None:
    """On x86 without VNNI; elsewhere there is nothing to measure, but the emulation must show."""
    reference, quantized, feeds = candidate(name, tmp_path)
    found = qcompile.verify(reference, quantized, feeds, gates=LOOSE)
    assert found.sums == "saturating" and found.not_emulated == ()
    there, elsewhere = (found.by_sums[kind].sqnr_db for kind in ("saturating", "exact"))
    assert there < elsewhere - 3
    emulated = saturation_check.IntegerSums(quantized).emulated(SessionOptions(threads=1))
    assert emulated.left == ()
    old = Session(reference, SessionOptions(threads=1))
    again = closeness.judge([(old.run(f), emulated.run(f), f) for f in feeds], LOOSE)
    # Only float kernels may round differently, those of the fused and of the rewritten graph.
    assert again.sqnr_db == pytest.approx(there, abs=0.02)


@functools.cache
def quantized() -> bytes:
    return for_vnni(outliers(), tokens())


def saved(folder: Path, *, vnni: bool = True) -> list[str]:
    """Arguments of ``compile`` for a model whose sums saturate, if compiled for VNNI, and saturate
    on this data."""
    made = onnx.ModelProto.FromString(quantized() if vnni else outliers())
    made.graph.node.add(op_type="MatMul", input=["out", "more"], output=["z"])
    made.graph.initializer.append(onnx.numpy_helper.from_array(normal(32, 32), "more"))
    made.graph.output[0].name = "z"
    (folder / "m").mkdir()
    onnx.save(made, folder / "m" / "model.onnx")
    data: dict[str, Any] = {k: np.concatenate([f[k] for f in tokens()]) for k in tokens()[0]}
    np.savez(folder / "x.npz", **data)
    return ["--data", str(folder / "x.npz"), "--no-bench", "--force"]


LINE = "processors: outputs may differ on x86 without VNNI"


@pytest.mark.parametrize("what", ["m/model.onnx", "m"])
def test_compile_shows_both_results_and_one_line_first(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    given = saved(tmp_path)
    out = tmp_path / ("o.onnx" if what.endswith("x") else "o")
    shown = run("compile", tmp_path / what, "-o", out, *given, "--min-cosine", 0.99).stdout
    assert shown.startswith(LINE) and shown.count("outputs may differ") == 1
    for label in ("exact sums, mean", "x86 without VNNI, mean", "x86 without VNNI, worst"):
        assert f"cosine of 'z', {label}" in shown
    assert "gate failed: on x86 without VNNI: output 'z': mean cosine" in shown


@pytest.mark.parametrize("more", [(), ("--target", "qdq"), ("--mode", "dynamic"),
                                  ("--mode", "weight-only"), ("--isa", "avx2"),
                                  ("--target", "tensorrt"), ("--isa", "avx512-vnni")])  # fmt: skip
def test_nothing_is_said_where_no_processor_differs(more: tuple[str, ...], tmp_path: Path) -> None:
    given = saved(tmp_path, vnni=False)
    shown = run("compile", tmp_path / "m" / "model.onnx", "-o", tmp_path / "o.onnx", *given, *more)
    assert shown.exit_code == 0 and "VNNI" not in shown.output, shown.output
    report = json.loads((tmp_path / "o.report.json").read_text())
    assert report["verify"]["by_sums"] == {} and report["saturation"]["advice"] == ""
    page = html.page(report)
    assert 'class="processors' not in page and "without VNNI" not in page


def test_the_page_has_the_line_first_and_both_results(tmp_path: Path) -> None:
    given = saved(tmp_path)
    run("compile", tmp_path / "m" / "model.onnx", "-o", tmp_path / "o.onnx", *given)
    report = json.loads((tmp_path / "o.report.json").read_text())
    page = html.page(report)
    assert page.count("outputs may differ on x86 without VNNI") == 1
    assert page.index("outputs may differ") < page.index('class="cards"')
    assert page.count("</code> with exact sums") == page.count("</code> on x86 without VNNI") == 1
    assert "with exact sums, " in page  # in the card on closeness


def test_sums_that_saturate_without_effect_on_the_data_are_a_note(tmp_path: Path) -> None:
    given = saved(tmp_path)
    quiet: dict[str, Any] = {
        k: v[:4] * 0 + (k == "attention_mask") for k, v in np.load(tmp_path / "x.npz").items()
    }
    np.savez(tmp_path / "x.npz", **quiet)
    report = json.loads(
        run(
            "compile", tmp_path / "m" / "model.onnx", "-o", tmp_path / "o.onnx", *given, "--json"
        ).stdout
    )
    note = "sums can saturate on x86 without VNNI; on this data the outputs are the same"
    differ = report["saturation"]["advice"] != ""
    assert (note in report["notes"]) != differ


def test_verify_says_first_where_outputs_differ(tmp_path: Path) -> None:
    for name, vnni in (("float", False), ("int8", True)):
        (tmp_path / name).mkdir()
        saved(tmp_path / name, vnni=vnni)
    files = (tmp_path / name / "m" / "model.onnx" for name in ("float", "int8"))
    given = "verify", *files, "--data", tmp_path / "int8" / "x.npz"
    shown = run(*given)
    assert shown.output.startswith("processors: outputs differ on x86 without VNNI (worst cosine")
    assert shown.exit_code == 1 and "on x86 without VNNI: output 'z'" in shown.output
    assert "processors" not in run(*given, "--isa", "avx512-vnni").output


def test_sensitivity_says_that_its_sums_are_exact(tmp_path: Path) -> None:
    """Of a model that has integers already; of others the bound holds while they are ranked."""
    made = onnx.ModelProto.FromString(for_vnni(two_convolutions(), images()))
    made.graph.output[0].name = "z"
    made.graph.node.add(op_type="MatMul", input=["y", "more"], output=["z"])
    made.graph.initializer.append(onnx.numpy_helper.from_array(normal(4, 4), "more"))
    found = qcompile.sensitivity(made, images())
    said = "errors are those of exact sums: the input model has 1 DequantizeLinear, 1 QLinearConv"
    assert any(note.text.startswith(said) for note in found.notes)
    assert not any("exact sums" in n.text for n in qcompile.sensitivity(outliers(), tokens()).notes)


def test_the_report_says_what_the_bound_costs_and_how_to_avoid_it(tmp_path: Path) -> None:
    """Against two compilations: what it says of each weight is the difference of their noise."""
    made: dict[str, Any] = {}
    model = serialize(encoder(2, width=32))
    for isa in ("any", "avx512-vnni"):
        recipe, options = Recipe(isa=isa, transforms="none"), Options(bench=False, force=True)
        result = qcompile.compile(model, tokens(), recipe=recipe, gates=LOOSE, options=options)
        made[isa] = result.report.to_dict()
    rows = {isa: {r["name"]: r for r in one["ledger"]} for isa, one in made.items()}
    bounded = {n: r for n, r in rows["any"].items() if r["kind"] == "weight" and r["bound_db"]}
    assert len(bounded) == 12
    # In 32 rows the largest value, which plain 8 bits represent exactly, still counts.
    lost = {n: rows["avx512-vnni"][n]["sqnr_db"] - r["sqnr_db"] for n, r in bounded.items()}
    for name, row in bounded.items():
        assert row["bound_db"] == pytest.approx(lost[name], abs=0.8)
    predicted = np.mean([row["bound_db"] for row in bounded.values()])
    assert predicted == pytest.approx(np.mean([*lost.values()]), abs=0.3)
    assert not any(r["bound_db"] for r in rows["avx512-vnni"].values())
    assert made["avx512-vnni"]["saturation"]["cost"] is None
    cost = made["any"]["saturation"]["cost"]
    costs = [r["bound_db"] for r in rows["any"].values() if r["bound_db"] is not None]
    assert cost["mean_db"] == pytest.approx(np.mean(costs))
    assert cost["worst_db"] == max(costs) and cost["tensors"] == len(costs)
    assert "avx512-vnni" in cost["avoided_by"]
    page = html.page(made["any"])
    assert f"{cost['mean_db']:.1f} dB on average compared with plain 8 bits" in page
    assert "plain 8 bits" not in html.page(made["avx512-vnni"])
    assert Recipe(isa="amx").isa in cost["avoided_by"]
