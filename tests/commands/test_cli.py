"""The command line: exit codes, one line for every error, files whole or untouched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from qcompile.rewriting.testing import model_proto, normal
from tests.command_line import ROOT, assert_one_line, compile_args, run, run_module

ROWS, INNER, COLUMNS = 64, 256, 64


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two linears with a Relu between, on float input x [batch, 64]."""
    text = f"""mlp (float[batch,{ROWS}] x) => (float[batch,{COLUMNS}] y) {{
        h = MatMul(x, w1) r = Relu(h) y = MatMul(r, w2) }}"""
    weights = {"w1": normal(ROWS, INNER) / 8, "w2": normal(INNER, COLUMNS, seed=1) / 16}
    path = tmp_path / "mlp.onnx"
    onnx.save(model_proto(text, **weights), path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "x.npz"
    values = np.random.default_rng(1).standard_normal((32, ROWS)).astype(np.float32)
    np.savez(path, x=values)
    return path


def test_compile_writes_model_and_report(model: Path, data: Path) -> None:
    result = run(*compile_args(model, data))
    assert result.exit_code == 0, result.output
    out = model.with_name("out.onnx")
    report = json.loads(model.with_name("out.report.json").read_text())
    assert report["bytes"] == out.stat().st_size == sum(r["bytes"] for r in report["ledger"])
    assert "next:" in result.stdout and "not timed (--no-bench)" in result.stdout


def test_json_is_all_that_stdout_holds(model: Path, data: Path) -> None:
    result = run(*compile_args(model, data, "--json"))
    assert json.loads(result.stdout)["int8_linears"] == 2


def test_quiet_prints_nothing(model: Path, data: Path) -> None:
    result = run(*compile_args(model, data, "-q"))
    assert (result.exit_code, result.stdout) == (0, "")


def test_a_failed_gate_exits_1_and_writes_nothing(model: Path, data: Path) -> None:
    out = model.with_name("out.onnx")
    out.write_bytes(b"precious")
    result = run(*compile_args(model, data, "--min-cosine", "1.0"))
    assert_one_line(result, 1, "mean cosine", "--min-cosine")
    assert out.read_bytes() == b"precious"
    assert not model.with_name("out.report.json").exists()


def test_force_writes_all_the_same(model: Path, data: Path) -> None:
    result = run(*compile_args(model, data, "--min-cosine", "1.0", "--force"))
    assert result.exit_code == 0
    assert not json.loads(model.with_name("out.report.json").read_text())["passed"]


def test_verify_passes_fails_and_says_so(model: Path, data: Path) -> None:
    run(*compile_args(model, data))
    out = model.with_name("out.onnx")
    assert run("verify", model, out, "--data", data).exit_code == 0
    failed = run("verify", model, out, "--data", data, "--max-abs", "1e-9")
    assert_one_line(failed, 1, "largest difference", "--max-abs")
    same = run("verify", model, model, "--data", data, "--max-abs", "0", "--json")
    assert same.exit_code == 0 and json.loads(same.stdout)["failures"] == []


def test_bench_sweeps_and_writes_json(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    quick = ("--rounds", 2, "--seconds", 0.01)
    result = run("bench", model, model, "--dim", "batch=1,3", *quick, "--json", file)
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    assert [c["shapes"]["x"] for c in found] == [[1, ROWS], [3, ROWS]]
    assert found[0]["models"][1]["ratio_low"] <= found[0]["models"][1]["ratio_high"]


def test_bench_profiles_operators(model: Path) -> None:
    quick = ("--rounds", 1, "--seconds", 0.01, "--dim", "batch=2", "--profile")
    (found,) = json.loads(run("bench", model, *quick, "--json", "-").stdout)
    (profiled,) = found["profile"]
    assert profiled["ops"] and profiled["total_ms"] > 0
    shown = run("bench", model, *quick).output
    assert "by operator" in shown


def test_bench_takes_shapes_and_data(model: Path, data: Path) -> None:
    quick = ("--rounds", 1, "--seconds", 0.01, "--json", "-")
    shaped = run("bench", model, "--shape", f"x=2x{ROWS}", *quick)
    assert json.loads(shaped.stdout)[0]["shapes"] == {"x": [2, ROWS]}
    real = run("bench", model, "--data", data, *quick)
    assert json.loads(real.stdout)[0]["shapes"] == {"x": [8, ROWS]}


def test_inspect_adds_up_with_and_without_report(model: Path, data: Path) -> None:
    run(*compile_args(model, data))
    for path in (model, model.with_name("out.onnx")):
        found = json.loads(run("inspect", path, "--json").stdout)
        assert sum(r["bytes"] for r in found["ledger"]) == path.stat().st_size
    text = run("inspect", model.with_name("out.onnx"), "--all").stdout
    assert "MatMulIntegerToFloat" in text
    assert "no report of this file" in run("inspect", model).stdout


@pytest.mark.parametrize("command", ["passes", "calibrators", "targets"])
def test_lists(command: str) -> None:
    rows = json.loads(run(command, "--json").stdout)
    assert rows and all(r["name"] and r["what"] for r in rows)
    assert rows[0]["name"] in run(command).stdout


def test_recipe_file_and_options_on_top(model: Path, data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("calibrator: percentile{percentile=99.9}\nkeep-float: ['w2']\n")
    found = json.loads(run(*compile_args(model, data, "--recipe", recipe, "--json")).stdout)
    assert found["recipe"]["calibrator"] == "percentile{percentile=99.9}"
    assert found["int8_linears"] == 1
    options = ("--recipe", recipe, "--calibrator", "minmax", "--json")
    assert (
        json.loads(run(*compile_args(model, data, *options)).stdout)["recipe"]["calibrator"]
        == "minmax"
    )


def test_help_names_the_recipes() -> None:
    text = " ".join(run("compile", "--help").stdout.split())
    assert "per-tensor, small, or a .yaml file (recipe or lock)" in text


def test_precision_of_a_recipe_shows_in_report_and_inspect(
    model: Path, data: Path, tmp_path: Path
) -> None:
    """r is what Relu makes; without the report the file alone shows 16 bits, as zero points."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("target: qdq\nprecision: {r: 16, x: 8, 'w?': 16}\n")
    found = json.loads(run(*compile_args(model, data, "--recipe", recipe, "--json")).stdout)
    assert found["recipe"]["precision"] == [["r", 16], ["x", 8], ["w?", 16]]
    out = model.with_name("out.onnx")
    rows = json.loads(run("inspect", out, "--json").stdout)["ledger"]
    shown = {r["name"]: r["dtype"] for r in rows if r["kind"] in ("activation", "weight")}
    assert shown == {
        "r": "uint16", "x": "uint8", "h": "uint8", "y": "float", "w1/int16": "int16",
        "w2/int16": "int16",
    }  # fmt: skip
    assert "uint16" in run("inspect", out).stdout
    model.with_name("out.report.json").unlink()
    assert "uint16" in run("inspect", out).stdout


def test_a_precision_pattern_without_a_match_is_an_error(
    model: Path, data: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("precision: {r: 16, 'layer.*': float}\n")
    result = run(*compile_args(model, data, "--recipe", recipe))
    assert_one_line(result, 2, "precision pattern 'layer.*' matches no node and no tensor")


def test_dump_passes_writes_readable_graphs(model: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dumps"
    run(*compile_args(model, data, "--dump-passes", folder))
    names = sorted(p.name for p in folder.iterdir())
    assert names[0] == "000_input.txt"
    assert any("lower-linears" in n for n in names)


BAD_OPTIONS = [
    (("--target", "gpu"), ("unknown target 'gpu'", "'cpu'")),
    (("--calibrator", "minmx"), ("did you mean 'minmax'",)),
    (("--calibrator", "percentile{percent=9}"), ("no option 'percent'",)),
    (("--calibrator", "percentile{percentile=high}"), ("expected float",)),
    (("--pipeline", "fold-constant"), ("did you mean 'fold-constants'",)),
    (("--pipeline", "insert-qdq,fold-constants"), ("cannot follow",)),
    (("--pipeline", "fold-constants{"), ("cannot be read",)),
    (("--keep-float", "nothing*"), ("matches no node and no tensor",)),
    (("--keep-float", "role:ffn-in"), ("'role:ffn-in' matches no role", "other-weight")),
    (("--recipe", "mixed-precison"), ("did you mean 'mixed-precision'?", "per-tensor")),
    (("--recipe", "nowhere.yaml"), ("'nowhere.yaml' cannot be read",)),
    (("--recipe", "mixed-precision"), ("'role:residual-sum' matches no role",)),
    (("--mode", "qat"), ("'qat' is not one of",)),
    (("--weight-bits", "9"), ("9 is not in the range 2<=x<=8",)),
    (("--embedding-bits", "1"), ("1 is not in the range 2<=x<=8",)),
    (("--weight-block", "24"), ("weight_block is 24, expected a power of two from 16 on",)),
    (("--max-memory", "lots"), ("is not a size",)),
    (("--report", "r.pdf"), (".html",)),
    (("--data", "nowhere.npz"), ("does not exist",)),
]


@pytest.mark.parametrize(("options", "words"), BAD_OPTIONS, ids=lambda x: " ".join(x)[:40])
def test_bad_options(
    model: Path, data: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert_one_line(run(*compile_args(model, data, *options)), 2, *words)
    assert not model.with_name("out.onnx").exists()


def test_bad_recipe(model: Path, data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("calibratr: minmax\n")
    result = run(*compile_args(model, data, "--recipe", recipe))
    assert_one_line(result, 2, "unknown key 'calibratr'", "did you mean 'calibrator'")


def bad_files(folder: Path, model: Path) -> dict[str, tuple[Path, str]]:
    """Broken models by what is wrong with them."""
    cases = {
        "not onnx": (b"\x89PNG not a model at all", "not"),
        "empty": (b"", "no graph"),
        "truncated": (model.read_bytes()[:-1000], "truncated"),
    }
    found = {"missing": (folder / "nope.onnx", "does not exist"), "folder": (folder, "folder")}
    for name, (content, word) in cases.items():
        path = folder / f"{name.replace(' ', '-')}.onnx"
        path.write_bytes(content)
        found[name] = (path, word)
    return found


@pytest.mark.parametrize("case", ["missing", "folder", "not onnx", "empty", "truncated"])
def test_bad_models(model: Path, data: Path, tmp_path: Path, case: str) -> None:
    path, word = bad_files(tmp_path, model)[case]
    result = run("compile", path, "-o", tmp_path / "out.onnx", "--data", data)
    assert_one_line(result, 2, word, path.name)


def test_missing_external_data(model: Path, data: Path, tmp_path: Path) -> None:
    found = onnx.load(model)
    path = tmp_path / "external.onnx"
    onnx.save(found, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    good = run("compile", path, "-o", tmp_path / "o.onnx", "--data", data, "--no-bench")
    assert good.exit_code == 0, good.output
    (tmp_path / "weights.bin").unlink()
    result = run("compile", path, "-o", tmp_path / "p.onnx", "--data", data)
    assert_one_line(result, 2, "weights.bin", "missing")


BAD_DATA = {
    "wrong name": ({"z": np.zeros((4, ROWS), np.float32)}, ("'x'",)),
    "wrong dtype": ({"x": np.zeros((4, ROWS), np.float64)}, ("float64", "float32")),
    "wrong rank": ({"x": np.zeros((4, 2, ROWS), np.float32)}, ("rank 3", "rank 2")),
    "wrong size": ({"x": np.zeros((4, 9), np.float32)}, ("9", str(ROWS))),
    "empty": ({"x": np.zeros((0, ROWS), np.float32)}, ("x.npz",)),
    "nan": ({"x": np.full((4, ROWS), np.nan, np.float32)}, ("NaN",)),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(model: Path, tmp_path: Path, case: str) -> None:
    arrays, words = BAD_DATA[case]
    path = tmp_path / "x.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    assert_one_line(run(*compile_args(model, path)), 2, *words)


def test_output_folder_missing_or_output_is_the_model(model: Path, data: Path) -> None:
    missing = run("compile", model, "-o", model.parent / "no" / "out.onnx", "--data", data)
    assert_one_line(missing, 2, "does not exist")
    same = run("compile", model, "-o", model, "--data", data)
    assert_one_line(same, 2, "input model itself")


def test_a_folder_that_takes_no_files(model: Path, data: Path) -> None:
    """/proc refuses new files to everyone, root too."""
    result = run("compile", model, "-o", "/proc/out.onnx", "--data", data)
    assert_one_line(result, 2, "/proc")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only folders")
def test_read_only_folder(model: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    result = run("compile", model, "-o", folder / "out.onnx", "--data", data)
    assert_one_line(result, 2, "Permission denied")


def test_static_without_data_and_qdq_without_data(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    result = run("compile", model, "-o", out, "--mode", "static")
    assert_one_line(result, 2, "calibration data", "--data")
    assert_one_line(run("compile", model, "-o", out, "--target", "qdq"), 2, "--data")


def test_without_data_the_mode_is_dynamic_and_the_note_says_made_up(model: Path) -> None:
    result = run("compile", model, "-o", model.with_name("out.onnx"), "--no-bench")
    assert result.exit_code == 0, result.output
    assert "dynamic" in result.stdout and "random inputs" in result.stdout


def test_traceback_only_with_v(model: Path, data: Path) -> None:
    args = ("compile", "nope.onnx", "-o", "x.onnx")
    plain, detailed = (run_module("qcompile.commands.cli", *args, *v) for v in ((), ("-v",)))
    assert plain.returncode == detailed.returncode == 2
    assert "Traceback" not in plain.stderr and "Traceback" in detailed.stderr


def listening() -> None:
    """A background job of a shell starts deaf to SIGINT, and so would what it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_signals_leave_an_existing_output_and_no_debris(
    model: Path, tmp_path: Path, number: int, code: int, said: str
) -> None:
    """While calibration runs, weights lie in a temporary folder, which goes too."""
    out, scratch = tmp_path / "out.onnx", tmp_path / "scratch"
    out.write_bytes(b"precious")
    scratch.mkdir()
    (tmp_path / "slow_feeds.py").write_text(
        "import time, numpy, pathlib\n"
        "def feeds():\n"
        "    pathlib.Path('started').touch()\n"
        "    while True:\n"
        "        time.sleep(0.05)\n"
        f"        yield {{'x': numpy.ones((1, {ROWS}), numpy.float32)}}\n"
    )
    args = [sys.executable, "-m", "qcompile.commands.cli", "compile", str(model), "-o", str(out)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(scratch)}
    process = subprocess.Popen(
        [*args, "--data", "slow_feeds:feeds"],
        cwd=tmp_path,
        env=env,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=listening,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert f"\n{said}: nothing was written" in stderr and "Traceback" not in stderr
    assert out.read_bytes() == b"precious"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert {p.name for p in scratch.iterdir()} <= {".ses"}  # which importing onnxruntime writes


def test_sigterm_is_handled_as_before_once_a_command_is_done() -> None:
    before = signal.getsignal(signal.SIGTERM)
    run("passes", "-h")
    assert signal.getsignal(signal.SIGTERM) is before


def test_out_of_memory_is_one_line(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("qcompile.commands._build.compile_one", exhausted)
    assert_one_line(run(*compile_args(model, data)), 2, "out of memory", "--max-memory")


def test_the_cache_is_kept_until_the_output_is_written(
    model: Path, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "kept"
    failed = run(*compile_args(model, data, "--cache", folder, "--max-abs", 0, "--search-time", 0))
    assert failed.exit_code == 1 and len(list(folder.iterdir())) == 1
    done = run(*compile_args(model, data, "--cache", folder))
    assert done.exit_code == 0 and "taken from an earlier run" in done.output
    assert not list(folder.iterdir())
    run(*compile_args(model, data, "--no-cache", "--max-abs", 0))
    both = run(*compile_args(model, data, "--no-cache", "--cache", folder))
    assert_one_line(both, 2, "--cache and --no-cache")
    assert (
        not list(folder.iterdir())
        and not (Path(os.environ["XDG_CACHE_HOME"]) / "qcompile").exists()
    )


def test_help_does_not_import_the_runtime_and_nothing_imports_torch() -> None:
    code = (
        "import sys, qcompile.commands.cli\n"
        "assert 'onnxruntime' not in sys.modules\n"
        "import qcompile; qcompile.compile\n"
        "bad = {'torch', 'transformers', 'optimum', 'pyarrow', 'fsspec'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_outputs_are_regular_files_and_links_are_followed(model: Path, data: Path) -> None:
    """A named pipe stays a pipe; a link stays a link, and what it points to is written."""
    pipe = model.with_name("pipe.onnx")
    os.mkfifo(pipe)
    assert_one_line(run("compile", model, "-o", pipe, "--data", data), 2, "device or pipe")
    assert pipe.is_fifo()
    link, real = model.with_name("link.onnx"), model.with_name("real.onnx")
    link.symlink_to(real)
    assert run("compile", model, "-o", link, "--data", data, "--no-bench").exit_code == 0
    assert link.is_symlink() and real.is_file() and not real.is_symlink()


def test_no_file_stands_for_two_things(model: Path, data: Path, tmp_path: Path) -> None:
    both = tmp_path / "same.json"
    result = run("compile", model, "-o", both, "--report", both, "--data", data)
    assert_one_line(result, 2, "report", "is the output itself")
    before = model.read_bytes()
    assert_one_line(run("bench", model, f"--json={model}"), 2, ".json")
    assert model.read_bytes() == before


def test_force_shows_the_gate_that_failed(model: Path, data: Path) -> None:
    result = run(*compile_args(model, data, "--min-cosine", "1.0", "--force"))
    assert "gate failed" in result.stdout


def test_a_pipeline_that_plans_only_says_that_nothing_was_quantized(
    model: Path, data: Path
) -> None:
    found = json.loads(
        run(*compile_args(model, data, "--pipeline", "plan-operands", "--json")).stdout
    )
    assert not [r for r in found["ledger"] if r["dtype"] in ("int8", "uint8")]
    assert any("no pass of the pipeline inserts" in note for note in found["notes"])


def test_inspect_counts_external_data(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "external.onnx"
    onnx.save(
        onnx.load(model), path, save_as_external_data=True, location="w.bin", size_threshold=0
    )
    found = json.loads(run("inspect", path, "--json").stdout)
    total = path.stat().st_size + (tmp_path / "w.bin").stat().st_size
    assert sum(r["bytes"] for r in found["ledger"]) == found["bytes"]
    assert abs(found["bytes"] - total) < 4096 * 2  # external data is padded to pages


def test_usage_errors_are_one_line_too(model: Path) -> None:
    for args in (("compile", model), ("bench", model, "--dim", "batch=0"), ("nonsense",)):
        result = run(*args)
        assert_one_line(result, 2)
        assert len(result.stderr.strip().splitlines()) == 1


def test_names_with_brackets_are_shown_as_they_are(tmp_path: Path) -> None:
    """rich reads [/x] as markup."""
    found = model_proto("g (float[n,4] x) => (float[n,4] y) { y = Relu(x) }")
    found.graph.output[0].name = found.graph.node[0].output[0] = "out[/x]"
    path = tmp_path / "m.onnx"
    onnx.save(found, path)
    result = run("compile", path, "-o", tmp_path / "o.onnx", "--no-bench")
    assert result.exit_code == 0, result.output
    assert "out[/x]" in result.stdout
