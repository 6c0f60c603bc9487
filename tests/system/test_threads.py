"""Passes multiply on one thread, whatever the process had before and after."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

import qcompile
from qcompile import Options
from qcompile.ir import Graph
from qcompile.ir.model_io.to_proto import to_proto
from qcompile.planning import Context
from qcompile.rewriting import Numerics, Pass, Stage, registry
from qcompile.rewriting.testing import encoder
from qcompile.system import threads as blas
from qcompile.system.threads import in_threads


def threads() -> set[int]:
    np.eye(4) @ np.eye(4)  # loads the library
    return {p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas"}


def test_one_thread_inside_and_as_before_outside() -> None:
    with threadpool_limits(2, "blas"):
        before = threads()
        with blas.one_thread():
            assert threads() <= {1}
        assert threads() == before


def test_passes_run_so(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set[int]()

    @dataclass(frozen=True)
    class Spy(Pass):
        name: ClassVar[str] = "spy"
        stage: ClassVar[Stage] = Stage.SIMPLIFY
        numerics: ClassVar[Numerics] = Numerics.EXACT

        def run(self, graph: Graph, ctx: Context) -> bool:
            seen.update(threads())
            return False

    known = {**registry.passes(), "spy": Spy}
    monkeypatch.setattr("qcompile.rewriting.pipeline_spec.passes", lambda: known)
    options = Options(verify=False, bench=False, threads=1)
    with threadpool_limits(2, "blas"):
        qcompile.compile(to_proto(encoder(1)), mode="float", pipeline="spy", options=options)
    assert seen == {1}


def test_results_come_in_order() -> None:
    gate = threading.Event()

    def work(i: int) -> int:
        if i == 1:
            gate.set()
        return i * i

    assert in_threads(work, range(5)) == [0, 1, 4, 9, 16]
    assert gate.is_set() and in_threads(work, []) == []


def test_errors_are_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda i: 1 // i, [1, 0])
