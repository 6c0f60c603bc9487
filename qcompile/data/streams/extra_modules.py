"""Packages of the extra ``data``, which are imported only when such a file is read."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from qcompile.errors import DataError
from qcompile.system.interrupts import deferred_interrupts

INSTALL = "pip install -e '.[data]' in a checkout"


def import_extra(name: str, module: str) -> Any:
    """A module. Raises DataError, for the file of this name, where its package is missing.

    pyarrow takes half a second, which commands without such files need not pay.
    """
    with deferred_interrupts():
        try:
            return import_module(module)
        except ImportError as e:
            package = module.partition(".")[0]
            raise DataError(f"{name} needs {package}: {INSTALL}") from e
