"""Workers that die, differ, or are interrupted."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from qcompile.compiler.cluster import worker_side
from qcompile.compiler.cluster.connect import connected, workers_of
from qcompile.compiler.cluster.workers import Kit, Site, Task
from qcompile.errors import ClusterError, DataError, RecipeError
from tests.compiler.cluster.test_calibration import bits, feeds
from tests.encoder_files import save_encoder

pytest.importorskip("distributed", reason="workers need Dask, extra cluster")
pytestmark = pytest.mark.usefixtures("interrupts")


class Doing(Task[Any, Any]):
    """Does each item by a function."""

    def __init__(self, function: Callable[[Any], Any], **files: Path) -> None:
        self.function, self.files = function, files

    def here(self, item: Any) -> Any:
        return self.function(item)

    def kit(self) -> Kit:
        function = self.function
        return Kit(self.files, lambda site: function)

    def label(self, item: Any) -> str:
        return f"item {item}"


def test_a_killed_worker_changes_nothing(client: Any, encoder: Path) -> None:
    import qcompile
    from qcompile.compiler.stages.options import CompileOptions

    killed = []

    def kill_once(stage: str, done: int, total: int | None) -> None:
        if stage == "calibrate" and done == 1:
            killed.append(next(iter(client.run(os.getpid).values())))
            os.kill(killed[0], signal.SIGKILL)

    found = []
    for c, watch in ((None, None), (client, kill_once)):
        options = CompileOptions(
            client=c, verify=False, bench=False, threads=1, keep_calibration=True
        )
        found.append(qcompile.compile(encoder, feeds(120), options=options, progress=watch))
    assert len(killed) == 1 and bits(found[0]) == bits(found[1])


def test_an_item_that_ends_its_worker_three_times_is_named(client: Any) -> None:
    def die(item: int) -> int:
        if item == 2:
            os._exit(1)
        return item

    results = workers_of(client).map(Doing(die), range(4))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ClusterError, match=r"item 2 was ended with its worker 3 times"):
        next(results)
    client.wait_for_workers(2, timeout=60)


@pytest.mark.parametrize("failures", [3, 4])
def test_a_worker_that_ends_as_it_starts(failures: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dask gives up then, so the cluster is started again, four times in all."""
    from qcompile.compiler.cluster import dask_workers

    starts = []

    def starting(**settings: Any) -> str:
        starts.append(settings["n_workers"])
        if len(starts) <= failures:
            raise RuntimeError("Cluster failed to start") from OSError("Nanny failed")
        return "a cluster"

    monkeypatch.setattr(dask_workers, "LocalCluster", starting)
    monkeypatch.setattr("time.sleep", lambda _: None)
    if failures == 4:
        with pytest.raises(ClusterError, match="workers cannot be started: Nanny failed"):
            dask_workers._local_cluster(2, "")
    else:
        assert dask_workers._local_cluster(2, "") == "a cluster"
    assert starts == [2, 2, 2, 2]


def test_results_come_in_the_order_of_the_items(client: Any) -> None:
    def slow_if_even(item: int) -> int:
        time.sleep(0.05 * (item % 2 == 0))
        return item * item

    assert list(workers_of(client).map(Doing(slow_if_even), range(9))) == [i * i for i in range(9)]


def test_errors_of_the_work_are_those_of_one_process(client: Any) -> None:
    def refuse(item: int) -> int:
        raise DataError(f"feed {item} does not fit")

    with pytest.raises(DataError, match="feed 0 does not fit"):
        list(workers_of(client).map(Doing(refuse), range(3)))


