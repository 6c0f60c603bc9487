"""Sessions as a good deployer opens them: exact sums, and no option where none is needed.

On a processor that saturates the values are looked at too; elsewhere the option changes none.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import qcompile
from qcompile.compiler.report import html
from qcompile.compiler.stages import saturation_check
from qcompile.errors import ModelError, RecipeError
from qcompile.rewriting.testing import model_proto
from qcompile.runtime import latency
from qcompile.runtime import session as runtime
from tests.command_line import run

OPTION = "session.x64quantprecision"
QUICK = latency.TimingOptions(threads=1, rounds=1, seconds=0, min_runs=1, warmup=0)
LEFT = np.full((2, 64), 255, np.uint8)


def linear(largest: int, body: str = "y = MatMulInteger(a, w)") -> onnx.ModelProto:
    """64 products of 255 by ``largest`` in each sum."""
    return model_proto(
        f"g (uint8[M,64] a) => (int32[M,4] y) {{ {body} }}",
        w=np.full((64, 4), largest, np.int8),
        z=np.array(1, np.uint8),
    )


SHARED = "b = MatMulInteger(a, w) c = MatMulInteger(a, w, z) y = Add(b, c)"
COMPUTED = "t = Transpose(a) k = Cast<to = 3>(t) y = MatMulInteger(a, k)"


@pytest.fixture
def saturating(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions are opened as on x86 without VNNI."""
    monkeypatch.setattr(runtime, "saturates", lambda: True)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The option for exact sums of each session that is opened, and the type of its model."""
    seen: list[dict[str, str]] = []
    real = ort.InferenceSession

    def open_it(model: Any, options: Any, **more: Any) -> Any:
        try:
            entry = options.get_session_config_entry(OPTION)
        except RuntimeError:
            entry = ""
        seen.append({"option": entry, "model": type(model).__name__})
        return real(model, options, **more)

    monkeypatch.setattr(ort, "InferenceSession", open_it)
    return seen


def save(folder: Path, model: onnx.ModelProto) -> Path:
    onnx.save(model, folder / "m.onnx")
    return folder / "m.onnx"


def test_it_is_a_session_of_onnxruntime_with_these_threads(tmp_path: Path) -> None:
    found = qcompile.session(save(tmp_path, linear(127)), threads=2)
    assert isinstance(found, ort.InferenceSession)
    assert found.get_session_options().intra_op_num_threads == 2
    assert (found.run(None, {"a": LEFT})[0] == 64 * 255 * 127).all()
    default = qcompile.session(linear(127)).get_session_options()
    assert default.intra_op_num_threads == runtime.threads()


def test_no_option_where_sums_are_exact(
    opened: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "saturates", lambda: False)
    qcompile.session(linear(127))
    assert opened == [{"option": "", "model": "bytes"}]


@pytest.mark.usefixtures("saturating")
@pytest.mark.parametrize(("largest", "entry"), [(127, "1"), (64, "")])
def test_the_option_only_for_files_that_need_it(
    largest: int, entry: str, opened: list[dict[str, str]], tmp_path: Path
) -> None:
    found = qcompile.session(save(tmp_path, linear(largest)))
    assert opened[-1] == {"option": entry, "model": "str"}
    assert (found.run(None, {"a": LEFT})[0] == 64 * 255 * largest).all()


@pytest.mark.usefixtures("saturating")
@pytest.mark.parametrize("body", [SHARED, COMPUTED])
def test_a_rewritten_graph_where_the_option_does_not_work(
    body: str, opened: list[dict[str, str]], tmp_path: Path
) -> None:
    found = qcompile.session(save(tmp_path, linear(127, body)))
    assert opened[-1]["model"] == "bytes"
    left = np.full((4, 64), 127, np.uint8)
    sums = 64 * 127 * (127 + 126 if body == SHARED else 127)
    assert (found.run(None, {"a": left})[0] == sums).all()


@pytest.mark.usefixtures("saturating")
@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC"])
def test_sums_are_exact_without_optimizations_too(
    level: str, opened: list[dict[str, str]], tmp_path: Path
) -> None:
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    found = qcompile.session(save(tmp_path, linear(127)), options=options)
    assert opened[-1]["model"] == "bytes"
    assert (found.run(None, {"a": LEFT})[0] == 64 * 255 * 127).all()


@pytest.mark.usefixtures("saturating")
def test_own_options_are_used_and_can_be_used_again(opened: list[dict[str, str]]) -> None:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for largest, entry in ((127, "1"), (64, "0"), (127, "1")):
        found = qcompile.session(linear(largest), options=options)
        assert opened[-1]["option"] == entry
        assert found.get_session_options().intra_op_num_threads == 1
    options.add_session_config_entry(OPTION, "1")
    qcompile.session(linear(64), options=options)
    assert opened[-1]["option"] == "1"  # what was asked for stays


@pytest.mark.usefixtures("saturating")
@pytest.mark.parametrize(("body", "entry"), [("y = MatMulInteger(a, w)", "1"), (SHARED, "")])
def test_next_to_another_provider_the_graph_is_as_it_was(
    body: str, entry: str, opened: list[dict[str, str]]
) -> None:
    """On an accelerator int8 is what kernels take; and the option must not fail to load."""
    others = [p for p in ort.get_available_providers() if p != runtime.CPU]
    if not others:
        pytest.skip("only the CPU's provider is here")
    qcompile.session(linear(127, body), providers=[others[0], runtime.CPU])
    assert opened[-1]["option"] == entry


def test_errors_are_of_this_package(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        qcompile.session(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match=r"not an ONNX model|not a readable ONNX model"):
        qcompile.session(b"nothing")
    with pytest.raises(ModelError, match=r"has no GPU here, expected one of .*CPUExecution"):
        qcompile.session(linear(1), providers=["GPU"])
    with pytest.raises(RecipeError, match="threads is -1, expected 0 or more"):
        qcompile.session(linear(1), threads=-1)
    with pytest.raises(ModelError, match="no such file"):
        qcompile.session(linear(1), custom_ops=[tmp_path / "lib.so"])
    with pytest.raises(ModelError, match="cannot load the model"):
        qcompile.session(linear(1, "y = MatMulInteger(a, none)"))


@pytest.mark.usefixtures("saturating")
def test_bench_times_what_a_session_runs_and_says_so(tmp_path: Path) -> None:
    exact, needs = save(tmp_path, linear(64)), tmp_path / "needs.onnx"
    onnx.save(linear(127), needs)
    found = qcompile.bench([exact, needs], dims={"M": 2}, options=QUICK).to_dict()
    assert found["session_options"] == {str(needs): {OPTION: "1"}}
    shown = run("bench", exact, needs, "--dim", "M=2", "--rounds", 1, "--profile")
    assert shown.output.count(f"needs.onnx was timed in a session with {OPTION}=1") == 1
    assert "m.onnx was timed" not in shown.output


def test_bench_has_default_sessions_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "saturates", lambda: False)
    found = qcompile.bench([linear(127)], dims={"M": 2}, options=QUICK)
    assert found.session_options == {} and found.session_notes == []


@pytest.mark.usefixtures("saturating")
def test_a_compilation_and_its_page_say_what_was_timed(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.repeat(LEFT, 8, 0))
    shown = run("compile", save(tmp_path, linear(127)), "-o", tmp_path / "o.onnx", "--force",
                "--data", tmp_path / "a.npz")  # fmt: skip
    assert shown.exit_code == 0, shown.output
    report = json.loads((tmp_path / "o.report.json").read_text())
    expected = {name: {OPTION: "1"} for name in ("float", "compiled")}
    assert report["bench"]["session_options"] == expected
    assert f"Session of compiled: {OPTION}=1" in html.page(report)
    assert "compiled was timed in a session with" in shown.output


@pytest.mark.usefixtures("saturating")
@pytest.mark.parametrize(("largest", "entries"), [(127, {OPTION: "1"}), (64, {})])
def test_verify_uses_the_option_for_files_that_need_it(
    largest: int, entries: dict[str, str]
) -> None:
    found = qcompile.verify(linear(largest), linear(largest), [{"a": LEFT}])
    assert found.by_sums.get("exact", found).session_options == entries


def metadata(model: bytes) -> dict[str, str]:
    return {p.key: p.value for p in onnx.ModelProto.FromString(model).metadata_props}


@pytest.mark.parametrize(
    ("largest", "body", "expected"),
    [
        (64, "y = MatMulInteger(a, w)", None),
        (127, "y = MatMulInteger(a, w)", f"{OPTION}=1"),
        (127, SHARED, "none"),
        (127, COMPUTED, "none"),
        (127, "b = MatMulInteger(a, w) " + COMPUTED.replace("y =", "c =") + " y = Add(b, c)",
         f"{OPTION}=1"),
    ],
)  # fmt: skip
def test_a_compiled_file_says_what_it_needs(
    largest: int, body: str, expected: str | None, tmp_path: Path
) -> None:
    options = qcompile.Options(verify=False, bench=False)
    result = qcompile.compile(linear(largest, body), options=options)
    assert metadata(result.model).get(saturation_check.METADATA) == expected
    again = qcompile.compile(result.model, options=options)
    assert metadata(again.model).get(saturation_check.METADATA) == expected


def test_what_a_file_needed_before_it_was_compiled_again_is_not_kept() -> None:
    stale = linear(64)
    stale.metadata_props.add(key=saturation_check.METADATA, value=f"{OPTION}=1")
    result = qcompile.compile(stale, options=qcompile.Options(verify=False, bench=False))
    assert saturation_check.METADATA not in metadata(result.model)
