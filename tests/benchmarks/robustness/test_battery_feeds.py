"""_battery_feeds.py makes feeds of several sizes, with lengths that differ from each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.robustness._battery_feeds import BatteryFeeds, random_feeds
from qcompile.ir.model_io.to_proto import serialize
from qcompile.rewriting.testing import normal, parse

TEXT = "int64[batch,seq] ids, int64[batch,past] old, int64[batch,past_and_seq] mask"


def made(tmp_path: Path, inputs: str, body: str, rows: int = 40) -> BatteryFeeds:
    graph = parse(f"g ({inputs}) => (float[N] y) {{ {body} }}", w=normal(rows, 4))
    path = tmp_path / "model.onnx"
    path.write_bytes(serialize(graph))
    return random_feeds(path)


def test_images_have_three_channels_and_square_sides(tmp_path: Path) -> None:
    feeds = made(tmp_path, "float[batch,num_channels,height,width] x", "y = ReduceMean(x)")
    assert [f["x"].shape for f in feeds.calibration] == [(2, 3, 64, 64)] * 12
    assert [of_one_size[0]["x"].shape for of_one_size in feeds.fresh] == [
        (2, 3, 64, 64),
        (3, 3, 96, 96),
        (1, 3, 224, 224),
        (1, 3, 128, 128),
    ]


def test_each_length_has_its_own_size(tmp_path: Path) -> None:
    feeds = made(tmp_path, "int64[batch,seq] ids, int64[batch,past] old", "y = Gather(w, ids)")
    shapes = [(f[0]["ids"].shape, f[0]["old"].shape) for f in feeds.fresh]
    assert shapes[:2] == [((2, 12), (2, 13)), ((3, 29), (3, 30))]


def test_fresh_inputs_are_not_those_of_the_data(tmp_path: Path) -> None:
    feeds = made(tmp_path, "float[B,4] x", "y = ReduceSum(x)")
    seen = {f["x"].tobytes() for f in feeds.calibration}
    assert not seen & {f["x"].tobytes() for of_one_size in feeds.fresh for f in of_one_size}


def test_sizes_that_the_model_does_not_take_are_left_out(tmp_path: Path) -> None:
    body = "s = Constant<value_ints=[8]>() z = Reshape(x, s) y = Add(z, z)"
    feeds = made(tmp_path, "float[N] x", body)
    assert [f[0]["x"].shape for f in feeds.fresh] == [(8,)]


@pytest.mark.parametrize("content", [b"no model", b""])
def test_no_feeds_for_what_is_no_model(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert random_feeds(path) == BatteryFeeds()
