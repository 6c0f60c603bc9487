"""One weight in is one weight out, however many nodes read it; a model that grew is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest

import qcompile
from qcompile import Gates, Options, Recipe, RejectedError, Result
from qcompile.compiler.report.html import page
from qcompile.compiler.stages.models import CompiledModel, FloatModel, size_failures
from qcompile.ir.model_io.write_model import ModelFiles
from qcompile.quant import Array
from qcompile.rewriting.testing import model_proto, normal
from qcompile.system.temporary_folder import TemporaryFolder
from tests.command_line import assert_one_line, compile_args, run

N, LAYERS = 64, 5
UNTIMED = Options(bench=False, threads=1)
WEIGHT = normal(N, N) / 8
DATA = {"x": np.random.default_rng(1).standard_normal((64, N)).astype(np.float32)}
# Metadata, types of inner tensors, and a scale per output channel; the weight has 16 KiB.
ROOM = 2048


def layers(before: str, read: str, **weights: Array) -> onnx.ModelProto:
    """Layers whose weight is ``read``, computed by ``before``; @ is the number of the layer."""
    body, x = "", "x"
    for i in range(LAYERS):
        out = "y" if i == LAYERS - 1 else f"t{i}"
        layer = f"{before} m@ = MatMul({x}, {read}) {out} = Tanh(m@) "
        body, x = body + layer.replace("@", str(i)), out
    return model_proto(f"g (float[N,{N}] x) => (float[N,{N}] y) {{ {body} }}", **weights)


SHARED = {
    "read by each": layers("", "w", w=WEIGHT),
    "identities": layers("i@ = Identity(w) j@ = Identity(i@)", "j@", w=WEIGHT),
    "transposed by each": layers("i@ = Transpose<perm = [1, 0]>(w)", "i@", w=WEIGHT),
    "reshaped by each": layers(
        "i@ = Reshape(w, s)", "i@", w=WEIGHT.reshape(N, 4, 16), s=np.array([N, N])
    ),
    "stored by each": layers("", "w@", **{f"w{i}": WEIGHT for i in range(LAYERS)}),
}


def compiled(model: onnx.ModelProto, data: Mapping[str, Array] = DATA, **settings: str) -> Result:
    recipe = Recipe(**settings)  # type: ignore[arg-type]
    return qcompile.compile(model, [data], recipe=recipe, options=UNTIMED)


@pytest.mark.parametrize("mode", ["float", "weight-only", "dynamic", "static"])
@pytest.mark.parametrize("form", SHARED)
def test_a_weight_of_many_layers_is_stored_once(form: str, mode: str) -> None:
    share = 1 if mode == "float" else 0.25
    assert weights(compiled(SHARED[form], mode=mode)) == (1, share * WEIGHT.nbytes)


def test_in_mode_float_the_file_is_no_larger() -> None:
    """Types that shape inference finds are not written; with them it had 200 bytes more."""
    report = compiled(SHARED["identities"], mode="float").report
    assert report.bytes <= report.float_bytes


@pytest.mark.parametrize("target", ["qdq", "cuda", "tensorrt"])
@pytest.mark.parametrize("form", SHARED)
def test_on_other_targets_too(form: str, target: str) -> None:
    count, _ = weights(compiled(SHARED[form], target=target))
    assert count == 1


def test_weights_in_a_file_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(SHARED["stored by each"], path, save_as_external_data=True, size_threshold=0)
    result = qcompile.compile(path, [DATA], mode="dynamic", options=UNTIMED)
    assert weights(result) == (1, WEIGHT.nbytes / 4)


def test_half_precision_is_not_widened_in_mode_float() -> None:
    model = layers("i@ = Cast<to = 1>(w)", "i@", w=WEIGHT.astype(np.float16))
    assert weights(compiled(model, mode="float")) == (1, WEIGHT.nbytes / 2)


def weights(result: Result) -> tuple[int, int]:
    """Number and bytes of the matrices and kernels in the file."""
    stored = onnx.load_from_string(result.model).graph.initializer
    large = [onnx.numpy_helper.to_array(t) for t in stored if sum(d > 1 for d in t.dims) > 1]
    return len(large), sum(v.nbytes for v in large)


# A weight that operators read in different ways ---------------------------------------------------

TABLE = normal(500, N)
IDS = {"ids": np.random.default_rng(2).integers(0, 500, (16, 9))}
TIED = {
    "transposed": ("o = Transpose<perm = [1, 0]>(t) y = MatMul(h, o)", {}),
    "stored transposed": ("y = MatMul(h, o)", {"o": np.ascontiguousarray(TABLE.T)}),
    "Gemm": (
        "f = Reshape(h, flat) g = Gemm<transB = 1>(f, t) y = Reshape(g, whole)",
        {"flat": np.array([-1, N]), "whole": np.array([-1, 9, 500])},
    ),
}


def tied(form: str) -> onnx.ModelProto:
    """An embedding that is the weight of the output layer too."""
    body, more = TIED[form]
    text = f"g (int64[B,9] ids) => (float[B,9,500] y) {{ e = Gather(t, ids) h = Tanh(e) {body} }}"
    return model_proto(text, t=TABLE, **more)


@pytest.mark.parametrize("form", TIED)
@pytest.mark.parametrize(("mode", "share"), [("float", 1), ("dynamic", 0.25), ("static", 0.25)])
def test_a_tied_table_is_stored_once(form: str, mode: str, share: float) -> None:
    """The scales of its rows, 2 kB, are a matrix too: a column."""
    _, size = weights(compiled(tied(form), IDS, mode=mode))
    assert size <= share * TABLE.nbytes + 500 * 4


@pytest.mark.parametrize("form", TIED)
def test_packed_and_looked_up_a_table_is_half_as_large_as_float(form: str) -> None:
    _, size = weights(compiled(tied(form), IDS, mode="weight-only"))
    assert size <= 0.5 * TABLE.nbytes + 500 * 4


def test_a_kernel_that_a_float_convolution_reads_too() -> None:
    """The result of the last one has no range: its weight is dequantized, not stored as floats."""
    body = "a = Conv<pads = [1,1,1,1]>(x, w) r = Relu(a) y = Conv<pads = [1,1,1,1]>(r, w)"
    kernel, data = normal(8, 8, 3, 3) / 9, {"x": normal(16, 8, 6, 6)}
    model = model_proto(f"g (float[N,8,6,6] x) => (float[N,8,6,6] y) {{ {body} }}", w=kernel)
    assert weights(compiled(model, data)) == (1, kernel.nbytes / 4)


# The gate -----------------------------------------------------------------------------------------

KEPT = {"mode": "dynamic", "keep_float": ("e",)}


def test_a_model_that_grew_is_refused_and_the_tensor_named() -> None:
    """The user wants the lookup in floats, so the table is stored twice."""
    with pytest.raises(RejectedError) as caught:
        compiled(tied("Gemm"), IDS, **KEPT)  # type: ignore[arg-type]
    [failure] = caught.value.result.report.failures
    old, new = TABLE.nbytes, TABLE.nbytes * 5 // 4 + 500 * 4
    assert "(--max-size-ratio)" in failure
    assert f"larger in bytes: 't' {old:,} -> {new:,}" in failure
    assert "--keep-float NAME" in failure
    skips = caught.value.result.report.skips
    assert any("is kept float by pattern 'e'" in s.reason for s in skips)


def test_what_the_message_advises_works() -> None:
    kept = qcompile.compile(
        tied("Gemm"), [IDS], mode="dynamic", keep_float=["e", "t"], options=UNTIMED
    )
    assert kept.report.size_ratio <= 1.01
    recipe, gates = Recipe(**KEPT), Gates(max_size_ratio=1.27)  # type: ignore[arg-type]
    allowed = qcompile.compile(tied("Gemm"), [IDS], recipe=recipe, gates=gates, options=UNTIMED)
    assert allowed.report.failures == []


def test_the_command_line_and_the_page(tmp_path: Path) -> None:
    model, data = tmp_path / "m.onnx", tmp_path / "d.npz"
    onnx.save(tied("Gemm"), model)
    np.savez(data, ids=IDS["ids"])
    args = compile_args(model, data, "--mode", "dynamic", "--keep-float", "e")
    assert_one_line(run(*args), 1, "--max-size-ratio", "'t' 128,000 ->")
    assert not (tmp_path / "out.onnx").exists()
    forced = run(*args, "--force")
    assert forced.exit_code == 0
    assert "gate failed" in forced.output
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report["gates"]["max_size_ratio"] == 1
    shown = page(report)
    assert "--max-size-ratio" in shown
    assert "larger in bytes" in shown


FLOAT = FloatModel(b"", (), 5000, [], {"w": 4000, "b": 100})


@pytest.mark.parametrize(
    ("size", "weights", "limit", "passes"),
    [
        (5000, {"w": 6000}, 1.0, True),
        (5900, {"w": 4000, "b": 100, "scale": 900}, 1.0, True),
        (6000, {"w": 4000, "w/folded": 2000}, 1.0, False),
        (6000, {"w": 4000, "w/folded": 2000}, 1.2, True),
        (6000, {"w": 4000, "w/folded": 2000}, None, True),
        (2600, {"w": 4000}, 0.5, False),
    ],
    ids=["not larger", "quantizers", "a copy", "allowed", "off", "below a half"],
)
def test_what_counts(
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    weights: dict[str, int],
    limit: float | None,
    passes: bool,
) -> None:
    folder = TemporaryFolder()
    path = folder.path / "m.onnx"
    path.write_bytes(bytes(size))
    failures = size_failures(FLOAT, CompiledModel(ModelFiles(path, None, folder), weights), limit)
    assert (failures == []) == passes


def test_masks_that_are_computed_from_a_few_numbers_are_no_copies() -> None:
    """20 KB of zeros in a model of a few hundred bytes."""
    text = """g (float[N,64,80] x) => (float[N,64,80] y) {
        mask = ConstantOfShape(shape) low = Sub(mask, one) y = Add(x, low)
    }"""
    model = model_proto(text, shape=np.array([64, 80]), one=np.array(1, np.float32))
    result = qcompile.compile(model, [{"x": normal(4, 64, 80)}], mode="float", options=UNTIMED)
    assert result.report.failures == []
    assert result.report.size_ratio > 10


def test_nor_are_weights_that_passes_derive_from_those() -> None:
    text = """g (float[N,3,8,8] x) => (float[N,64,6,6] y) {
        w = ConstantOfShape <value = float[1] {0.1}> (shape)
        c = Conv(x, w)
        y = BatchNormalization(c, scale, bias, mean, variance)
    }"""
    each = {name: np.abs(normal(64)) + 0.5 for name in ("scale", "bias", "mean", "variance")}
    model = model_proto(text, shape=np.array([64, 3, 3, 3]), **each)
    result = qcompile.compile(model, [{"x": normal(4, 3, 8, 8)}], mode="float", options=UNTIMED)
    assert "BatchNormalization" not in result.report.operators
    assert result.report.failures == [] and result.report.size_ratio > 2


def test_the_gate_can_be_compared_with_a_smaller_model() -> None:
    """A limit below one is a limit on the size itself."""
    gates = Gates(max_size_ratio=0.2)
    with pytest.raises(RejectedError, match=r"times as large as float, over 0\.2"):
        qcompile.compile(SHARED["read by each"], [DATA], gates=gates, options=UNTIMED)
