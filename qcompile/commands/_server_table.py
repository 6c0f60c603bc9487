"""The table of ``bench --streams`` and ``bench --arrival``."""

from __future__ import annotations

import click

from qcompile.commands._console import console, megabytes, table
from qcompile.runtime import kernels
from qcompile.runtime import session as runtime
from qcompile.runtime.latency import FEWEST_ROUNDS, Comparison
from qcompile.runtime.load_figures import ServerSetup, UnderLoad

_LATENCIES = ("p50 ms", "p90", "p99")
_START = ("load ms", "first run", "memory", "peak")


def show_server(comparison: Comparison) -> None:
    """Print a table with one row per model, and notes below it."""
    setup = comparison.server
    assert setup is not None
    is_open = setup.arrival is not None
    queue = ("queue ms", "demand") if is_open else ()
    speed_up = f"speed-up ({'p50' if is_open else 'runs/s'})"
    made = table(
        _title(comparison, setup),
        *("model", "runs/s", "samples/s", speed_up, "95 %", *queue, *_LATENCIES, *_START),
    )
    for i, timing in enumerate(comparison.timings):
        found = timing.server
        assert found is not None
        latencies = (timing.median, timing.p90, found.p99_ms)
        made.add_row(
            timing.label,
            f"{found.runs_per_second:.1f}",
            f"{found.samples_per_second:.1f}",
            *_gain(comparison, i),
            *(_queue(found, setup.arrival) if setup.arrival else ()),
            *(f"{ms:.2f}" for ms in latencies),
            *_start(found),
        )
    console().print(made)
    notes = [*setup.notes, *comparison.session_notes]
    if comparison.noisy:
        notes.append("the machine was noisy: a model's rounds differ by more than 25 %")
    if setup.base is not None:
        notes.insert(0, f"memory is what a process of {megabytes(setup.base)} has in addition")
    for note in notes:
        click.echo(f"note: {note}")


def _title(comparison: Comparison, setup: ServerSetup) -> str:
    where = ", ".join(
        f"{name} {setup.smallest[name]}{f' to {sizes}' if sizes != setup.smallest[name] else ''}"
        for name, sizes in comparison.shapes.items()
    )
    where = f"{where}; " if where else ""
    how = "back to back" if setup.arrival is None else f"{setup.arrival:g} requests/s arrive"
    isa = ", ".join(kernels.instruction_sets()[:2]) or "unknown instruction set"
    return (
        f"{where}{how}; {_count(setup.streams, 'stream')} x "
        f"{_count(comparison.threads, 'thread')} ({_count(setup.sessions, 'session')}) on "
        f"{_count(setup.cores, 'core')}, {isa}, onnxruntime {runtime.version()}"
    )


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _queue(found: UnderLoad, arrival: float) -> tuple[str, str]:
    """The mean wait for a stream, and the share of the capacity that is asked for."""
    return f"{found.queue_ms:.2f}", f"{arrival / found.capacity:.0%}"


def _gain(comparison: Comparison, index: int) -> tuple[str, str]:
    """Throughput over that of the reference; where requests arrive at a rate, the median latency of
    the reference over this one's. Within rounds, with the interval."""
    if index == 0:
        return "1.00", ""
    found, setup = comparison.timings[index].server, comparison.server
    assert found is not None and setup is not None
    if setup.arrival is None:
        gain, interval = found.ratio, f"{found.ratio_low:.2f} to {found.ratio_high:.2f}"
    else:
        ratio = comparison.ratio(index)
        gain, interval = 1 / ratio.median, f"{1 / ratio.high:.2f} to {1 / ratio.low:.2f}"
    return f"{gain:.2f}", interval if comparison.rounds >= FEWEST_ROUNDS else "-"


def _start(found: UnderLoad) -> list[str]:
    times = ["-" if ms is None else f"{ms:.1f}" for ms in (found.load_ms, found.first_run_ms)]
    sizes = ["-" if size is None else megabytes(size) for size in (found.resident, found.peak)]
    return [*times, *sizes]
