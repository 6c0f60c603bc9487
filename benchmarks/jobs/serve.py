"""Serve: pass a gate as in CI, then answer in onnxruntime-web, over HTTP, and in a pipeline."""

from __future__ import annotations

import json
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from benchmarks.jobs._image_models import image_classifier, images
from benchmarks.jobs._job import Job, ask_node
from benchmarks.jobs._measures import same_labels
from benchmarks.jobs._text_models import classifier, held_out

EXPORT = "qcompile export model -o float"
VERIFY = "qcompile verify float/model.onnx compiled/{file} --data {data} --max-flips 0.02"


def server(folder: Path, port: int = 8000) -> ThreadingHTTPServer:
    """Takes POST of a text, gives its label; requests may come at the same time."""
    from tokenizers import Tokenizer

    import qcompile

    session = qcompile.session(folder / "model.onnx")
    names = json.loads((folder / "config.json").read_text(encoding="utf-8"))["id2label"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            text = self.rfile.read(int(self.headers["Content-Length"])).decode()
            tokens = tokenizer.encode(text)
            arrays = {
                "input_ids": np.array([tokens.ids], np.int64),
                "attention_mask": np.array([tokens.attention_mask], np.int64),
                "token_type_ids": np.array([tokens.type_ids], np.int64),
            }
            feed = {i.name: arrays[i.name] for i in session.get_inputs()}
            (logits,) = session.run(["logits"], feed)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(names[str(logits[0].argmax())].encode())

        def log_message(self, format: str, *args: object) -> None:
            """Requests are not logged."""

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def with_server(folder: Path, texts: list[str]) -> list[str]:
    """The answers to requests, four at a time."""
    with server(folder, port=0) as running:
        url = f"http://127.0.0.1:{running.server_address[1]}"
        threading.Thread(target=running.serve_forever, daemon=True).start()

        def ask(text: str) -> str:
            with urllib.request.urlopen(url, data=text.encode(), timeout=60) as response:
                return str(response.read().decode())

        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(ask, texts))
        running.shutdown()
    return answers


def with_pipeline(folder: Path, files: list[Path]) -> list[str]:
    from optimum.onnxruntime import ORTModelForImageClassification
    from transformers import AutoImageProcessor, pipeline

    model = ORTModelForImageClassification.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    classify = pipeline("image-classification", model=model, image_processor=processor)
    return [answers[0]["label"] for answers in classify([str(file) for file in files])]


JOBS = (
    Job(
        name="serve/distilbert",
        package="onnxruntime-web",
        needs=("optimum-onnx",),
        npm=("onnxruntime-web", "@huggingface/transformers"),
        make=classifier("distilbert"),
        build=(
            EXPORT,
            "qcompile compile float -o compiled --data texts.txt --variant int8 --no-bench",
        ),
        gate=VERIFY.format(file="onnx/model_quantized.onnx", data="held-out.txt --tokenizer float"),
        answer=lambda work, folder: ask_node(
            "serve.mjs",
            work,
            folder.name,
            "model.onnx" if folder.name == "float" else "onnx/model_quantized.onnx",
            "held-out.txt",
        ),
        compare=same_labels,
        measure="same label",
        least=0.98,
        compiled_file="onnx/model_quantized.onnx",
    ),
    Job(
        name="serve/roberta",
        package="onnxruntime, HTTP",
        needs=("onnxruntime", "optimum-onnx"),
        make=classifier("roberta"),
        build=(EXPORT, "qcompile compile float -o compiled --data texts.txt --no-bench"),
        gate=VERIFY.format(file="model.onnx", data="held-out.txt --tokenizer float"),
        answer=lambda work, folder: with_server(folder, held_out(work)),
        compare=same_labels,
        measure="same label",
        least=0.98,
    ),
    Job(
        name="serve/vit",
        package="transformers, optimum",
        needs=("transformers", "optimum-onnx", "onnxruntime"),
        make=image_classifier,
        build=(
            "optimum-cli export onnx --model model --task image-classification float",
            "qcompile compile float -o compiled --data images.npz --no-bench",
        ),
        gate=VERIFY.format(file="model.onnx", data="images.npz"),
        answer=lambda work, folder: with_pipeline(folder, images(work)),
        compare=same_labels,
        measure="same label",
        least=0.98,
    ),
)
