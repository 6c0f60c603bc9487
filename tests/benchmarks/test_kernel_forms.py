"""kernel_forms.py: all forms of a row compute the same, each with the operators of its name."""

from __future__ import annotations

import sys

import numpy as np
import onnx
import pytest

from benchmarks import kernel_forms
from benchmarks.kernel_forms import FLOAT, Row
from qcompile.runtime.session import Session

ROWS = list(kernel_forms.rows(width=64, inner=96, head=16, tokens=24))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.title} {row.shape}")
def test_forms_compute_the_same(row: Row) -> None:
    """Up to quantization: 8 bits of normal data, and steps that are not fitted to the result."""
    reference = Session(row.model(FLOAT)).run(row.feed)
    assert len(reference) == row.count
    for form in row.forms:
        for name, values in Session(row.model(form)).run(row.feed).items():
            expected = reference[name].astype(np.float64).ravel()
            found = values.astype(np.float64).ravel()
            if form == "QLinearMatMul" and row.title == "linear":
                continue  # its result saturates: the step is that of the data
            if form == "QGemm":
                expected, found = expected - expected.mean(), found - found.mean()  # no bias
            cosine = expected @ found / np.linalg.norm(expected) / np.linalg.norm(found)
            assert cosine > 0.97, form


def test_an_integer_form_multiplies_integers() -> None:
    (row,) = [r for r in ROWS if r.title == "scores"]
    for form in row.forms:
        operators = {n.op_type for n in onnx.load_from_string(row.model(form)).graph.node}
        assert ("FusedMatMul" in operators) == (form == FLOAT)
        assert ("MatMulIntegerToFloat" in operators) == (form != FLOAT)


def test_a_form_of_few_bits_has_the_bits_of_its_name() -> None:
    row = next(r for r in ROWS if r.title == "linear of few bits")
    for form in row.forms:
        graph = onnx.load_from_string(row.model(form)).graph
        found = {
            a.i
            for n in graph.node
            if n.op_type == "MatMulNBits"
            for a in n.attribute
            if a.name == "bits"
        }
        assert found == ({int(form.split()[1][0])} if form.startswith("NBits") else set())
        stored = {t.data_type for t in graph.initializer}
        assert (onnx.TensorProto.INT4 in stored) == ("s4" in form)


def test_it_prints_a_table_for_each_operator(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = "--width 16 --head 8 --tokens 4,5 --seconds 0.001"
    monkeypatch.setattr(sys, "argv", ["kernel_forms.py", *small.split()])
    monkeypatch.setenv("COLUMNS", "200")
    kernel_forms.main()
    text = capsys.readouterr().out
    for title in ("linear", "linear of few bits", "scores", "context", "GELU"):
        assert f"{title}: 1 threads, " in text
    rows = [line for line in text.splitlines() if line.startswith("│")]
    assert len(rows) == 2 * 9 and all("(1.00)" in row for row in rows)
