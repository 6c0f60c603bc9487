"""Reads the report and lock that compile wrote next to a model, if they describe that very file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qcompile.compiler.config import lockfile
from qcompile.compiler.config.lockfile import Lock
from qcompile.compiler.report.ledger import LedgerRow, read_rows
from qcompile.errors import RecipeError


def report_path(model: Path) -> Path:
    """Where compile writes a model's report by default."""
    return model.with_name(f"{model.stem}.report.json")


def find_report(path: Path, digest: str) -> dict[str, Any] | None:
    """A report of the model with this SHA-256; None if it is missing, or of another model."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if found["model_sha256"] == digest else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def rows_of(report: dict[str, Any] | None) -> list[LedgerRow] | None:
    """The ledger of a report, None if it has none that can be read."""
    try:
        return None if report is None else read_rows(report)
    except (KeyError, TypeError, ValueError):
        return None


def find_lock(model: Path, digest: str) -> Lock | None:
    """The lock ``<stem>.lock.yaml`` of the model with this SHA-256; None if there is none."""
    path = model.with_name(f"{model.stem}.lock.yaml")
    try:
        found = lockfile.read_lockfile(path) if lockfile.is_lock(path) else None
    except RecipeError:
        return None
    return found if found is not None and found.output["sha256"] == digest else None
