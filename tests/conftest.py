"""What all tests share: a cache of their own, and a small model with its data, as files."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.encoder_files import save_encoder, save_tokens
from tests.newer_runtime import pytest_fixture_setup, pytest_pyfunc_call

__all__ = ["pytest_fixture_setup", "pytest_pyfunc_call"]  # pytest finds hooks in this file


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds what another has left, nor writes into the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def interrupts() -> Iterator[None]:
    """SIGINT interrupts, also in a background process, for which shells ignore it."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An encoder whose FFN inputs x0 and x1 have one wide channel; modules may have another."""
    return save_encoder(tmp_path / "m.onnx")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Tokens for that encoder."""
    return save_tokens(tmp_path / "x.npz")
