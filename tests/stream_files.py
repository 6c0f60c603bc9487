"""Writes rows as a file of each format that streams read, by the name's ending."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

Rows = Sequence[Mapping[str, Any]]


def texts(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Rows with the texts t0, t1, …"""
    return [{"text": f"t{number}", "label": number} for number in range(first, first + count)]


def write(path: Path, rows: Rows, *, group: int = 7) -> Path:
    """Write the rows. group: rows of a row group or batch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist([*rows]), path, row_group_size=group)
    elif path.suffix == ".arrow":
        write_arrow(path, rows, group, pa.ipc.new_stream)
    else:
        path.write_bytes(compressed(path.suffix, lines(path.name, rows)))
    return path


def write_arrow(path: Path, rows: Rows, group: int, new: Any) -> None:
    """In Arrow's format for files or that for streams."""
    table = pa.Table.from_pylist([*rows])
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=group)


def lines(name: str, rows: Rows) -> bytes:
    """The contents of a file of this name before compression."""
    if ".jsonl" in name:
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if ".csv" in name:
        text = io.StringIO()
        table = csv.DictWriter(text, [*rows[0]])
        table.writeheader()
        table.writerows(rows)
        return text.getvalue().encode()
    return "".join(f"{row['text']}\n" for row in rows).encode()


def compressed(suffix: str, contents: bytes) -> bytes:
    """As gzip or Zstandard, by the ending."""
    if suffix == ".gz":
        return gzip.compress(contents)
    if suffix == ".zst":
        return bytes(pa.compress(contents, "zstd", asbytes=True))
    return contents


def write_dataset(folder: Path, parts: Sequence[Rows]) -> Path:
    """As save_to_disk of datasets lays out a Dataset."""
    names = [f"data-{i:05}-of-{len(parts):05}.arrow" for i in range(len(parts))]
    for name, rows in zip(names, parts, strict=True):
        write(folder / name, rows)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder
