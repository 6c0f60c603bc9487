"""What docs/deployment.md shows is run here, on a compiled model folder."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner

from qcompile.cli import main
from tests.model_folder import WIDTH, write_folder, write_text

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "deployment.md").read_text()


def blocks(language: str, section: str) -> list[str]:
    """Fenced blocks of a language below a heading."""
    text = PAGE.split(f"\n## {section}\n", 1)[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def block(language: str, section: str) -> str:
    (found,) = blocks(language, section)
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders float and int8, sentences.txt and held-out.txt, as the page names them."""
    root = tmp_path_factory.mktemp("deployment")
    write_folder(root / "float")
    write_text(root / "sentences.txt")
    write_text(root / "held-out.txt", seed=1)
    (command,) = re.findall(r"^RUN (qcompile .*)$", block("dockerfile", "A container"), re.M)
    args = shlex.split(re.sub(r"(?<= )/", f"{root}/", command))[1:]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    return root


def environment() -> dict[str, str]:
    """This qcompile, by its name, for what is run by a shell."""
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    return {**os.environ, "PATH": os.pathsep.join(paths), "PYTHONPATH": str(ROOT)}


def module(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "serve"}
    exec(compile(code, "serve.py", "exec"), names)
    return names


@pytest.fixture
def serve() -> dict[str, Any]:
    return module(block("python", "ONNX Runtime from Python"))


def test_the_encoder_gives_unit_vectors_close_to_the_float_ones(
    place: Path, serve: dict[str, Any]
) -> None:
    texts = ["a b c", "d e f g h a"]
    fine, small = (serve["Encoder"](place / f, threads=1)(texts) for f in ("float", "int8"))
    np.testing.assert_allclose(np.linalg.norm(small, axis=1), 1, atol=1e-6)  # float32
    cosines = (fine * small).sum(axis=1)
    assert cosines.min() > 0.99  # the gate of the Dockerfile
    alone = serve["Encoder"](place / "int8", threads=1)(texts[:1])
    np.testing.assert_allclose(small[:1], alone, atol=1e-6)  # padding does not count


@pytest.fixture
def server(place: Path, serve: dict[str, Any]) -> Iterator[str]:
    handler: type[BaseHTTPRequestHandler] = serve["Handler"]
    handler.encoder = serve["Encoder"](place / "int8", threads=1)  # type: ignore[attr-defined]
    handler.log_message = lambda *_: None  # type: ignore[method-assign]
    with HTTPServer(("127.0.0.1", 0), handler) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{made.server_address[1]}/"
        made.shutdown()
        thread.join()


def test_the_server_answers(server: str) -> None:
    body = json.dumps({"texts": ["a b", "c"]}).encode()
    with urllib.request.urlopen(urllib.request.Request(server, body)) as answer:
        vectors = json.loads(answer.read())["vectors"]
    assert np.shape(vectors) == (2, WIDTH)


def test_session_options_exist(place: Path, serve: dict[str, Any]) -> None:
    """ONNX Runtime takes any key; those that it knows are in its library."""
    session = serve["Encoder"](place / "int8", threads=1).session
    assert session.get_session_options().intra_op_num_threads == 1
    text = PAGE.split("\n## ONNX Runtime from Python\n")[1].split("\n## A gate")[0]
    keys = set(re.findall(r'[`"](session\.[^`"]+)[`"]', text))
    assert "session.intra_op.allow_spinning" in keys and len(keys) == 3
    library = b"".join(
        f.read_bytes() for f in Path(ort.__file__).parent.glob("capi/onnxruntime_pybind*")
    )
    assert not [key for key in keys if key.encode() not in library]


def cpp_toolchain() -> bool:
    """A compiler that finds ONNX Runtime's headers (CPLUS_INCLUDE_PATH) on this machine."""
    if shutil.which("g++") is None:
        return False
    command = ["g++", "-E", "-x", "c++", "-", "-o", os.devnull]
    source = "#include <onnxruntime_cxx_api.h>"
    done = subprocess.run(command, input=source, text=True, capture_output=True, check=False)
    return done.returncode == 0


def test_cpp_names_what_the_model_has(place: Path) -> None:
    code = block("cpp", "ONNX Runtime from C++")
    session = ort.InferenceSession(place / "int8" / "model.onnx")
    for array, found in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
        names = re.findall(r'"(\w+)"', re.findall(rf"{array}\[\] = \{{(.*?)\}};", code)[0])
        assert names == [f.name for f in found]


