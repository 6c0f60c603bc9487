"""What docs/deployment.md shows is run here, on a compiled model folder."""

from __future__ import annotations

import ast
import configparser
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
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

import qcompile
from qcompile import Options, Recipe
from qcompile.compiler.stages import saturation_check
from qcompile.runtime import session as runtime
from tests.command_line import ROOT, run
from tests.compiler.model_folder.written_folder import WIDTH, write_folder, write_text
from tests.targets.test_instruction_sets import feeds
from tests.targets.test_instruction_sets import model as linear

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
    result = run(*args)
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


OPTION = "session.x64quantprecision"


def saturating_file(folder: Path) -> Path:
    """A linear compiled for VNNI, some of whose sums leave int16 elsewhere."""
    path = folder / "vnni.onnx"
    qcompile.compile(
        linear(),
        feeds(0.9),
        recipe=Recipe(isa="avx512-vnni"),
        options=Options(bench=False, force=True),
    ).save(path)
    return path


def test_exact_sums_are_asked_for_where_a_file_and_a_processor_need_them(
    place: Path, tmp_path: Path, serve: dict[str, Any]
) -> None:
    files = {"default": place / "int8" / "model.onnx", "vnni": saturating_file(tmp_path)}
    asked = set()
    for processor, (name, path) in product((True, False), files.items()):
        serve["adds_in_int16"] = lambda processor=processor: processor
        if _has_entry(serve["open_session"](path, 1), OPTION):
            asked.add((processor, name))
    assert asked == {(True, "vnni")}


