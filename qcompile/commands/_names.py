"""Types of options that take the name of something registered: the shell completes the names.

The names are checked where they are used, so that the command line and Python give one message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import click
from click.shell_completion import CompletionItem

from qcompile.compiler.config.recipe import recipe_names
from qcompile.rewriting import registry


class Names(click.ParamType[str]):
    """Text whose last part, after ``separator``, is one of ``names``, or with ``files`` a file."""

    def __init__(
        self,
        metavar: str,
        names: Callable[[], Iterable[str]],
        *,
        separator: str = "",
        files: bool = False,
    ) -> None:
        self.name, self._names = metavar, names
        self._separator, self._files = separator, files

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        """The text as it is."""
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The names that begin as the last part does; files too, where they are taken."""
        before, separator, start = "", "", incomplete
        if self._separator:
            before, separator, start = incomplete.rpartition(self._separator)
        found = [
            CompletionItem(f"{before}{separator}{name}")
            for name in self._names()
            if name.startswith(start)
        ]
        return found or ([CompletionItem(incomplete, type="file")] if self._files else [])


TARGET = Names("NAME", registry.targets)
CALIBRATOR = Names("NAME", registry.calibrators)
PIPELINE = Names("PASSES", registry.passes, separator=",")
RECIPE = Names("NAME|FILE", recipe_names, files=True)
RECIPE_NAME = Names("NAME", recipe_names)
