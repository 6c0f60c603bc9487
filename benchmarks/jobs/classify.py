"""Classify: labels of text in transformers over optimum, and in transformers.js."""

from __future__ import annotations

from pathlib import Path

from benchmarks.jobs._job import Job, ask_node
from benchmarks.jobs._measures import same_labels
from benchmarks.jobs._text_models import classifier, held_out

EXPORT = "qcompile export model -o float"


def with_pipeline(folder: Path, texts: list[str], file: str = "model.onnx") -> list[str]:
    from optimum.onnxruntime import ORTModelForSequenceClassification
    from transformers import AutoTokenizer, pipeline

    model = ORTModelForSequenceClassification.from_pretrained(folder, file_name=file)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
    return [answer["label"] for answer in classify(texts, batch_size=8)]


JOBS = (
    Job(
        name="classify/bert",
        package="transformers, optimum",
        needs=("transformers", "optimum-onnx", "onnxruntime"),
        make=classifier("bert"),
        build=(
            EXPORT,
            "qcompile compile float -o compiled --data texts.txt --max-flips 0.02 --no-bench",
        ),
        answer=lambda work, folder: with_pipeline(folder, held_out(work)),
        compare=same_labels,
        measure="same label",
        least=0.98,
    ),
    Job(
        name="classify/deberta-v2",
        package="transformers, optimum",
        needs=("transformers", "optimum-onnx", "onnxruntime"),
        make=classifier("deberta-v2"),
        build=(EXPORT, "qcompile compile float -o compiled --data texts.txt --variant q4"),
        answer=lambda work, folder: with_pipeline(
            folder, held_out(work), "model.onnx" if folder.name == "float" else "model_q4.onnx"
        ),
        compare=same_labels,
        measure="same label",
        least=0.95,
        compiled_file="onnx/model_q4.onnx",
    ),
    Job(
        name="classify/modernbert",
        package="transformers.js",
        needs=("optimum-onnx",),
        npm=("@huggingface/transformers", "onnxruntime-node"),
        make=classifier("modernbert"),
        build=(
            EXPORT,
            "qcompile compile float -o compiled --data texts.txt --variant int8 --no-bench",
        ),
        answer=lambda work, folder: ask_node("classify.mjs", work, folder.name, "held-out.txt"),
        compare=same_labels,
        measure="same label",
        least=0.98,
        compiled_file="onnx/model_quantized.onnx",
    ),
)
