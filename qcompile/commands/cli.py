"""The command line: one file per command in ``qcompile/commands``, one line for every error."""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from types import FrameType
from typing import Any

import click
from click.shell_completion import CompletionItem

from qcompile import __version__
from qcompile.commands._printable import printable
from qcompile.commands._summaries import SUMMARIES
from qcompile.errors import QCompileError

# Command -> module, imported when the command runs: --help must not wait for onnxruntime.
_COMMANDS = {
    "demo": "demo",
    "compile": "compile",
    "verify": "verify",
    "bench": "bench",
    "sensitivity": "sensitivity",
    "inspect": "inspect",
    "report": "report",
    "diff": "diff",
    "export": "export",
    "train": "train",
    "passes": "plugins",
    "calibrators": "plugins",
    "targets": "plugins",
    "recipes": "recipes",
    "schema": "schema",
}
_INTERRUPTED, _TERMINATED = 130, 143  # 128 plus the signal's number, as in shells


class TerminatedError(KeyboardInterrupt):
    """SIGTERM: handled like Ctrl-C, so that temporary files are removed, with another exit code."""


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises TerminatedError instead of ending the process."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise TerminatedError

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Commands(click.Group):
    """Imports commands when they run, and turns errors into one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"qcompile.commands.{_COMMANDS[cmd_name]}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As in click, with the nearest commands for one that does not exist."""
        name = args[0]
        if name not in _COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            close = " or ".join(repr(n) for n in get_close_matches(name, _COMMANDS))
            hint = f", did you mean {close}?" if close else f", expected {', '.join(_COMMANDS)}"
            ctx.fail(f"no such command {name!r}{hint}")
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Commands by name, since their descriptions would take an import of each."""
        found = [CompletionItem(name) for name in _COMMANDS if name.startswith(incomplete)]
        return [*found, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """As in click, without importing the commands."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, SUMMARIES[name]) for name in self.list_commands(ctx)])

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run, and exit: 0 done, 1 a gate failed, 2 bad input, 130 interrupted, 143 terminated."""
        try:
            _print_what_the_stream_can()
            with _terminable():
                code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except click.exceptions.NoArgsIsHelpError as e:
            e.show()
            code = e.exit_code
        except click.ClickException as e:
            _explain(e.format_message())
            code = e.exit_code
        except (KeyboardInterrupt, click.Abort) as e:
            cause = e.__cause__ if isinstance(e, click.Abort) else e
            is_term = isinstance(cause, TerminatedError)
            what, code = ("terminated", _TERMINATED) if is_term else ("interrupted", _INTERRUPTED)
            click.echo(f"{what}: {str(cause or '') or 'nothing was written'}", err=True)
        except QCompileError as e:
            _explain(str(e))
            code = e.exit_code
        except BrokenPipeError:  # the reader closed the pipe: nothing to report
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 0
        except MemoryError:
            _explain("out of memory: try a smaller --max-memory, --batch-size or --samples")
            code = 2
        except Exception as e:
            _explain(f"internal error, please report it: {type(e).__name__}: {e}")
            code = 2
        sys.exit(code if isinstance(code, int) else 0)


def _print_what_the_stream_can() -> None:
    """Characters that a stream's encoding lacks become ?: pipes on Windows are not UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _explain(message: str) -> None:
    """Print one line; with -v also the traceback."""
    if "-v" in sys.argv or "--verbose" in sys.argv:
        traceback.print_exc()
    click.echo("error: " + printable(" ".join(message.split())), err=True)


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qcompile")
def main() -> None:
    """Compile ONNX models into quantized ones, then verify, time and explain the result."""


if __name__ == "__main__":
    main()