def test_a_file_that_workers_cannot_open_is_sent(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reading(Doing):
        def kit(self) -> Kit:
            def opens(site: Site) -> Callable[[Any], Any]:
                place = site.files["folder/weights"]
                return lambda item: (str(place), place.read_bytes())

            return Kit({"folder/weights": tmp_path / "w"}, opens)

    (tmp_path / "w").write_bytes(b"12345")
    workers, task = workers_of(client), Reading(str)
    assert list(workers.map(task, [0])) == [(str(tmp_path / "w"), b"12345")]
    monkeypatch.setattr(worker_side, "files_here", _never)
    before = workers.account()
    ((place, content),) = workers.map(task, [0])
    assert content == b"12345" and not place.startswith(str(tmp_path))
    done = workers.account(before)
    assert done is not None and done.model_bytes > 2 * 5


def _never(_files: Any) -> bool:
    return False


@contextmanager
def pretending(client: Any, name: str, value: Any) -> Iterator[str]:
    """One worker has another value in ``worker_side``; its address."""

    def set_to(new: Any) -> Any:
        module = importlib.import_module("qcompile.compiler.cluster.worker_side")
        old = getattr(module, name)
        setattr(module, name, new)
        return old

    address = sorted(client.nthreads())[0]
    (old,) = client.run(set_to, value, workers=[address]).values()
    yield address
    client.run(set_to, old, workers=[address])


def test_a_worker_of_another_version_is_refused(client: Any) -> None:
    from qcompile.compiler.cluster.dask_workers import DaskWorkers

    with pretending(client, "__version__", "9.9") as address:
        with pytest.raises(ClusterError, match=r"1 of 2 workers differ") as caught:
            DaskWorkers(client)
        assert address in str(caught.value) and "qcompile 9.9, and the client has" in str(
            caught.value
        )
    DaskWorkers(client)


def test_a_worker_that_came_later_is_refused_too(client: Any) -> None:
    """Its version is compared again as it opens the model."""
    workers = workers_of(client)
    task = Doing(lambda item: time.sleep(0.2))
    unlike = pytest.raises(ClusterError, match=r"a worker has qcompile 9\.9")
    with pretending(client, "__version__", "9.9"), unlike:
        list(workers.map(task, range(4)))


def test_another_instruction_set_is_a_difference() -> None:
    mine = worker_side.environment()
    other = {**mine, "instruction sets": "x86_64 AVX2"}
    assert worker_side.difference(mine, mine) == ""
    assert "instruction sets x86_64 AVX2" in worker_side.difference(mine, other)


def test_what_is_no_client_and_what_cannot_be_reached() -> None:
    with pytest.raises(RecipeError, match="client is a int, expected"):
        workers_of(3)
    with pytest.raises(RecipeError, match="give one"), connected(2, "tcp://localhost:1"):
        pass
    with pytest.raises(ClusterError, match="no address"), connected(None, "nonsense://x"):
        pass


def test_closing_early_leaves_nothing_waiting(client: Any) -> None:
    results = workers_of(client).map(Doing(lambda item: item), range(1000))
    assert next(results) == 0
    results.close()
    deadline = time.monotonic() + 30
    while any(client.processing().values()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(client.processing().values())


DATA = """
import time
from pathlib import Path
from tests.encoder_files import token_feeds

def read():
    for number in range(1000):
        yield from token_feeds(1)
        Path({marker!r}).touch()
        time.sleep(0.05)
"""


def test_an_interrupt_ends_all_processes(tmp_path: Path) -> None:
    """As a terminal sends it: to the client and to its workers."""
    marker = tmp_path / "begun"
    (tmp_path / "slow_data.py").write_text(DATA.format(marker=str(marker)))
    model = save_encoder(tmp_path / "m.onnx")
    path = os.pathsep.join([str(tmp_path), str(Path.cwd()), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-m", "qcompile.commands.cli", "compile", str(model), "-o",
         str(tmp_path / "out.onnx"), "--data", "slow_data:read", "--workers", "1", "--no-cache"],
        env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(tmp_path)},
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )  # fmt: skip
    while not marker.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1].startswith("interrupted:"), errors
    assert "Traceback" not in errors, errors
    _, alive = psutil.wait_procs(family, timeout=30)
    assert family and alive == []
