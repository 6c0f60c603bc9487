"""Execution providers that may run the float model to calibrate and to rank tensors."""

from __future__ import annotations

from typing import Literal

from qcompile.errors import TargetError
from qcompile.runtime import session

Choice = Literal["cpu", "cuda"]
# By the names that --provider takes.
PROVIDERS: dict[str, str] = {"cpu": session.CPU, "cuda": session.CUDA}
_PACKAGES = {"cuda": "onnxruntime-gpu"}


def check_provider(choice: str) -> None:
    """Raises TargetError unless ONNX Runtime really runs a model on this provider here."""
    if choice not in PROVIDERS:
        known = " or ".join(PROVIDERS)
        raise TargetError(f"unknown provider {choice!r}, expected {known}")
    wanted = PROVIDERS[choice]
    if session.provider_or_cpu(wanted) != wanted:
        found = ", ".join(session.listed_providers())
        raise TargetError(
            f"provider {choice!r}: onnxruntime {session.version()} cannot run a model on {wanted} "
            f"here (it has {found}), expected the package {_PACKAGES[choice]} and its device"
        )
