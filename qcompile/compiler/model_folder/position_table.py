"""How many positions a model has, found in its weights before it is exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qcompile.compiler.model_folder.layout import Folder

_TABLE = "position_embeddings.weight"
_LARGEST_HEADER = 100_000_000  # as the safetensors library allows


def position_rows(folder: Folder) -> int | None:
    """Rows of the position table in the folder's weights; None where there is none.

    The header of a .safetensors file has the shape of every tensor:
    https://huggingface.co/docs/safetensors/index#format. A model without a table, as with rotary
    positions, takes texts of any length.
    """
    files = (folder.path / name for name in folder.weights if name.endswith(".safetensors"))
    shapes = (
        entry["shape"]
        for file in files
        for name, entry in _header(file).items()
        if name.endswith(_TABLE) and isinstance(entry, dict) and len(entry.get("shape", ())) == 2
    )
    return min((int(rows) for rows, _ in shapes), default=None)


def _header(file: Path) -> dict[str, Any]:
    """The header; empty where it cannot be read, which the export reports."""
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            found = json.loads(stream.read(size)) if size <= _LARGEST_HEADER else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
