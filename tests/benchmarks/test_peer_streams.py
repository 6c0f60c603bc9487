"""Peers under load: how each runs in several streams, and what the options mean."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from typing import Any

import pytest

from benchmarks._peer_runtimes import OpenVino, served
from benchmarks.speed import load_of, seconds_of
from qcompile.errors import DataError


def arguments(**given: object) -> argparse.Namespace:
    usual = {"streams": None, "arrival": None, "seconds": None, "seed": 0}
    return argparse.Namespace(**{**usual, **given})


def test_openvino_has_a_request_for_each_stream() -> None:
    model = OpenVino(Path("m.onnx"))
    again: Any = pickle.loads(pickle.dumps(served(model)))  # as it reaches a new process
    assert again.__self__ == model
    assert served(Path("m.onnx")) == Path("m.onnx")
    with pytest.raises(ValueError, match="several streams"):
        served(lambda threads: lambda feed: None)


def test_load_and_its_seconds() -> None:
    assert load_of(arguments()) is None and seconds_of(arguments()) == 1
    load = load_of(arguments(arrival=9.0))
    assert load is not None and (load.streams, load.arrival) == (1, 9)
    assert seconds_of(arguments(streams=2)) == 2 and seconds_of(arguments(seconds=3.0)) == 3
    for bad in ({"streams": 0}, {"arrival": 0.0}, {"arrival": 1.0}):
        with pytest.raises(DataError):
            load_of(arguments(**bad))
