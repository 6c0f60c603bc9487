"""The report as text: nothing lost, and lists of numbers on one line."""

from __future__ import annotations

import json

from qcompile.compiler.report.report import Report
from qcompile.runtime.evaluation.closeness import Gates


def made() -> Report:
    tricky = 'a "list": [\n 1,\n 2\n ] in a string'
    return Report(tricky, "cpu", "static", {"keep_float": []}, "d", "p", Gates())


def test_json_says_what_the_report_says() -> None:
    report = made()
    report.channels = [
        {"ends": [1, 2, 300], "from": [-0.5, 1e-09, 3e22], "none": [], "text": ["1"]}
    ]
    report.seconds = {"endless": float("inf")}
    found = json.loads(report.to_json())
    assert found == json.loads(json.dumps(report.plain()))
    assert found["seconds"] == {"endless": None}


def test_numbers_of_a_list_share_a_line() -> None:
    report = made()
    report.channels = [{"ends": [1, 2, 300], "from": [-0.5, 1e-09, 3e22], "nested": [[1], [2]]}]
    text = report.to_json()
    for line in ('"ends": [1, 2, 300]', '"from": [-0.5, 1e-09, 3e+22]'):
        assert line in text
    assert "[1],\n" in text  # a list of lists is none of numbers


def test_integer_linears_are_those_of_all_forms() -> None:
    report = made()
    microsoft = ("QGemm", "MatMulNBits", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")
    counted = ["MatMulInteger", "QLinearMatMul", "QLinearConv", "ConvInteger"]
    counted += [f"com.microsoft.{op}" for op in ("QLinearConv", "QAttention", *microsoft)]
    others = ["MatMul", "com.microsoft.QLinearAdd", "QuantizeLinear", "own.QLinearMatMul"]
    report.operators = dict.fromkeys((*counted, *others), 1)
    assert report.int8_linears == len(counted)
    report.int8_products = 2
    assert report.int8_linears == len(counted) - 2
