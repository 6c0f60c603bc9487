"""Streams as data of a model: text that is tokenized, or columns that are the model's inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from qcompile.data.feed_digest import digest_feeds
from qcompile.data.feeds import Feeds, InputSpec
from qcompile.data.open_data import check_text, open_data
from qcompile.errors import DataError

pa: Any = pytest.importorskip("pyarrow")
files: Any = pytest.importorskip("tests.stream_files")
I64, F32 = np.dtype(np.int64), np.dtype(np.float32)
TEXT = tuple(InputSpec(name, I64, ("b", "s")) for name in ("input_ids", "attention_mask"))
X = (InputSpec("x", F32, ("b", 2)), InputSpec("y", I64, ("b",)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer whose id of the text t7 is 7 + 3."""
    words = ["[UNK]", "[CLS]", "[SEP]", *(f"t{i}" for i in range(300))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def numbers(feeds: Feeds) -> list[int]:
    """The texts, by their numbers."""
    return sorted(int(ids[1]) - 3 for feed in feeds for ids in feed["input_ids"])


def test_a_stream_of_text_becomes_tokens(folder: Path) -> None:
    path = files.write(folder / "x.parquet", files.texts(300))
    feeds = open_data(path, TEXT, tokenizer=folder, samples=20)
    assert feeds.is_text and feeds.drawn == "20 of 300 rows were drawn, with seed 0"
    found = numbers(feeds)
    assert len(set(found)) == 20 and max(found) > 100
    assert numbers(open_data(str(path), TEXT, tokenizer=folder, samples=20)) == found
    other = open_data(path, TEXT, tokenizer=folder, samples=20, seed=5)
    assert numbers(other) != found
    assert len(numbers(open_data(path, TEXT, tokenizer=folder))) == 256


def test_a_single_file_still_has_its_first_rows(folder: Path) -> None:
    """The same feeds, up to their digests, as those of a list; a pattern draws."""
    path = files.write(folder / "x.jsonl", files.texts(300))
    feeds = open_data(path, TEXT, tokenizer=folder, samples=20, seed=5)
    assert numbers(feeds) == list(range(20)) and feeds.drawn is None
    listed = open_data([f"t{i}" for i in range(300)], TEXT, tokenizer=folder, samples=20)
    assert digest_feeds(feeds) == digest_feeds(listed)
    drawn = open_data(path, TEXT, tokenizer=folder, samples=20, seed=5, draw=True)
    assert numbers(drawn) != numbers(feeds)
    pattern = open_data(folder / "*.jsonl", TEXT, tokenizer=folder, samples=20, seed=5)
    assert numbers(pattern) not in (numbers(feeds), numbers(drawn))


def test_tables_of_pyarrow_are_tables(folder: Path) -> None:
    table = pa.Table.from_pylist(files.texts(300))
    feeds = open_data(table, TEXT, tokenizer=folder, samples=20)
    assert numbers(feeds) == list(range(20))
    (feed,) = open_data(pa.table({"x": [[1.0, 2.0]], "y": [3]}), X)
    assert feed["x"].tolist() == [[1, 2]] and feed["y"].tolist() == [3]
    with pytest.raises(DataError, match="data has no column 'q', expected one of text, label"):
        open_data(table, TEXT, tokenizer=folder, text_columns=("q",))


class Streamed:
    """As a streamed Dataset of datasets whose columns are not known before it is read."""

    column_names = None

    def __iter__(self) -> Any:
        return iter(files.texts(5))


def test_streamed_datasets_find_their_columns(folder: Path) -> None:
    assert numbers(open_data(Streamed(), TEXT, tokenizer=folder)) == list(range(5))


def rows(count: int) -> list[dict[str, Any]]:
    return [{"x": [i / 2, 1.0], "y": i, "z": "not read"} for i in range(count)]


def test_columns_named_as_the_inputs_are_fed(tmp_path: Path) -> None:
    files.write(tmp_path / "p-1.parquet", rows(20))
    files.write(tmp_path / "p-2.arrow", rows(3))
    feeds = open_data(f"{tmp_path}/p-*", X, batch_size=8)
    for _ in range(2):  # read again by each loop
        found = [feed["y"].tolist() for feed in feeds]
        assert found == [[*range(8)], [*range(8, 16)], [16, 17, 18, 19, 0, 1, 2]]
    feeds = open_data(f"{tmp_path}/p-*", X, samples=5, seed=3)
    assert feeds.drawn == "5 of 23 rows were drawn, with seed 3"
    (feed,) = feeds
    assert feed["x"].shape == (5, 2) and feed["x"].dtype == F32
    assert feed["y"].tolist() not in ([*range(5)], [])


def test_columns_that_do_not_fit(tmp_path: Path) -> None:
    files.write(tmp_path / "p-1.parquet", rows(3))
    files.write(tmp_path / "p-2.parquet", [{"x": [1.0, 2.0], "label": 1}])
    files.write(tmp_path / "p-3.parquet", [{"x": "text", "y": 1}])
    pattern = f"{tmp_path}/p-[12].parquet"
    with pytest.raises(DataError, match=r"p-2.parquet: no column for input 'y'; found x, label"):
        list(open_data(pattern, X))
    with pytest.raises(DataError, match=r"p-2.parquet: no column for input 'y'"):
        open_data(pattern, X, samples=2)
    with pytest.raises(DataError, match=r"p-2.parquet has the columns x, label, expected a column"):
        open_data(tmp_path / "p-2.parquet", X)
    with pytest.raises(DataError, match=r"p-3.parquet, row 0, column 'x': found"):
        list(open_data(tmp_path / "p-3.parquet", X))


def test_text_needs_a_tokenizer_and_a_model_for_text(folder: Path) -> None:
    path = files.write(folder / "x.parquet", files.texts(3))
    with pytest.raises(DataError, match=r"x\.parquet is text and needs a tokenizer"):
        open_data(path, TEXT)
    with pytest.raises(DataError, match=r"has no column 'q', expected one of text, label"):
        open_data(path, TEXT, tokenizer=folder, text_columns=("q",))
    packed = files.write(folder / "x.txt.gz", files.texts(3))
    with pytest.raises(DataError, match="input 'x' cannot be made from text"):
        open_data(packed, X, tokenizer=folder)
    with pytest.raises(DataError, match=r"x\.txt\.gz, line 1: no field 'q'; found text"):
        open_data(packed, TEXT, tokenizer=folder, text_columns=("q",))


def test_streams_are_checked_before_an_export(folder: Path) -> None:
    check_text(files.write(folder / "x.parquet", rows(3)), tokenizer=folder)  # may be inputs
    bad = files.write(folder / "b.jsonl.gz", [{"text": 1}])
    with pytest.raises(DataError, match="line 1: field 'text' is int"):
        check_text(bad, tokenizer=folder)
    with pytest.raises(DataError, match="no file matches"):
        check_text(folder / "*.zst", tokenizer=folder)
    good = files.write(folder / "g.parquet", files.texts(3))
    with pytest.raises(DataError, match="length 2 leaves no room"):
        check_text(good, tokenizer=folder, max_length=2)


def test_addresses_are_read_as_streams(folder: Path) -> None:
    memory = pytest.importorskip("fsspec").filesystem("memory")
    for name in ("a.jsonl", "b.txt.zst", "c.parquet"):
        memory.pipe(f"/in/{name}", files.write(folder / name, files.texts(30)).read_bytes())
    try:
        for name in ("a.jsonl", "b.txt.zst", "c.parquet"):
            feeds = open_data(f"memory://in/{name}", TEXT, tokenizer=folder, samples=10)
            assert len(numbers(feeds)) == 10 and feeds.drawn is not None
        everything = open_data("memory://in/*", TEXT, tokenizer=folder)
        assert numbers(everything) == sorted([*range(30)] * 3)
    finally:
        memory.store.clear()
