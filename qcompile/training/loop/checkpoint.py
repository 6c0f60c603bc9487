"""The state of a training run in one file, written completely or not at all.

The file also says which run it belongs to: digests of the data, the graph and the settings. A run
continues only from its own checkpoint, and never replaces the file of another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import Any, TypeAlias
from zipfile import BadZipFile, ZipFile

import torch

from qcompile.errors import OutputError, TrainingError
from qcompile.system.atomic_write import replacing

# Tensors, numbers, text, and dicts and lists of them: reading must not run code.
State: TypeAlias = dict[str, Any]
_FORMAT = "qcompile training 2"
_REMEDY = "delete it to start again, or name another file"


def save(path: Path, run: Mapping[str, str], state: State) -> None:
    """Write the state of a run atomically. Raises OutputError where that is not possible.

    run: what the result depends on, with a digest of each.
    """
    with replacing(path) as file:
        try:
            torch.save({"format": _FORMAT, "run": dict(run), "state": state}, file)
        except RuntimeError as e:  # in place of the stream's own error, such as a full disk
            raise OutputError(f"cannot write {str(path)!r}: {str(e).splitlines()[0]}") from e


def load(path: Path, run: Mapping[str, str]) -> State | None:
    """The state that a run has stored, None where it has stored none.

    Tensors are on the CPU. Raises TrainingError for a file that is damaged, is something else or
    belongs to another run; the file stays as it is.
    """
    _remove_unfinished(path)
    if not path.exists():
        return None
    held = _read(path)
    if not isinstance(held, dict) or held.get("format") != _FORMAT:
        raise TrainingError(f"{str(path)!r} is no checkpoint of this version; {_REMEDY}")
    theirs, state = held.get("run"), held.get("state")
    if not isinstance(theirs, dict) or not isinstance(state, dict):
        raise TrainingError(f"checkpoint {str(path)!r} is incomplete; {_REMEDY}")
    other = [name for name in dict.fromkeys([*run, *theirs]) if run.get(name) != theirs.get(name)]
    if other:
        raise TrainingError(
            f"checkpoint {str(path)!r} belongs to a run with other {', '.join(other)}; {_REMEDY}"
        )
    return state


def _read(path: Path) -> object:
    try:
        with ZipFile(path) as archive:  # torch does not compare the check sums that it writes
            damaged = archive.testzip()
        if damaged is not None:
            raise BadZipFile(f"check sum of {damaged}")
        found: object = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # foreign bytes make zipfile and torch raise nearly anything
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise TrainingError(f"checkpoint {str(path)!r} cannot be read: {reason}; {_REMEDY}") from e
    return found


def _remove_unfinished(path: Path) -> None:
    """Remove what a run that was killed while it wrote has left: it is as large as a checkpoint."""
    for left in path.parent.glob(f".{escape(path.name)}.*"):
        with suppress(OSError):
            left.unlink()
