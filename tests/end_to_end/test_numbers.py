"""Numbers at the edges of float32, through the whole of compile: the right answer, or a reason."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import qcompile
from qcompile.compiler.report.report import Report
from qcompile.compiler.stages.options import CompileOptions
from qcompile.errors import DataError
from qcompile.quant import Array
from qcompile.rewriting.testing import model_proto
from qcompile.targets.target import Mode

ROWS, COLUMNS = 8, 6
FORMS: list[tuple[str, Mode]] = [
    ("cpu", "static"),
    ("qdq", "static"),
    ("cpu", "dynamic"),
    ("cpu", "weight-only"),
]
# 8 bits of a normal distribution within 4 times its deviation lose 48 - 20 log10(4 / sqrt(3)) = 41
# dB; ranges foreseen to be up to 4 times as wide, and a few values only, take up to 17 of them.
SQNR = 24.0
LINEAR = f"g (float[N,{ROWS}] x) => (float[N,{COLUMNS}] y) {{ y = MatMul(x, w) }}"
Feeds = Callable[[np.random.Generator], dict[str, Array]]


def normal(rng: np.random.Generator) -> dict[str, Array]:
    return {"x": rng.standard_normal((4, ROWS)).astype(np.float32)}


def scaled(factor: float) -> Feeds:
    return lambda rng: {"x": normal(rng)["x"] * np.float32(factor)}


def weight(column: Array | float | None = None, factor: float = 1.0) -> Array:
    """Normal values, times a factor, the first column replaced."""
    values = np.random.default_rng(1).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    values *= np.float32(factor)
    if column is not None:
        values[:, 0] = column
    return values


def compiled(
    target: str, mode: Mode, text: str, constants: dict[str, Array], feeds: Feeds
) -> Report:
    model = model_proto(text, **constants)
    rng = np.random.default_rng(0)
    options = CompileOptions(bench=False, force=True)
    data = [feeds(rng) for _ in range(8)]
    return qcompile.compile(model, data, target=target, mode=mode, options=options).report


def reasons(report: Report) -> str:
    kinds = ("weight", "activation")
    return "; ".join(r.reason for r in report.ledger if r.kind in kinds and r.dtype == "float")


forms = pytest.mark.parametrize(("target", "mode"), FORMS, ids=[f"{t}-{m}" for t, m in FORMS])

QUANTIZED = {
    "zero column": (LINEAR, {"w": weight(0)}, normal),
    "constant column": (LINEAR, {"w": weight(0.5)}, normal),
    "denormal column": (LINEAR, {"w": weight(1e-40)}, normal),
    "tiny weight": (LINEAR, {"w": weight(factor=1e-30)}, normal),
    "columns far apart": (
        LINEAR,
        {"w": weight() * np.float32(10.0) ** np.arange(-12, 12, 4, dtype=np.float32)},
        normal,
    ),
    "scalar input": (
        LINEAR.replace("x)", "x, float s)", 1).replace(
            "{ y = MatMul(x", "{ h = Mul(x, s)\n y = MatMul(h"
        ),
        {"w": weight()},
        lambda rng: {**normal(rng), "s": np.array(0.5, np.float32)},
    ),
    "vector input": (
        f"g (float[{ROWS}] x) => (float[{COLUMNS}] y) {{ y = MatMul(x, w) }}",
        {"w": weight()},
        lambda rng: {"x": normal(rng)["x"][0]},
    ),
    "batch of one": (LINEAR, {"w": weight()}, lambda rng: {"x": normal(rng)["x"][:1]}),
    "sequence of one": (
        f"g (float[B,S,{ROWS}] x) => (float[B,S,{COLUMNS}] y) {{ y = MatMul(x, w) }}",
        {"w": weight()},
        lambda rng: {"x": normal(rng)["x"][:1, None]},
    ),
    "some sequences empty": (
        f"g (float[B,S,{ROWS}] x) => (float[B,S,{COLUMNS}] y) {{ y = MatMul(x, w) }}",
        {"w": weight()},
        lambda rng: {"x": rng.standard_normal((2, rng.integers(2), ROWS)).astype(np.float32)},
    ),
    "zero data": (LINEAR, {"w": weight()}, scaled(0)),
    "constant data": (LINEAR, {"w": weight()}, lambda _: {"x": np.full((4, ROWS), 3, np.float32)}),
    "tiny data": (LINEAR, {"w": weight()}, scaled(1e-30)),
}


@pytest.mark.parametrize("case", QUANTIZED)
@forms
def test_what_has_a_scale_is_quantized_and_close(case: str, target: str, mode: Mode) -> None:
    report = compiled(target, mode, *QUANTIZED[case])
    assert report.int8_linears == 1
    assert report.failures == []
    assert report.verdict is not None and report.verdict.sqnr_db >= SQNR


UNFIT = {
    "NaN in the weight": ({"w": weight(np.nan)}, "the weight holds NaN or infinity"),
    "infinity in the weight": ({"w": weight(-np.inf)}, "the weight holds NaN or infinity"),
    "zero weight": ({"w": weight(factor=0)}, "all values of the weight are zero"),
    "denormal weight": ({"w": weight(factor=1e-40)}, "too small for a scale"),
    "huge weight": ({"w": weight(factor=1e30)}, "too large for a scale"),
    "one value of the largest": ({"w": weight(3e38)}, "too large for a scale"),
}


@pytest.mark.parametrize("case", UNFIT)
@forms
def test_a_weight_without_a_scale_stays_float(case: str, target: str, mode: Mode) -> None:
    constants, reason = UNFIT[case]
    report = compiled(target, mode, LINEAR, constants, normal)
    assert report.int8_linears == 0
    assert reason in reasons(report)
    assert report.failures == []


UNRANGED = {
    "NaN inside": ("l = Sqrt(x)", normal, "NaN or infinity among its values"),
    "infinity inside": ("l = Div(x, zero)", normal, "NaN or infinity among its values"),
    "huge data": ("l = Identity(x)", scaled(1e30), "too large for a scale"),
    "denormal data": ("l = Identity(x)", scaled(1e-40), "too small for a scale"),
}


@pytest.mark.parametrize("case", UNRANGED)
@pytest.mark.parametrize("target", ["cpu", "qdq"])
def test_data_without_a_range_stays_float(case: str, target: str) -> None:
    node, feeds, reason = UNRANGED[case]
    text = LINEAR.replace("{ y = MatMul(x, w)", f"{{ {node}\n y = MatMul(l, w)")
    constants = {"w": weight(), "zero": np.array(0, np.float32)}
    report = compiled(target, "static", text, constants, feeds)
    assert report.int8_linears == 0
    assert reason in reasons(report)
    assert report.failures == []


@pytest.mark.parametrize("node", ["l = Sqrt(x)", "l = Div(x, zero)"])
@pytest.mark.parametrize("mode", ["dynamic", "weight-only"])
def test_where_ranges_are_not_known_wrong_answers_are_refused(node: str, mode: Mode) -> None:
    """Kernels that quantize as they run may turn NaN into numbers: that must not pass."""
    text = LINEAR.replace("{ y = MatMul(x, w)", f"{{ {node}\n y = MatMul(l, w)")
    report = compiled("cpu", mode, text, {"w": weight(), "zero": np.array(0, np.float32)}, normal)
    assert report.verdict is not None
    refused = any("mean cosine" in failure for failure in report.failures)
    assert refused or report.verdict.sqnr_db == np.inf


@forms
def test_an_empty_weight_stays_float(target: str, mode: Mode) -> None:
    text = LINEAR.replace(f"[N,{ROWS}]", "[N,0]")
    empty = {"w": np.zeros((0, COLUMNS), np.float32)}
    report = compiled(target, mode, text, empty, lambda rng: {"x": normal(rng)["x"][:, :0]})
    assert report.int8_linears == 0
    assert "the weight is empty" in reasons(report)
    assert report.failures == []


@forms
def test_empty_outputs_are_no_verdict(target: str, mode: Mode) -> None:
    """Nothing was quantized, so a note will do; test_compiler has the error where something was."""
    text = LINEAR.replace(f"[N,{COLUMNS}]", "[N,0]")
    report = compiled(target, mode, text, {"w": np.zeros((ROWS, 0), np.float32)}, normal)
    assert any("or the outputs hold no values" in note for note in report.note_texts)
    assert report.verdict is None


@forms
def test_a_model_of_scalars(target: str, mode: Mode) -> None:
    text = "g (float x) => (float y) { r = Mul(x, two)\n y = Relu(r) }"
    feeds = lambda rng: {"x": np.array(rng.uniform(1, 2), np.float32)}  # noqa: E731
    report = compiled(target, mode, text, {"two": np.array(2, np.float32)}, feeds)
    assert report.failures == []


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.full((4, ROWS), np.nan, np.float32), "found NaN or infinity, expected finite values"),
        (np.full((4, ROWS), np.inf, np.float32), "found NaN or infinity, expected finite values"),
        (np.zeros((0, ROWS), np.float32), "holds no samples, expected some"),
    ],
)
@forms
def test_data_that_says_nothing_is_refused(
    value: Array, words: str, target: str, mode: Mode
) -> None:
    with pytest.raises(DataError, match=words):
        compiled(target, mode, LINEAR, {"w": weight()}, lambda _: {"x": value})