@pytest.mark.skipif(not cpp_toolchain(), reason="needs g++ and ONNX Runtime's C++ headers")
def test_cpp_compiles_and_runs(place: Path, tmp_path: Path) -> None:
    source, program = tmp_path / "serve.cpp", tmp_path / "serve"
    source.write_text(block("cpp", "ONNX Runtime from C++"))
    libraries = [f"-Wl,-rpath,{p}" for p in os.environ.get("LIBRARY_PATH", "").split(":") if p]
    command = ["g++", "-std=c++17", "-Wall", "-Werror", str(source), "-lonnxruntime", *libraries]
    subprocess.run([*command, "-o", str(program)], check=True)
    model = place / "int8" / "model.onnx"
    out = subprocess.run([program, model], check=True, capture_output=True, text=True).stdout
    ids = np.array([[2, 5, 7, 3]])
    feed = {"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0}
    first = ort.InferenceSession(model).run(None, feed)[0][0, 0, 0]
    *shape, value = out.split()
    assert shape == ["1", "4", str(WIDTH)]
    assert float(value) == pytest.approx(float(first), rel=1e-5)  # six digits are printed


def gate(place: Path) -> subprocess.CompletedProcess[str]:
    script = block("sh", "A gate in CI")
    command = ["bash", "-euc", script]
    return subprocess.run(
        command, cwd=place, env=environment(), capture_output=True, text=True, check=False
    )


def test_the_gate_passes_and_fails(place: Path) -> None:
    passed = gate(place)
    assert passed.returncode == 0, passed.stderr
    assert json.loads((place / "verify.json").read_text())["failures"] == []
    good = (place / "int8" / "model.onnx").read_bytes()
    spoilt = onnx.ModelProto.FromString(good)
    for tensor in spoilt.graph.initializer:
        if tensor.dims == [WIDTH, 4 * WIDTH]:
            values = onnx.numpy_helper.to_array(tensor)
            tensor.raw_data = np.ascontiguousarray(values[::-1]).tobytes()
    (place / "int8" / "model.onnx").write_bytes(spoilt.SerializeToString())
    try:
        failed = gate(place)
    finally:
        (place / "int8" / "model.onnx").write_bytes(good)
    assert failed.returncode == 1 and "--min-cosine" in failed.stderr


def test_the_image_holds_what_it_serves_with_and_no_more(place: Path) -> None:
    stages = block("dockerfile", "A container").split("\n\n")
    assert len(stages) == 2
    copied = re.findall(r"^COPY --from=build (.*) \S+$", stages[1], re.M)[0].split()
    assert all((place / name.lstrip("/")).is_file() for name in copied)
    tree = ast.parse(block("python", "ONNX Runtime from Python"))
    names = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import)
             for a in n.names}  # fmt: skip
    names |= {str(n.module).split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    packages = re.findall(r"^RUN pip install --no-cache-dir (.*)$", stages[1], re.M)[0].split()
    assert set(packages) == names - set(sys.stdlib_module_names)
    assert "qcompile" not in stages[1] and "USER nobody" in stages[1]


TRITON_TYPES = {"tensor(int64)": "TYPE_INT64", "tensor(float)": "TYPE_FP32"}


def test_triton_is_told_what_the_model_has(place: Path) -> None:
    """Names, types, dimensions without the batch; only the width is another model's."""
    config = block("pbtxt", "Triton")
    rows = re.findall(r'\{ name: "(\w+)" data_type: (\w+) dims: \[(.*?)\] \}', config)
    told = [(name, kind, [int(d) for d in dims.split(",")]) for name, kind, dims in rows]
    session = ort.InferenceSession(place / "int8" / "model.onnx")
    has = [
        (t.name, TRITON_TYPES[t.type], [d if isinstance(d, int) else -1 for d in t.shape[1:]])
        for t in (*session.get_inputs(), *session.get_outputs())
    ]
    assert told[-1][2][-1] == 384 and has[-1][2][-1] == WIDTH
    told[-1][2][-1] = WIDTH
    assert told == has
    assert config.count("[") == config.count("]") and config.count("{") == config.count("}")


@pytest.mark.skipif(
    importlib.util.find_spec("optimum") is None, reason="needs optimum (extra export)"
)
@pytest.mark.filterwarnings("ignore")
def test_the_pipeline_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": WIDTH,
              "num_attention_heads": 4, "pad_token_id": 0}  # fmt: skip
    (place / "int8" / "config.json").write_text(json.dumps(config))
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]",
                 "model_input_names": ["input_ids", "attention_mask", "token_type_ids"]
                 }  # fmt: skip
    (place / "int8" / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    monkeypatch.chdir(place)
    vectors = module(block("python", "optimum and transformers"))["vectors"]
    assert np.shape(vectors) == (3, WIDTH)