def test_the_page_and_qcompile_open_the_same_session(
    place: Path, tmp_path: Path, serve: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = saturating_file(tmp_path), ort.InferenceSession
    seen: list[str] = []

    def opened(*given: Any, **more: Any) -> Any:
        made = real(*given, **more)
        seen.append("1" if _has_entry(made, OPTION) else "")
        return made

    monkeypatch.setattr(runtime, "saturates", lambda: True)
    serve["adds_in_int16"] = lambda: True
    for file in (path, place / "int8" / "model.onnx"):
        answers = serve["open_session"](file, 1)
        monkeypatch.setattr(ort, "InferenceSession", opened)
        ours = qcompile.session(file, threads=1)
        monkeypatch.setattr(ort, "InferenceSession", real)
        assert seen[-1] == ("1" if _has_entry(answers, OPTION) else "")
        feed = feeds(0.9)[0] if file == path else tokens()
        for ours_is, theirs in zip(ours.run(None, feed), answers.run(None, feed), strict=True):
            np.testing.assert_array_equal(ours_is, theirs)


def tokens() -> dict[str, Any]:
    ids = np.array([[2, 5, 7, 3]])
    return {"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0}


def test_cpp_reads_what_the_compiler_writes() -> None:
    code = block("cpp", "ONNX Runtime from C++")
    assert f'"{saturation_check.METADATA}"' in code
    assert f'!= "{saturation_check.NO_OPTION}"' in code
    assert 'AddConfigEntry("{}", "{}")'.format(*runtime.EXACT_SUMS) in code


@pytest.mark.parametrize(
    ("flags", "saturates"),
    [
        ("flags : fpu avx2 fma", True),
        ("flags : avx2 avx512f", True),
        ("flags : avx2 avx512f avx512_vnni", False),
        ("flags : avx2 avx_vnni", False),
        ("flags : avx2 amx_int8", False),
        ("Features : asimddp i8mm", False),
    ],
)
def test_the_page_knows_which_processors_saturate(
    tmp_path: Path, serve: dict[str, Any], flags: str, saturates: bool
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{flags}\n")
    serve["Path"] = lambda _: tmp_path / "cpuinfo"
    assert serve["adds_in_int16"]() == saturates


def _has_entry(session: Any, key: str) -> bool:
    try:
        return bool(session.get_session_options().get_session_config_entry(key) == "1")
    except RuntimeError:  # what ONNX Runtime says of an entry that was never set
        return False


def test_session_options_exist(place: Path, serve: dict[str, Any]) -> None:
    """ONNX Runtime takes any key; those that it knows are in its library."""
    session = serve["Encoder"](place / "int8", threads=1).session
    assert session.get_session_options().intra_op_num_threads == 1
    text = PAGE.split("\n## ONNX Runtime from Python\n")[1].split("\n## A gate")[0]
    keys = set(re.findall(r'[`"](session\.[^`"=]+)[`"=]', text))
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


def test_what_the_image_starts_is_in_it() -> None:
    """Each line is an instruction; what CMD names was copied, and what it listens on is exposed."""
    text = block("dockerfile", "A container").replace("\\\n", " ")
    lines = re.findall(r"^([A-Z]+) +(.+)$", text, re.M)
    assert len(lines) == len(list(filter(None, text.splitlines())))
    assert {name for name, _ in lines} == {"FROM", "COPY", "RUN", "USER", "EXPOSE", "CMD"}
    given = dict(lines)  # the last of each
    program, script, folder = json.loads(given["CMD"])
    places = {value.split()[-1].rstrip("/") for name, value in lines if name == "COPY"}
    assert program == "python" and {script, folder} <= places
    serve = block("python", "ONNX Runtime from Python")
    assert f'HTTPServer(("", {given["EXPOSE"]}), Handler)' in serve
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    oldest = setup["options"]["python_requires"].removeprefix(">=")
    assert given["FROM"] == f"python:{oldest}-slim"


TRITON_TYPES = {"tensor(int64)": "TYPE_INT64", "tensor(float)": "TYPE_FP32"}
# What the page uses of Triton's model_config.proto; text is parsed by names, so numbers are free.
TRITON = """
syntax: "proto3" name: "model_config.proto" package: "inference"
enum_type { name: "DataType" value { name: "TYPE_INVALID" number: 0 }
  value { name: "TYPE_INT64" number: 9 } value { name: "TYPE_FP32" number: 11 } }
message_type { name: "ModelTensor"
  field { name: "name" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
  field { name: "data_type" number: 2 label: LABEL_OPTIONAL type: TYPE_ENUM
    type_name: ".inference.DataType" }
  field { name: "dims" number: 3 label: LABEL_REPEATED type: TYPE_INT64 } }
message_type { name: "ModelInstanceGroup"
  enum_type { name: "Kind" value { name: "KIND_AUTO" number: 0 }
    value { name: "KIND_GPU" number: 1 } value { name: "KIND_CPU" number: 2 } }
  field { name: "kind" number: 4 label: LABEL_OPTIONAL type: TYPE_ENUM
    type_name: ".inference.ModelInstanceGroup.Kind" }
  field { name: "count" number: 2 label: LABEL_OPTIONAL type: TYPE_INT32 } }
message_type { name: "ModelDynamicBatching" }
message_type { name: "ModelParameter"
  field { name: "string_value" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING } }
message_type { name: "ModelConfig"
  field { name: "name" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
  field { name: "backend" number: 17 label: LABEL_OPTIONAL type: TYPE_STRING }
  field { name: "max_batch_size" number: 4 label: LABEL_OPTIONAL type: TYPE_INT32 }
  field { name: "input" number: 5 label: LABEL_REPEATED type: TYPE_MESSAGE
    type_name: ".inference.ModelTensor" }
  field { name: "output" number: 6 label: LABEL_REPEATED type: TYPE_MESSAGE
    type_name: ".inference.ModelTensor" }
  field { name: "instance_group" number: 7 label: LABEL_REPEATED type: TYPE_MESSAGE
    type_name: ".inference.ModelInstanceGroup" }
  field { name: "dynamic_batching" number: 11 label: LABEL_OPTIONAL type: TYPE_MESSAGE
    type_name: ".inference.ModelDynamicBatching" }
  field { name: "parameters" number: 14 label: LABEL_REPEATED type: TYPE_MESSAGE
    type_name: ".inference.ModelConfig.ParametersEntry" }
  nested_type { name: "ParametersEntry" options { map_entry: true }
    field { name: "key" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
    field { name: "value" number: 2 label: LABEL_OPTIONAL type: TYPE_MESSAGE
      type_name: ".inference.ModelParameter" } } }
"""


def triton_config(text: str) -> Any:
    """Parsed as Triton does it: protobuf's text format, unknown names refused."""
    pool = descriptor_pool.DescriptorPool()
    file = text_format.Parse(TRITON, descriptor_pb2.FileDescriptorProto())
    pool.AddSerializedFile(file.SerializeToString())
    found = pool.FindMessageTypeByName("inference.ModelConfig")
    return text_format.Parse(text, message_factory.GetMessageClass(found)())


def told(tensors: Any) -> list[tuple[str, str, list[int]]]:
    names = {9: "TYPE_INT64", 11: "TYPE_FP32"}
    return [(t.name, names[t.data_type], list(t.dims)) for t in tensors]


def test_triton_is_told_what_the_model_has(place: Path) -> None:
    """Names, types, dimensions without the batch; only the width is another model's."""
    config = triton_config(block("pbtxt", "Triton"))
    session = ort.InferenceSession(place / "int8" / "model.onnx")
    inputs, outputs = (
        [
            (t.name, TRITON_TYPES[t.type], [d if isinstance(d, int) else -1 for d in t.shape])
            for t in tensors
        ]
        for tensors in (session.get_inputs(), session.get_outputs())
    )
    # max_batch_size stands for the first dimension, which the model must leave open.
    assert config.max_batch_size > 0 and {d[0] for _, _, d in inputs + outputs} == {-1}
    assert outputs[-1][2][-1] == WIDTH
    outputs[-1][2][-1] = 384
    assert told(config.input) == [(n, kind, dims[1:]) for n, kind, dims in inputs]
    assert told(config.output) == [(n, kind, dims[1:]) for n, kind, dims in outputs]
    assert config.HasField("dynamic_batching") and config.parameters["intra_op_thread_count"]
    (folder,) = re.findall(r"^models/(\w+)/config\.pbtxt$", PAGE, re.M)
    assert config.name == folder  # or Triton does not load it


@pytest.mark.parametrize(
    ("old", "new"), [("max_batch_size:", "max_batch:"), ("] }\n]", "] }\n"), ("INT64", "LONG")]
)
def test_the_check_of_tritons_file_sees_a_fault(old: str, new: str) -> None:
    text = block("pbtxt", "Triton")
    assert old in text
    with pytest.raises(text_format.ParseError):
        triton_config(text.replace(old, new, 1))


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
