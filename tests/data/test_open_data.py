"""Python data, functions by name, files of no known form, and the sentences that ship."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompile.data.feeds import Feed, InputSpec, sample_count
from qcompile.data.open_data import SAMPLES, open_data, sample_feeds
from qcompile.errors import DataError

F32, I64 = np.dtype(np.float32), np.dtype(np.int64)
X = InputSpec("x", F32, ("batch", 3))
I32 = np.dtype(np.int32)
TEXT = tuple(
    InputSpec(name, I64, ("batch", "seq"))
    for name in ("input_ids", "attention_mask", "token_type_ids")
)


def rows(count: int, start: int = 0) -> np.ndarray[Any, Any]:
    """float32 [count, 3], every value another."""
    return np.arange(start * 3, (start + count) * 3, dtype=np.float32).reshape(count, 3)


def test_list_is_read_again_and_extras_are_dropped() -> None:
    feeds = open_data([{"x": rows(2), "label": [1, 2]}, {"x": rows(1)}], [X])
    assert feeds.reusable
    for _ in range(2):
        assert [f["x"].shape for f in feeds] == [(2, 3), (1, 3)]
        assert all(set(f) == {"x"} for f in feeds)


def test_generator_is_read_once() -> None:
    feeds = open_data(({"x": rows(1)} for _ in range(3)), [X])
    assert not feeds.reusable
    assert len(list(feeds)) == 3
    with pytest.raises(DataError, match="can be read once only"):
        next(iter(feeds))


def test_function_and_single_feed() -> None:
    feeds = open_data(lambda: iter([{"x": rows(1)}]), [X])
    assert len(list(feeds)) == len(list(feeds)) == 1
    assert len(list(open_data({"x": rows(4)}, [X]))) == 1
    assert len(list(open_data(lambda: {"x": rows(4)}, [X]))) == 1


def test_samples_end_a_source_without_reading_on() -> None:
    read: list[int] = []

    def endless() -> Iterator[Feed]:
        while True:
            read.append(1)
            yield {"x": rows(2)}

    assert len(list(open_data(endless, [X], samples=5))) == 3
    assert len(read) == 3


def test_lists_become_arrays_and_arrays_become_contiguous() -> None:
    spec = InputSpec("x", I64, ())
    (feed,) = open_data([{"x": 7}], [spec])
    assert feed["x"].shape == () and feed["x"].dtype == I64
    (feed,) = open_data([{"x": np.asfortranarray(rows(4))}], [X])
    assert feed["x"].flags.c_contiguous and np.array_equal(feed["x"], rows(4))


def test_source_that_raises_is_one_line_and_keeps_its_cause() -> None:
    def broken() -> Iterator[Feed]:
        yield {"x": rows(1)}
        raise OSError("disk gone\nsecond line")

    with pytest.raises(DataError, match=r"failed after 1 feeds: OSError: disk gone$") as caught:
        list(open_data(broken, [X]))
    assert isinstance(caught.value.__cause__, OSError)


# ---- package.module:function


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of user functions in the current folder."""
    source = (
        "import numpy as np\nnumber = 3\n"
        "def good():\n    yield {'x': np.ones((1, 3), np.float32)}\n"
        "def raises():\n    raise KeyError('gone')\n"
    )
    (tmp_path / "user_feeds_for_test.py").write_text(source)
    (tmp_path / "broken_feeds_for_test.py").write_text("import no_such_module_at_all")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    yield "user_feeds_for_test"
    sys.modules.pop("user_feeds_for_test", None)


def test_function_by_name(module: str) -> None:
    feeds = open_data(f"{module}:good", [X])
    assert len(list(feeds)) == len(list(feeds)) == 1
    open_data(f"{module}:good", [X])
    assert sys.path.count(str(Path.cwd())) == 1


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module_at_all:f", "module 'no_such_module_at_all' cannot be imported: Module"),
        ("broken_feeds_for_test:f", "cannot be imported: ModuleNotFoundError: No module named"),
        ("user_feeds_for_test:absent", "has no 'absent', expected a function"),
        ("user_feeds_for_test:number", "holds a int as 'number', expected a function"),
        ("user_feeds_for_test:raises", "function user_.*:raises failed after 0 feeds: KeyError"),
    ],
)
def test_functions_that_cannot_be_used(module: str, name: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        list(open_data(name, [X]))


# ---- the sentences that ship


def test_samples_fit_their_text() -> None:
    folder = SAMPLES.parent
    text = (folder / "calibration.txt").read_bytes()
    with np.load(SAMPLES) as stored:
        assert stored["text_sha256"].tobytes() == hashlib.sha256(text).digest()
        assert len(stored["lengths"]) == len(text.decode().splitlines()) == 256
        assert stored["lengths"].sum() == len(stored["ids"])
        assert stored["ids"].max() < 30522
    assert SAMPLES.stat().st_size < 60_000


def test_sample_feeds() -> None:
    feeds = list(sample_feeds(TEXT))
    assert len(feeds) == 32 and sum(map(sample_count, feeds)) == 256
    for feed in feeds:
        ids, mask = feed["input_ids"], feed["attention_mask"]
        assert (ids[:, 0] == 101).all() and ((ids == 102).sum(1) == 1).all()
        assert np.array_equal(ids != 0, mask != 0) and mask.any(0).all()
    padded = sum(f["input_ids"].size for f in feeds) / sum(f["attention_mask"].sum() for f in feeds)
    assert padded < 1.1


def test_sample_feeds_of_a_fixed_shape_keep_the_last_token() -> None:
    fixed = [InputSpec("input_ids", I32, (1, 16))]
    feeds = list(sample_feeds(fixed))
    assert len(feeds) == 256 and all(f["input_ids"].shape == (1, 16) for f in feeds)
    assert all((f["input_ids"] == 102).sum() == 1 for f in feeds)
    with pytest.raises(DataError, match="batch size 8 was asked for, expected 1"):
        sample_feeds(fixed, batch_size=8)
