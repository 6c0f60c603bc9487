"""The table of compile counts linear layers and convolutions apart."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qcompile.commands import _summary
from tests.compiler.report.test_model_card import report

LINEAR, CONVOLUTION = "int8 linear layers that", "int8 convolutions that"


@pytest.mark.parametrize(
    ("operators", "linears", "convolutions"),
    [
        ({"QLinearConv": 3, "com.microsoft.MatMulIntegerToFloat": 2}, "2", "3"),
        ({"QLinearConv": 3}, None, "3"),
        ({"com.microsoft.MatMulIntegerToFloat": 2}, "2", None),
        ({}, "0", None),
    ],
)
def test_each_kind_has_a_row(
    operators: dict[str, int],
    linears: str | None,
    convolutions: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _summary.show(replace(report(), operators=operators))
    lines = capsys.readouterr().out.splitlines()
    for what, count in ((LINEAR, linears), (CONVOLUTION, convolutions)):
        found = [line.split("│")[-2].strip() for line in lines if what in line]
        assert found == ([] if count is None else [count])
