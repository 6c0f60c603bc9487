"""Where reports go: JSON always, beside the model unless named; an HTML page where asked for."""

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
    """``data`` is JSON, which ``inspect`` and ``report`` read; ``page`` is for people."""

    data: Path
    page: Path | None = None

    @classmethod
    def for_model(cls, out: Path, paths: Iterable[Path]) -> ReportFiles:
        """As --report says. Raises OutputError on other forms, and on two files of one form."""
        found = by_form(paths)
        data = found.get(".json", out.with_name(f"{out.stem}.report.json"))
        return cls(data, found.get(".html"))

    @property
    def named(self) -> dict[str, Path]:
        """Each file by what it is, for messages."""
        return {"report": self.data} | ({} if self.page is None else {"report page": self.page})

    def write(self, report: Report) -> None:
        """Write both, each whole or not at all. Raises OutputError."""
        atomic_write.write_atomic(self.data, report.to_json().encode())
        if self.page is not None:
            atomic_write.write_atomic(self.page, report.to_html().encode())


def report_option(command: F) -> F:
    """--report, once for each form."""
    return click.option(
        "--report",
        "report_files",
        type=PATH,
        multiple=True,
        help="x.html: also write the report as a page. x.json: name of the JSON report "
        "instead of <stem>.report.json next to OUT. Give it once for each.",
    )(command)


def by_form(paths: Iterable[Path]) -> dict[str, Path]:
    """At most one of each form, by its suffix. Raises OutputError."""
    found: dict[str, Path] = {}
    for path in paths:
        if path.suffix not in (".json", ".html"):
            raise OutputError(f"report {str(path)!r}: expected a .json or .html file")
        if path.suffix in found:
            raise OutputError(f"report {str(path)!r}: {str(found[path.suffix])!r} is one already")
        found[path.suffix] = path
    return found
