"""bench under load: tables, JSON, and what goes wrong."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import qcompile
from qcompile.errors import DataError
from qcompile.rewriting.testing import model_proto
from qcompile.runtime import server_comparison
from qcompile.runtime.latency import TimingOptions
from qcompile.runtime.startup import Startup
from tests.command_line import assert_one_line, run
from tests.runtime.virtual_clock import running

QUICK = ("--rounds", 1, "--seconds", 0.02, "--threads", 1)


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts in processes of their own are tested elsewhere; each takes over a second."""
    started = Startup(0.001, 0.001, 60_000_000, 1_000_000, 2_000_000)
    monkeypatch.setattr(server_comparison, "startup_in_new_process", lambda *_: started)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Of rows of four numbers; its Reshape takes up to three samples."""
    text = """g (float[batch,4] x) => (float[3,k] y)
    <int64[2] shape = {3, -1}> { r = Relu(x) y = Reshape(r, shape) }"""
    path = tmp_path / "m.onnx"
    onnx.save(model_proto(text), path)
    return path


def bench(*args: object) -> list[dict[str, Any]]:
    result = run("bench", *args, "--json", "-")
    assert result.exit_code == 0, result.output
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


def test_a_sweep_back_to_back(model: Path) -> None:
    found = bench(model, model, "--streams", 2, "--dim", "batch=3,6", *QUICK)
    assert [c["shapes"]["x"] for c in found] == [[3, 4], [6, 4]]
    for comparison, samples in zip(found, (3, 6), strict=True):
        assert (comparison["server"]["streams"], comparison["server"]["sessions"]) == (2, 1)
        for timed in comparison["models"]:
            server = timed["server"]
            expected = samples * server["runs_per_second"]
            assert server["samples_per_second"] == pytest.approx(expected)
        assert comparison["models"][1]["server"]["throughput_ratio"] > 0


def test_arrivals_of_real_feeds_of_several_sizes(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "feeds"
    folder.mkdir()
    for i, batch in enumerate((3, 6, 12)):
        np.savez(folder / f"{i}.npz", x=np.ones((batch, 4), np.float32))
    (found,) = bench(model, "--arrival", 2000, "--seed", 5, "--data", folder, *QUICK)
    server = found["server"]
    assert (server["arrival"], server["streams"], server["seed"]) == (2000, 1, 5)
    assert (server["feeds"], found["shapes"]["x"]) == (3, [12, 4])
    assert server["smallest_shapes"]["x"] == [3, 4]
    assert found["models"][0]["runs"] > 0


def test_the_table_has_all_that_a_server_needs(model: Path) -> None:
    back_to_back = run("bench", model, model, "--streams", 2, "--dim", "batch=3", *QUICK).stdout
    for word in ("runs/s", "samples/s", "p50 ms", "p90", "p99", "load ms", "first run", "memory"):
        assert word in back_to_back
    assert "2 streams x 1 thread (1 session) on " in " ".join(back_to_back.split())
    assert "note: memory is what a process of 60.0 MB has in addition" in back_to_back
    arriving = run("bench", model, "--arrival", 1500, "--dim", "batch=3", *QUICK).stdout
    assert "queue ms" in arriving and "demand" in arriving and "queue ms" not in back_to_back
    assert "1500 requests/s arrive" in arriving


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--streams", 0), ("--streams", "0")),
        (("--streams", -1), ("--streams", "-1")),
        (("--streams", 99999), ("--streams", "99999")),
        (("--streams", "x"), ("--streams", "x")),
        (("--arrival", 0), ("arrival 0", "over 0")),
        (("--arrival", -3), ("arrival -3", "over 0")),
        (("--arrival", "nan"), ("arrival nan", "over 0")),
        (("--arrival", "inf"), ("arrival inf", "over 0")),
        (("--arrival", 2), ("about 4 requests", "--seconds 5")),
        (("--arrival", 1e9), ("at most 1000000", "--seconds 0.001")),
        (("--streams", 2, "--profile"), ("--profile", "--streams")),
        (("--arrival", 99, "--profile"), ("--profile", "--arrival")),
        (("--streams", 2, "--seed", -1), ("--seed",)),
        (("--streams", 2, "--seconds", 0), ("--seconds",)),
    ],
)
def test_bad_options_are_one_line(
    options: tuple[object, ...], words: tuple[str, ...], model: Path
) -> None:
    assert_one_line(run("bench", model, *options), 2, *words)


def test_a_model_that_fails_in_a_stream_is_one_line(model: Path, tmp_path: Path) -> None:
    """It takes the first feed, but not all of the data."""
    folder = tmp_path / "feeds"
    folder.mkdir()
    for i, batch in enumerate((3, 4)):
        np.savez(folder / f"{i}.npz", x=np.ones((batch, 4), np.float32))
    text = "g (float[batch,4] x) => (float[6,2] y) <int64[2] s = {6, 2}> { y = Reshape(x, s) }"
    onnx.save(model_proto(text), model)
    result = run("bench", model, "--streams", 2, "--data", folder, *QUICK)
    assert_one_line(result, 2, "ONNX Runtime failed on the model")
    assert running() == 0


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_under_load_exits_130(model: Path) -> None:
    main = threading.main_thread().ident
    assert main is not None
    kill = threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT))
    kill.start()
    result = run("bench", model, "--streams", 2, "--dim", "batch=3", "--seconds", 60)
    kill.join()
    assert result.exit_code == 130
    assert "interrupted: nothing was written" in result.stderr
    assert running() == 0


def test_from_python(model: Path) -> None:
    options = TimingOptions(1, rounds=1, seconds=0.02)
    found = qcompile.bench([model], dims={"batch": 3}, options=options, streams=2, arrival=1000)
    assert found.server is not None and found.timings[0].server is not None
    assert (found.server.streams, found.server.arrival) == (2, 1000)
    assert qcompile.bench([model], dims={"batch": 3}, options=options).server is None
    real = [{"x": np.ones((n, 4), np.float32)} for n in (3, 6)]
    assert qcompile.bench([model], data=real, options=options, streams=1).shapes == {"x": [6, 4]}
    with pytest.raises(DataError, match="streams 0: expected"):
        qcompile.bench([model], dims={"batch": 3}, streams=0)
    with pytest.raises(DataError, match="arrival -1: expected"):
        qcompile.bench([model], dims={"batch": 3}, arrival=-1)
