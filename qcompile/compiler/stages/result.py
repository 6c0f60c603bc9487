"""The result of a compilation, and the error that holds a rejected one."""

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
    """The compiled model, in temporary files that live as long as this object, and its report.

    ``lock``: if ``Options.keep_lock`` or ``keep_calibration`` is set. ``calibration``: if the
    latter is set.
    """

    written: ModelFiles
    report: Report
    lock: Lock | None = None
    calibration: Calibration | None = None

    def __repr__(self) -> str:
        return f"<Result {self.report.headline}>"

    def _repr_html_(self) -> str:
        """The headline table of the report, for notebooks."""
        return self.report._repr_html_()

    @property
    def model(self) -> bytes:
        """The model's file; over 2 GiB the weights are in another file, which ``save`` writes."""
        return self.written.path.read_bytes()

    def save(self, path: str | Path) -> None:
        """Write the model atomically. Raises OutputError."""
        self.written.save(Path(path))

    def save_lock(self, path: str | Path, *, light: bool = False) -> None:
        """Write the lock, NAME.yaml, and, unless ``light``, its calibration, NAME.npz.

        Raises OutputError, also if the lock or the calibration was not kept.
        """
        if self.lock is None or (self.calibration is None and self.lock.is_light and not light):
            what = "no calibration was kept for the lock" if self.lock else "no lock was kept"
            raise OutputError(f"{what}: compile with Options(keep_calibration=True)")
        lockfile.save_lock(Path(path), self.lock, None if light else self.calibration)


class RejectedError(GateError):
    """A gate failed; ``result`` is what would have been written. ``where`` starts the message."""

    def __init__(self, result: Result, where: str = "") -> None:
        super().__init__(where + "; ".join(result.report.failures))
        self.result = result
