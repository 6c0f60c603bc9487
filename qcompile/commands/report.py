"""qcompile report FILE.json [-o PAGE.html]"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import click

from qcompile.commands._options import PATH
from qcompile.compiler.report import html
from qcompile.errors import OutputError, ReportError
from qcompile.system import atomic_write


@click.command()
@click.argument("file", type=PATH)
@click.option("-o", "--output", type=PATH, help="Page to write.  [default: FILE with suffix .html]")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
def report(file: Path, output: Path | None, quiet: bool, verbose: bool) -> None:
    """Make an HTML page of FILE, the .json report of compile or sensitivity.

    The page is one .html file that needs no other file. FILE can be -, which reads stdin.
    """
    piped = str(file) == "-"
    if piped and output is None:
        raise OutputError("-o is needed where the report comes from stdin")
    out = output or file.with_suffix(".html")
    if out.suffix != ".html":
        raise OutputError(f"page {str(out)!r}: expected a .html file")
    atomic_write.check_writable(out)
    atomic_write.write_atomic(out, _page(file, piped).encode())
    if not quiet:
        click.echo(f"written: {shlex.quote(str(out))}")


def _page(source: Path, piped: bool) -> str:
    """The page of a report. Raises ReportError if the file cannot be read or is not a report."""
    what = "stdin" if piped else repr(str(source))
    try:
        content = json.loads(sys.stdin.buffer.read() if piped else source.read_bytes())
    except OSError as e:
        raise ReportError(f"report {what} cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:  # not UTF-8, not JSON, or nested too deeply
        raise ReportError(f"report {what} is not JSON: {e}") from e
    try:
        return html.page(content)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
        raise ReportError(
            f"{what} is not a report, expected the JSON of qcompile compile or sensitivity: "
            f"{type(e).__name__}: {e}"
        ) from e
