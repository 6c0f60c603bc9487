"""The report as text: nothing lost, and lists of numbers on one line."""

from __future__ import annotations

import json
from typing import Any

from qcompile.compiler.config.recipe import Recipe
from qcompile.compiler.report.notes import NOTHING_QUANTIZED, Note, coded_note, detail_of
from qcompile.compiler.report.report import Report
from qcompile.runtime.evaluation.closeness import Gates


def made(**more: Any) -> Report:
    tricky = 'a "list": [\n 1,\n 2\n ] in a string'
    return Report(tricky, "cpu", "static", Recipe(), "d", "p", Gates(), **more)


def test_json_says_what_the_report_says() -> None:
    parts = [{"ends": [1, 2, 300], "from": [-0.5, 1e-09, 3e22], "none": [], "text": ["1"]}]
    report = made(channels=parts, seconds={"endless": float("inf")})
    found = json.loads(report.to_json())
    assert found == json.loads(json.dumps(report.to_dict()))
    assert found["seconds"] == {"endless": None}


def test_numbers_of_a_list_share_a_line() -> None:
    parts = [{"ends": [1, 2, 300], "from": [-0.5, 1e-09, 3e22], "nested": [[1], [2]]}]
    text = made(channels=parts).to_json()
    for line in ('"ends": [1, 2, 300]', '"from": [-0.5, 1e-09, 3e+22]'):
        assert line in text
    assert "[1],\n" in text  # a list of lists is none of numbers


def test_integer_linears_are_those_of_all_forms() -> None:
    microsoft = ("QGemm", "MatMulNBits", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")
    counted = ["MatMulInteger", "QLinearMatMul", "QLinearConv", "ConvInteger"]
    counted += [f"com.microsoft.{op}" for op in ("QLinearConv", "QAttention", *microsoft)]
    others = ["MatMul", "com.microsoft.QLinearAdd", "QuantizeLinear", "own.QLinearMatMul"]
    operators = dict.fromkeys((*counted, *others), 1)
    assert made(operators=operators).int8_linears == len(counted)
    assert made(operators=operators, int8_products=2).int8_linears == len(counted) - 2


def test_json_has_the_texts_of_notes_and_coded_ones_are_found_in_them() -> None:
    notes = [Note("search", "by the search"), coded_note(NOTHING_QUANTIZED, "no rule fits")]
    texts = json.loads(made(notes=notes).to_json())["notes"]
    assert texts == ["by the search", "nothing was quantized: no rule fits"]
    assert detail_of(NOTHING_QUANTIZED, texts) == "no rule fits"
    assert detail_of(NOTHING_QUANTIZED, texts[:1]) is None
