"""The user's own metric as a gate: a function of feeds and outputs; higher is better."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from qcompile.errors import DataError
from qcompile.quant import Array
from qcompile.system import user_function

Batch = Mapping[str, Array]
Metric = Callable[[Sequence[Batch], Sequence[Batch]], float]


def resolve_metric(metric: Metric | str) -> tuple[str, Metric]:
    """A metric's name and function. Raises DataError where there is none of that name."""
    if isinstance(metric, str):
        return metric, user_function.find_function(metric, "metric")  # type: ignore[return-value]
    return getattr(metric, "__qualname__", type(metric).__name__), metric


def measure(metric: Metric | str, feeds: Sequence[Batch], outputs: Sequence[Batch]) -> float:
    """The metric of one model's outputs, dicts by name. Raises DataError where it fails."""
    name, function = resolve_metric(metric)
    try:
        value = float(function(feeds, outputs))
    except Exception as e:  # a user's function may raise anything
        message = f"{type(e).__name__}: {e}".splitlines()[0]
        raise DataError(f"metric {name!r} failed: {message}") from e
    if math.isnan(value):
        raise DataError(f"metric {name!r} is NaN, expected a number, higher is better")
    return value
