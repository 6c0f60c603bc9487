"""Time per operator of a model, from ONNX Runtime's profiler.

The profiler slows down every node, small ones most, so shares are more reliable than sums. A node's
time is the median over runs, so that single interruptions do not count.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.runtime import session as runtime
from qcompile.runtime.session import Feed, Session, SessionOptions
from qcompile.system.json_values import Record, members

_WARMUP = 5  # runs, or as many as are measured where these are fewer
_KERNEL = "_kernel_time"


@dataclass(frozen=True)
class OpTime:
    """One operator type in one model: number of nodes, and milliseconds per run."""

    op: str
    nodes: int
    ms: float


@dataclass(frozen=True)
class Profile(Record):
    """Operators of one model, the slowest first."""

    label: str
    ops: tuple[OpTime, ...]

    JSON = members("model=label total_ms=total ops")

    @property
    def total(self) -> float:
        """Milliseconds per run inside operators."""
        return sum(o.ms for o in self.ops)


def profile(
    models: Sequence[tuple[str, bytes | Path]],
    feed: Feed,
    threads: int = 0,
    runs: int = 30,
    provider: str = "CPUExecutionProvider",
    exact: Collection[str] = (),
) -> list[Profile]:
    """Profile models one after the other. Raises ModelError where one does not run.

    ``exact``: labels of models in whose sessions int8 sums are exact also on x86 without VNNI.
    """
    options = SessionOptions(threads or runtime.threads(), provider=provider)
    return [
        Profile(label, _ops(model, feed, replace(options, exact=label in exact), runs))
        for label, model in models
    ]


def _ops(model: bytes | Path, feed: Feed, options: SessionOptions, runs: int) -> tuple[OpTime, ...]:
    warmup = min(_WARMUP, runs)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        session = Session(model, replace(options, profile=Path(folder) / "profile"))
        inputs = {name: feed[name] for name in session.inputs if name in feed}
        session.run(inputs)  # reports missing inputs, unlike ``call``
        for _ in range(warmup + runs - 1):
            session.call(inputs)
        events = json.loads(session.end_profile().read_text(encoding="utf-8"))
    return _summed(events, warmup)


def _summed(events: Sequence[dict[str, Any]], warmup: int) -> tuple[OpTime, ...]:
    """Medians of nodes after the warm-up runs, summed by operator."""
    times: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
            times[event["args"]["op_name"], event["name"]].append(event["dur"])
    nodes: defaultdict[str, list[float]] = defaultdict(list)
    for (op, _), durations in times.items():
        nodes[op].append(float(np.median(durations[warmup:] or durations)) / 1e3)
    found = (OpTime(op, len(ms), sum(ms)) for op, ms in nodes.items())
    return tuple(sorted(found, key=lambda o: -o.ms))
