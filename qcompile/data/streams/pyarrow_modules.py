"""pyarrow, which the extra ``data`` installs: imported only when such a file is read."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from qcompile.data.streams.storage import INSTALL
from qcompile.errors import DataError
from qcompile.system.interrupts import deferred_interrupts


def import_pyarrow(name: str, module: str = "pyarrow") -> Any:
    """pyarrow or a module of it. Raises DataError, for the file of this name, where it is missing.

    It takes half a second, which commands without such files need not pay.
    """
    with deferred_interrupts():
        try:
            return import_module(module)
        except ImportError as e:
            raise DataError(f"{name} needs pyarrow: {INSTALL}") from e
