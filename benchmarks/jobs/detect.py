"""Detect: boxes in transformers.js, onnxruntime and rapidocr."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.jobs._image_models import detector, images, text_detector
from benchmarks.jobs._job import Job, ask_node
from benchmarks.jobs._measures import Box, same_boxes

EXPORT = "optimum-cli export onnx --model model --task object-detection float"
COMPILE = "qcompile compile float -o compiled --data images.npz"


def with_onnxruntime(folder: Path, files: list[Path]) -> list[list[Box]]:
    import onnxruntime
    import torch
    from PIL import Image
    from transformers import AutoConfig, AutoImageProcessor
    from transformers.models.yolos.modeling_yolos import YolosObjectDetectionOutput

    session = onnxruntime.InferenceSession(folder / "model.onnx")
    processor = AutoImageProcessor.from_pretrained(folder)
    names = AutoConfig.from_pretrained(folder).id2label
    found = []
    for file in files:
        image = Image.open(file)
        pixels = processor(image, return_tensors="np")["pixel_values"]
        logits, boxes = session.run(["logits", "pred_boxes"], {"pixel_values": pixels})
        outputs = YolosObjectDetectionOutput(
            logits=torch.tensor(logits), pred_boxes=torch.tensor(boxes)
        )
        sizes = [(image.height, image.width)]
        (answer,) = processor.post_process_object_detection(outputs, 0.3, sizes)
        rows = zip(answer["labels"].tolist(), answer["boxes"].tolist(), strict=True)
        found.append([Box(names[label], tuple(corners)) for label, corners in rows])
    return found


def with_rapidocr(file: Path, files: list[Path]) -> list[list[Box]]:
    from rapidocr_onnxruntime import RapidOCR

    engine = RapidOCR(det_model_path=str(file), det_limit_side_len=320)
    found = []
    for image in files:
        quadrangles, _ = engine(str(image), use_det=True, use_cls=False, use_rec=False)
        found.append([text_box(quadrangle) for quadrangle in quadrangles or []])
    return found


def text_box(quadrangle: list[list[float]]) -> Box:
    """The upright box around four corners."""
    x, y = [p[0] for p in quadrangle], [p[1] for p in quadrangle]
    return Box("text", (min(x), min(y), max(x), max(y)))


def with_node(work: Path, folder: Path) -> list[list[Box]]:
    """The boxes that detect.mjs prints."""
    found: list[list[dict[str, Any]]] = ask_node(
        "detect.mjs", work, folder.name, *(f"images/{file.name}" for file in images(work))
    )
    return [[Box(b["label"], tuple(b["box"].values())) for b in image] for image in found]


JOBS = (
    Job(
        name="detect/detr",
        package="transformers.js",
        needs=("optimum-onnx",),
        npm=("@huggingface/transformers", "onnxruntime-node"),
        make=detector("detr"),
        build=(EXPORT, f"{COMPILE} --variant int8 --no-bench"),
        answer=with_node,
        compare=same_boxes,
        measure="same boxes (F1)",
        least=0.9,
        compiled_file="onnx/model_quantized.onnx",
    ),
    Job(
        name="detect/yolos",
        package="onnxruntime",
        needs=("onnxruntime", "transformers", "optimum-onnx"),
        make=detector("yolos"),
        build=(EXPORT, f"{COMPILE} --no-bench"),
        answer=lambda work, folder: with_onnxruntime(folder, images(work)),
        compare=same_boxes,
        measure="same boxes (F1)",
        least=0.9,
    ),
    Job(
        name="detect/dbnet",
        package="rapidocr",
        needs=("rapidocr-onnxruntime", "onnxruntime"),
        make=text_detector,
        build=("qcompile compile float.onnx -o compiled.onnx --data images.npz --no-bench",),
        answer=lambda work, file: with_rapidocr(file, images(work)),
        compare=same_boxes,
        measure="same boxes (F1)",
        least=0.9,
        float_name="float.onnx",
        compiled_name="compiled.onnx",
    ),
)
