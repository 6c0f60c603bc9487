"""From options to workers. Dask is imported only if there is a client or one is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from qcompile.compiler.cluster.workers import LOCAL, Workers
from qcompile.errors import ClusterError, RecipeError

_KNOWN: dict[Any, Workers] = {}  # by client


def workers_of(client: Any | None) -> Workers:
    """The workers of a Dask client, always the same object; this process where there is none.

    Raises ClusterError if they cannot be used, RecipeError for another object.
    """
    if client is None:
        return LOCAL
    _check_installed()
    from distributed import Client

    from qcompile.compiler.cluster.dask_workers import DaskWorkers

    if not isinstance(client, Client):
        found = type(client).__name__
        raise RecipeError(f"client is a {found}, expected a dask.distributed.Client")
    if client.asynchronous:
        raise RecipeError("the client is asynchronous, expected Client(asynchronous=False)")
    for closed in [known for known in _KNOWN if known.status == "closed"]:
        del _KNOWN[closed]
    if client not in _KNOWN:
        _KNOWN[client] = DaskWorkers(client)
    return _KNOWN[client]


@contextmanager
def connected(workers: int | None, address: str | None) -> Iterator[Any | None]:
    """A client: of ``workers`` new local processes, of the cluster at ``address``, or none.

    Raises RecipeError where both are given, ClusterError where Dask or the cluster is missing.
    """
    if workers is None and address is None:
        yield None
        return
    if workers is not None and address is not None:
        raise RecipeError("--workers starts a local cluster and --cluster joins another: give one")
    _check_installed()
    from qcompile.compiler.cluster import dask_workers

    made = (
        dask_workers.local_client(workers)
        if workers is not None
        else dask_workers.joined_client(address or "")
    )
    with made as client:
        yield client


def _check_installed() -> None:
    if find_spec("distributed") is None:
        raise ClusterError(
            "Dask is missing: pip install 'qcompile-onnx[cluster]', or leave out --workers and "
            "--cluster"
        )
