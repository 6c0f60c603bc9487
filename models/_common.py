"""Shared by all scripts of this folder: one-line errors, pip packages, the destination folder."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

PACKAGES = {
    "torch": "torch==2.13.0",
    "transformers": "transformers==4.57.6",
    "optimum.exporters.onnx": "optimum-onnx==0.1.0",
    "onnxscript": "onnxscript==0.7.2",
    "onnxruntime": "onnxruntime==1.31.1",
}


def fail(message: str, code: int = 2) -> NoReturn:
    """Ends the program with one line on stderr."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def need(module: str) -> Any:
    """Imports a module; where that fails, ends with a line that says how to install it."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        fail(f"cannot import {module} ({error}); run: pip install '{PACKAGES[module]}'")


def packaged_file(distribution: str, ending: str, install: str) -> Path:
    """The installed file of a pip package whose path has this ending."""
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        fail(f"{distribution} is not installed; run: pip install {install}")
    for file in files:
        if file.as_posix().endswith(ending):
            return Path(str(file.locate()))
    fail(f"{distribution} lacks {ending}; run: pip install --force-reinstall {install}")


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the destination folder, described by a module's docstring."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dest", type=Path, metavar="DEST", help="folder to write model.onnx into")
    return parser


def make_folder(dest: Path) -> Path:
    """Creates the destination folder; where that fails, ends with a line that says why."""
    try:
        dest.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot make folder {dest}: {error.strerror}")
    return dest
