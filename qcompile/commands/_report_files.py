"""The files of a report: always JSON, by default next to the model; an HTML page if asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import click

from qcompile.commands._options import PATH, F
from qcompile.compiler.report.report import Report
from qcompile.errors import OutputError
from qcompile.system import atomic_write


@dataclass(frozen=True)
class ReportFiles:
    """``data``: JSON, which ``inspect`` and ``report`` read. ``page``: HTML."""

    data: Path
    page: Path | None = None

    @classmethod
    def for_model(cls, out: Path, paths: Iterable[Path]) -> ReportFiles:
        """The files that --report names. Raises OutputError as ``by_suffix`` does."""
        named = by_suffix(paths)
        data = named.get(".json", out.with_name(f"{out.stem}.report.json"))
        return cls(data, named.get(".html"))

    @property
    def named(self) -> dict[str, Path]:
        """Each file by what it is, for messages."""
        return {"report": self.data} | ({} if self.page is None else {"report page": self.page})

    def write(self, report: Report) -> None:
        """Write both files, each atomically. Raises OutputError."""
        atomic_write.write_atomic(self.data, report.to_json().encode())
        if self.page is not None:
            atomic_write.write_atomic(self.page, report.to_html().encode())


def report_option(command: F) -> F:
    """--report, once per format."""
    return click.option(
        "--report",
        "report_files",
        type=PATH,
        multiple=True,
        help="x.html: also write the report as a page. x.json: name of the JSON report "
        "instead of <stem>.report.json next to OUT. Repeatable, once per format.",
    )(command)


def by_suffix(paths: Iterable[Path]) -> dict[str, Path]:
    """Files by suffix. Raises OutputError for another suffix than .json or .html, or two of one."""
    files: dict[str, Path] = {}
    for path in paths:
        if path.suffix not in (".json", ".html"):
            raise OutputError(f"report {str(path)!r}: expected a .json or .html file")
        if path.suffix in files:
            other = str(files[path.suffix])
            raise OutputError(f"report {str(path)!r}: {other!r} has the same format")
        files[path.suffix] = path
    return files
