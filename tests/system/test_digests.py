"""Digests change with anything that they stand for, and with nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qcompile.data.feed_digest import FeedDigest
from qcompile.data.feeds import Feed
from qcompile.errors import DataError, ModelError
from qcompile.system.digests import file_digest, model_digest


def digest(*feeds: Feed) -> str:
    made = FeedDigest()
    assert list(made.passing(feeds)) == list(feeds)
    return made.hexdigest()


def test_feeds_count_with_names_types_shapes_values_and_order() -> None:
    one, two = {"x": np.arange(4)}, {"x": np.arange(4) + 1}
    base = digest(one, two)
    assert base == digest({"x": np.arange(4)}, {"x": np.arange(8)[::2] // 2 + 1})
    others = [
        (one,), (two, one), (one, {"y": two["x"]}), (one, {"x": two["x"].astype(np.int32)}),
        (one, {"x": two["x"].reshape(2, 2)}), (one, {"x": two["x"] + 1}),
    ]  # fmt: skip
    assert len({base, *(digest(*o) for o in others)}) == len(others) + 1


def test_a_model_is_its_bytes_or_its_file_and_what_lies_outside(tmp_path: Path) -> None:
    path, beside = tmp_path / "m.onnx", tmp_path / "w.bin"
    path.write_bytes(b"model" * 1_000_000)  # more than one piece
    beside.write_bytes(b"weights")
    assert model_digest(path) == model_digest(path.read_bytes()) == file_digest(path)
    whole = model_digest(path, [beside])
    assert whole != model_digest(path)
    beside.write_bytes(b"Weights")
    assert model_digest(path, [beside]) != whole


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.*cannot be read: No such file"):
        file_digest(tmp_path / "none")
    with pytest.raises(ModelError, match=r"model .*none.*cannot be read"):
        model_digest(tmp_path / "none")
