"""A local cluster for all tests of a module: it would disturb those that measure memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qcompile.compiler.cluster.connect import connected
from tests.encoder_files import save_encoder


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """A client of two processes, as ``--workers 2`` starts them."""
    pytest.importorskip("distributed", reason="workers need Dask, extra cluster")
    with connected(2, None) as made:
        yield made


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("model") / "m.onnx")
