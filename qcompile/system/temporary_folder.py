"""Folders for files that a run needs and nobody keeps."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path

from qcompile.errors import OutputError


class TemporaryFolder:
    """A temporary folder in ``TMPDIR`` that is gone when nothing holds it any more.

    Raises OutputError where there is no room for one.
    """

    def __init__(self) -> None:
        try:
            self.path = Path(tempfile.mkdtemp(prefix="qcompile-"))
        except OSError as e:
            where = tempfile.gettempdir()
            raise OutputError(f"temporary folder {where!r} (TMPDIR): {e.strerror}") from e
        self._removed = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
