"""Models with operators of a user's own library: with it, and where nothing runs, without it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import qcompile
from qcompile import Options
from qcompile.errors import ModelError
from qcompile.ir.analysis import shape_inference
from qcompile.ir.model_io.from_proto import from_proto
from qcompile.passes.simplify.fold_constants import FoldConstants
from qcompile.passes.simplify.merge_duplicates import MergeDuplicates
from qcompile.rewriting.testing import normal, run_pass
from qcompile.runtime.latency import TimingOptions
from qcompile.runtime.request_load import Load
from qcompile.runtime.session import Session, UnknownOperatorError, custom_operators
from qcompile.runtime.startup import startup_in_new_process
from qcompile.targets.target import Mode
from tests.command_line import run

OPTIONS = Options(bench=False, threads=1)
DATA = [{"x": normal(4, 16, seed=i)} for i in range(6)]
MISSING = (
    "not verified and not timed: operator acme.ops:Twice needs its library (--custom-ops LIBRARY)"
)
SOURCE = Path(__file__).with_name("custom_operator.c")


def model() -> onnx.ModelProto:
    """Two layers, and the custom operator between them."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="m"),
        helper.make_node("Relu", ["m"], ["r"], name="r"),
        helper.make_node("Twice", ["r"], ["z"], name="twice", domain="acme.ops"),
        helper.make_node("Sigmoid", ["z"], ["s"], name="s"),
        helper.make_node("MatMul", ["s", "v"], ["y"], name="y"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 16])],
        [
            numpy_helper.from_array(normal(16, 32), "w"),
            numpy_helper.from_array(normal(32, 16, seed=1), "v"),
        ],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("acme.ops", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled library."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    path = tmp_path_factory.mktemp("library") / "twice.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", path, SOURCE], check=True)
    return path


@pytest.mark.parametrize("mode", ["static", "dynamic", "weight-only", "float"])
def test_with_the_library_every_mode_works(mode: Mode, library: Path) -> None:
    result = qcompile.compile(model(), DATA, mode=mode, options=OPTIONS, custom_ops=[library])
    verdict = result.report.verdict
    assert verdict is not None and verdict.worst_cosine > 0.99
    verdict = qcompile.verify(model(), result.model, DATA, custom_ops=[library])
    assert verdict.worst_cosine > 0.99


def test_a_process_that_measures_a_start_has_the_library(library: Path) -> None:
    task = ("m", model().SerializeToString(), DATA[:1], Load(), TimingOptions(1, seconds=0.01))
    with custom_operators([library]):
        assert startup_in_new_process(*task).load > 0
    with pytest.raises(ModelError, match=r"no operator acme\.ops:Twice"):
        startup_in_new_process(*task)


def test_libraries_are_forgotten_afterwards(library: Path) -> None:
    proto = model().SerializeToString()
    with custom_operators([library]):
        Session(proto)
    with pytest.raises(UnknownOperatorError, match=r"no operator acme\.ops:Twice"):
        Session(proto)


def test_every_command_takes_it(library: Path, tmp_path: Path) -> None:
    source, out, data = (str(tmp_path / n) for n in ("m.onnx", "o.onnx", "d.npz"))
    onnx.save(model(), source)
    np.savez(data, x=normal(64, 16))
    for command in (
        ("compile", source, "-o", out, "--data", data, "--no-bench"),
        ("verify", source, out, "--data", data),
        ("bench", source, out, "--rounds", "1", "--seconds", "0.01"),
        ("sensitivity", source, "--data", data, "--no-cache"),
        ("inspect", out),
    ):
        result = run(*command, "--custom-ops", library)
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize("mode", ["dynamic", "weight-only", "float"])
def test_without_it_modes_that_need_no_run_write_the_file(mode: Mode) -> None:
    result = qcompile.compile(model(), mode=mode, options=Options())
    assert result.report.verdict is None and MISSING in result.report.note_texts
    weights = [t for t in onnx.load_from_string(result.model).graph.initializer if len(t.dims) > 1]
    floats = [t.name for t in weights if t.data_type == TensorProto.FLOAT]
    assert floats == (["w", "v"] if mode == "float" else [])  # v too, behind the operator


def test_without_it_mode_static_says_what_to_do() -> None:
    with pytest.raises(ModelError, match=r"acme\.ops:Twice: give the library .* or choose --mode"):
        qcompile.compile(model(), DATA, options=OPTIONS)


def test_files_that_are_no_library_are_named(tmp_path: Path) -> None:
    text = tmp_path / "ops.so"
    text.write_text("no library")
    for path, what in ((tmp_path / "nix.so", "no such file"), (tmp_path, "not a file"), (text, "")):
        with (
            pytest.raises(ModelError, match=f"library of custom operators '{path}'.*{what}"),
            custom_operators([path]),
        ):
            pass


def test_passes_leave_custom_operators_alone() -> None:
    """Nobody knows whether they are pure: two equal ones stay two, and none is evaluated."""
    proto = model()
    proto.graph.node[2].input[0] = "w"
    second = proto.graph.node.add()
    second.CopyFrom(proto.graph.node[2])
    second.name, second.output[0] = "again", "z2"
    proto.graph.node.add(op_type="MatMul", input=["z2", "v"], output=["y2"], name="y2")
    proto.graph.output.append(helper.make_tensor_value_info("y2", TensorProto.FLOAT, None))
    graph = from_proto(proto)
    shape_inference.infer(graph)
    run_pass(graph, FoldConstants(), MergeDuplicates())
    assert [n.name for n in graph.nodes if n.op == "Twice"] == ["twice", "again"]


def test_what_reads_a_result_tells_its_type() -> None:
    graph = from_proto(model())
    shape_inference.infer(graph)
    assert {n: graph.tensors()[n].dtype for n in ("z", "s", "y")} == dict.fromkeys(
        "zsy", np.float32
    )
