"""Folders for files that are needed only during a run."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path

from qcompile.errors import OutputError


class TemporaryFolder:
    """A temporary folder in ``TMPDIR``, removed when the last reference to this object is gone.

    Raises OutputError where it cannot be created.
    """

    def __init__(self) -> None:
        try:
            self.path = Path(tempfile.mkdtemp(prefix="qcompile-"))
        except OSError as e:
            where = tempfile.gettempdir()
            raise OutputError(f"temporary folder {where!r} (TMPDIR): {e.strerror}") from e
        self._removed = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
