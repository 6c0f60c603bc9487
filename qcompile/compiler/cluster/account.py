"""What workers of a cluster did for one compilation, for its report."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Annotated

_OF_ALL = ("workers", "threads", "dashboard")  # not counted over time


@dataclass(frozen=True)
class ClusterAccount:
    """Work that was done by other processes, and what it cost to move it."""

    workers: Annotated[int, "processes at the end"]
    threads: Annotated[int, "of all workers together"]
    dashboard: Annotated[str, "address of Dask's dashboard"]
    tasks: Annotated[int, "work items that were finished"]
    retries: Annotated[int, "items that were done again since their worker was lost"]
    sent_bytes: Annotated[int, "of data and settings, to workers"]
    model_bytes: Annotated[int, "of models that workers could not open as files, and of settings"]
    received_bytes: Annotated[int, "of observers and scores, from workers"]
    busy_seconds: Annotated[float, "of all workers together"]
    lost_seconds: Annotated[float, "that items had been at workers that were lost"]

    def minus(self, before: ClusterAccount) -> ClusterAccount:
        """What was done after ``before``."""
        counted = [f.name for f in fields(self) if f.name not in _OF_ALL]
        new = {name: getattr(self, name) - getattr(before, name) for name in counted}
        return replace(self, **{n: round(v, 3) for n, v in new.items()})
