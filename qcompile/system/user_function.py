"""A user's Python function, found by a name ``package.module:function``."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

from qcompile.errors import DataError

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_function_name(text: str) -> bool:
    """True for ``package.module:function``."""
    return _NAME.fullmatch(text) is not None


def find_function(name: str, what: str) -> Callable[..., object]:
    """The function of that name; installed modules come before those of the current folder.

    Raises DataError, whose message starts with ``what``, the purpose of the function.
    """
    if not is_function_name(name):
        raise DataError(f"{what} {name!r}: expected package.module:function")
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as e:  # a user's module may raise anything
        message = f"{type(e).__name__}: {e}".splitlines()[0]
        raise DataError(
            f"{what} {name!r}: module {module_name!r} cannot be imported: {message}"
        ) from e
    function = getattr(module, attribute, None)
    if not callable(function):
        found = "has no" if function is None else f"holds a {type(function).__name__} as"
        raise DataError(
            f"{what} {name!r}: module {module_name!r} {found} {attribute!r}, expected a function"
        )
    checked: Callable[..., object] = function
    return checked
