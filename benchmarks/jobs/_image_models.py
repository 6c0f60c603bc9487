"""Small image models of random weights, trained for seconds, and the images for them.

Images have one to three rectangles, red or blue, on grey noise. A detector learns boxes and
colours, a classifier the colour of an image with one rectangle.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.jobs._text_models import fit, save, seeded
from models._common import packaged_file

Pixels = NDArray[np.uint8]
SIDE = 96
COLOURS = {"red": (200, 40, 40), "blue": (40, 40, 200)}
STEPS, BATCH = 120, 8
TEXTS = ("Quarterly report", "Invoice 2041", "Total amount due", "Chapter one", "Opening hours")


def picture(seed: int, most: int) -> tuple[Pixels, list[list[float]], list[int]]:
    """Pixels [side, side, 3], boxes as centre and size in shares of the side, colours' numbers."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(100, 156, (SIDE, SIDE, 3)).astype(np.uint8)
    boxes, colours = [], []
    for _ in range(rng.integers(1, most + 1)):
        width, height = rng.integers(20, 40, 2)
        x, y = rng.integers(0, SIDE - width), rng.integers(0, SIDE - height)
        colour = int(rng.integers(len(COLOURS)))
        pixels[y : y + height, x : x + width] = list(COLOURS.values())[colour]
        corners = np.array([x + width / 2, y + height / 2, width, height]) / SIDE
        boxes.append([float(v) for v in corners])
        colours.append(colour)
    return pixels, boxes, colours


def write_images(work: Path, processor: Any, most: int) -> None:
    """Images to compare on, and images.npz to calibrate on, as the processor prepares them."""
    from PIL import Image

    (work / "images").mkdir()
    for number in range(16):
        Image.fromarray(picture(number, most)[0]).save(work / "images" / f"{number:02}.png")
    pictures = [picture(100 + number, most)[0] for number in range(32)]
    pixels = processor(pictures, return_tensors="np")["pixel_values"]
    np.savez(work / "images.npz", pixel_values=pixels)


def images(work: Path) -> list[Path]:
    """The files to compare on."""
    return sorted((work / "images").glob("*.png"))


def detector(model_type: str) -> Callable[[Path], None]:
    """What makes the folder ``model``: trained on boxes of rectangles."""

    def make(work: Path) -> None:
        from transformers import (
            AutoModelForObjectDetection,
            DetrImageProcessor,
            YolosImageProcessor,
        )

        processor_class = DetrImageProcessor if model_type == "detr" else YolosImageProcessor
        processor = processor_class(size={"height": SIDE, "width": SIDE})
        write_images(work, processor, 3)
        model = seeded(AutoModelForObjectDetection, detector_config(model_type))
        fit(model, box_batches(processor))
        save(model, processor, work)

    return make


def detector_config(model_type: str) -> Any:
    """A small configuration of YOLOS, or of DETR over a small ResNet."""
    from transformers import DetrConfig, ResNetConfig, YolosConfig

    names = {"id2label": dict(enumerate(COLOURS)), "num_labels": len(COLOURS)}
    if model_type == "yolos":
        return YolosConfig(
            hidden_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=512,
            image_size=[SIDE, SIDE],
            patch_size=12,
            num_detection_tokens=8,
            **names,
        )
    backbone = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 128, 128],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage4"],
    )
    return DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        num_queries=8,
        d_model=128,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=512,
        decoder_ffn_dim=512,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        **names,
    )


def box_batches(processor: Any) -> Iterator[dict[str, Any]]:
    """Batches of images with their boxes."""
    import torch

    for step in range(STEPS):
        rows = [picture(10_000 + BATCH * step + number, 3) for number in range(BATCH)]
        pixels = processor([row[0] for row in rows], return_tensors="pt")["pixel_values"]
        labels = [
            {"class_labels": torch.tensor(colours), "boxes": torch.tensor(boxes)}
            for _, boxes, colours in rows
        ]
        yield {"pixel_values": pixels, "labels": labels}


def image_classifier(work: Path) -> None:
    """Makes the folder ``model``: a ViT, trained to tell the colour of a rectangle."""
    from transformers import AutoModelForImageClassification, ViTConfig, ViTImageProcessor

    processor = ViTImageProcessor(size={"height": SIDE, "width": SIDE})
    write_images(work, processor, 1)
    config = ViTConfig(
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=512,
        image_size=SIDE,
        patch_size=12,
        id2label=dict(enumerate(COLOURS)),
        label2id={name: number for number, name in enumerate(COLOURS)},
    )
    model = seeded(AutoModelForImageClassification, config)
    fit(model, colour_batches(processor))
    save(model, processor, work)


def colour_batches(processor: Any) -> Iterator[dict[str, Any]]:
    """Batches of images with one rectangle and the number of its colour."""
    import torch

    for step in range(STEPS // 2):
        rows = [picture(10_000 + BATCH * step + number, 1) for number in range(BATCH)]
        pixels = processor([row[0] for row in rows], return_tensors="pt")["pixel_values"]
        yield {"pixel_values": pixels, "labels": torch.tensor([row[2][0] for row in rows])}


def text_detector(work: Path) -> None:
    """Makes float.onnx, the text detector that rapidocr ships, and images with printed lines."""
    name = "rapidocr-onnxruntime"
    source = packaged_file(name, "ch_PP-OCRv4_det_infer.onnx", name)
    shutil.copyfile(source, work / "float.onnx")
    (work / "images").mkdir()
    for number in range(8):
        page(number).save(work / "images" / f"{number:02}.png")
    pixels = np.stack([np.asarray(page(100 + number)) for number in range(16)])
    normal = (pixels.astype(np.float32) / 255 - 0.5) / 0.5  # as the package prepares them
    np.savez(work / "images.npz", x=normal.transpose(0, 3, 1, 2))


def page(seed: int) -> Any:
    """A page of 320 by 320 pixels with three printed lines."""
    from PIL import Image, ImageDraw, ImageFont

    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (320, 320), tuple(int(v) for v in rng.integers(200, 256, 3)))
    draw = ImageDraw.Draw(image)
    for line in range(3):
        size = int(rng.integers(18, 30))
        place = int(rng.integers(10, 60)), 30 + 95 * line + int(rng.integers(0, 20))
        draw.text(place, str(rng.choice(TEXTS)), "black", ImageFont.load_default(size))
    return image
