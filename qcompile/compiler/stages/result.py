"""What a compilation gives, or refuses to give."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qcompile.calibration.calibration_file import Calibration
from qcompile.compiler.config import lockfile
from qcompile.compiler.config.lockfile import Lock
from qcompile.compiler.report.report import Report
from qcompile.errors import GateError, OutputError
from qcompile.ir.model_io.write_model import ModelFiles


@dataclass
class Result:
    """The compiled model, in files that live as long as this, and how it came to be.

    ``lock`` where ``Options.keep_lock`` or ``keep_calibration`` asked for it, ``calibration`` where
    the latter did.
    """

    written: ModelFiles
    report: Report
    lock: Lock | None = None
    calibration: Calibration | None = None

    @property
    def model(self) -> bytes:
        """The model's file; over 2 GiB the weights are in another one, which ``save`` writes."""
        return self.written.path.read_bytes()

    def save(self, path: str | Path) -> None:
        """Write the model whole or not at all. Raises OutputError."""
        self.written.save(Path(path))

    def save_lock(self, path: str | Path, *, light: bool = False) -> None:
        """Write the lock, NAME.yaml, and its calibration, NAME.npz, unless it is to be ``light``.

        Raises OutputError, also where what is to be written was not kept.
        """
        if self.lock is None or (self.calibration is None and self.lock.is_light and not light):
            what = "no calibration was kept for the lock" if self.lock else "no lock was kept"
            raise OutputError(f"{what}: compile with Options(keep_calibration=True)")
        lockfile.save_lock(Path(path), self.lock, None if light else self.calibration)


class RejectedError(GateError):
    """A gate failed; ``result`` holds what would have been written. ``where`` leads the message."""

    def __init__(self, result: Result, where: str = "") -> None:
        super().__init__(where + "; ".join(result.report.failures))
        self.result = result
