"""Rerank: scores of question and passage in CrossEncoder and fastembed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.jobs._job import Job
from benchmarks.jobs._measures import ranking_order
from benchmarks.jobs._text_models import reranker

EXPORT = "qcompile export model -o float"
COMPILE = "qcompile compile float -o compiled --data pairs.csv --text-columns question,passage"


def with_cross_encoder(
    folder: Path, question: str, passages: list[str], file: str = "model.onnx"
) -> Any:
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(folder), backend="onnx", model_kwargs={"file_name": file})
    return model.predict([(question, passage) for passage in passages])


def with_fastembed(
    folder: Path, question: str, passages: list[str], file: str = "onnx/model_quantized.onnx"
) -> Any:
    from fastembed.common.model_description import ModelSource
    from fastembed.rerank.cross_encoder import TextCrossEncoder

    name = f"local/{folder.name}"
    if name not in [model["model"] for model in TextCrossEncoder.list_supported_models()]:
        source = ModelSource(hf=name)  # not asked: the files are in folder
        TextCrossEncoder.add_custom_model(model=name, model_file=file, sources=source)
    model = TextCrossEncoder(name, specific_model_path=str(folder))
    return list(model.rerank(question, passages))


def scores(work: Path, ask: Callable[[str, list[str]], Any]) -> Any:
    """Scores [questions, passages] of queries.json."""
    values = json.loads((work / "queries.json").read_text(encoding="utf-8"))
    return np.array([ask(question, values["passages"]) for question in values["questions"]])


def cross_encoder(file: str) -> Callable[[Path, Path], Any]:
    """How to ask CrossEncoder, with this file of the compiled folder."""

    def answer(work: Path, folder: Path) -> Any:
        name = "model.onnx" if folder.name == "float" else file
        return scores(work, lambda q, p: with_cross_encoder(folder, q, p, name))

    return answer


def fastembed(work: Path, folder: Path) -> Any:
    """How to ask fastembed."""
    name = "model.onnx" if folder.name == "float" else "onnx/model_quantized.onnx"
    return scores(work, lambda q, p: with_fastembed(folder, q, p, name))


JOBS = (
    Job(
        name="rerank/bert",
        package="CrossEncoder",
        needs=("sentence-transformers", "optimum-onnx", "onnxruntime"),
        make=reranker("bert"),
        build=(EXPORT, f"{COMPILE} --no-bench"),
        answer=cross_encoder("model.onnx"),
        compare=ranking_order,
        measure="order of passages",
        least=0.95,
    ),
    Job(
        name="rerank/xlm-roberta",
        package="fastembed",
        needs=("fastembed", "onnxruntime", "optimum-onnx"),
        make=reranker("xlm-roberta"),
        build=(EXPORT, f"{COMPILE} --variant int8 --no-bench"),
        answer=fastembed,
        compare=ranking_order,
        measure="order of passages",
        least=0.95,
        compiled_file="onnx/model_quantized.onnx",
    ),
    Job(
        name="rerank/modernbert",
        package="CrossEncoder",
        needs=("sentence-transformers", "optimum-onnx", "onnxruntime"),
        make=reranker("modernbert"),
        build=(EXPORT, f"{COMPILE} --variant q4"),
        answer=cross_encoder("onnx/model_q4.onnx"),
        compare=ranking_order,
        measure="order of passages",
        least=0.9,
        compiled_file="onnx/model_q4.onnx",
    ),
)
