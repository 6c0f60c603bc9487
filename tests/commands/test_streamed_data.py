"""Streams on the command line: drawn by --seed, noted in the report, refused with one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from tests.command_line import assert_one_line, compile_args, run

pytest.importorskip("pyarrow")
files: Any = pytest.importorskip("tests.stream_files")


@pytest.fixture
def pattern(tmp_path: Path) -> str:
    """Two files with the model's input x, of 20 rows each."""
    for number in range(2):
        rows = [{"x": [[float(number * 20 + i)] * 8] * 4} for i in range(20)]
        files.write(tmp_path / f"part-{number}.parquet", rows)
    return f"{tmp_path}/part-*.parquet"


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """A linear layer of x, [batch, 4, 8]."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4, 8])
        for name in ("x", "y")
    ]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "linear")],
        "linear",
        ends[:1],
        ends[1:],
        [numpy_helper.from_array(weight, "w")],
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def compiled(network: Path, data: object, *more: object) -> tuple[Result, bytes]:
    args = compile_args(network, Path(str(data)), "--no-cache", "--force", *more)
    result = run(*args)
    return result, network.with_name("out.onnx").read_bytes()


def test_a_pattern_compiles_and_the_report_says_what_was_drawn(network: Path, pattern: str) -> None:
    result, first = compiled(network, pattern, "--samples", 8, "--seed", 3)
    assert result.exit_code == 0, result.output
    report = json.loads(network.with_name("out.report.json").read_text())
    assert "8 of 40 rows were drawn, with seed 3" in json.dumps(report)
    assert compiled(network, pattern, "--samples", 8, "--seed", 3)[1] == first
    assert compiled(network, pattern, "--samples", 8, "--seed", 4)[1] != first


def test_the_split_does_not_change_the_bytes(network: Path, pattern: str, tmp_path: Path) -> None:
    rows = [{"x": [[float(i)] * 8] * 4} for i in range(40)]
    whole = files.write(tmp_path / "whole" / "all.arrow", rows, group=3)
    first = compiled(network, pattern, "--samples", 8)[1]
    assert compiled(network, whole, "--samples", 8)[1] == first


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("none/*.parquet", "no file matches 'none/*.parquet'"),
        ("unknown://x.parquet", "Protocol not known: unknown"),
        ("memory://none.jsonl", "none.jsonl does not exist"),
    ],
)
def test_data_that_is_not_there_is_one_line(network: Path, data: str, said: str) -> None:
    result = run("compile", network, "-o", network.with_name("o.onnx"), "--data", data)
    assert_one_line(result, 2, said)


def test_training_names_the_next_step(tmp_path: Path) -> None:
    for data in ("s3://bucket/x.jsonl", f"{tmp_path}/*.jsonl"):
        result = run("train", tmp_path, "-o", tmp_path / "out", "--data", data)
        assert_one_line(result, 2, "write them as one .jsonl file first")


def test_bench_shows_how_a_stream_is_read(
    network: Path, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcompile.data.streams.stream._SHORT", 0)  # MB
    timing = "--rounds", 1, "--seconds", 0.01
    result = run("bench", network, "--data", pattern, "--samples", 4, *timing)
    assert result.exit_code == 0 and "read data" in result.stderr
    assert "read data" not in run("bench", network, "--data", pattern, "-q", *timing).stderr
