"""Length, padding and positions of text come from the tokenizer's own files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from qcompile.data.feeds import Feed, InputSpec
from qcompile.data.open_data import general_text, open_data
from qcompile.data.text import Takes
from qcompile.data.tokenizer import TextTokenizer
from qcompile.errors import DataError, ModelError
from qcompile.quant import Array

I64 = np.dtype(np.int64)
INPUTS = tuple(
    InputSpec(name, I64, ("batch", "seq"))
    for name in ("input_ids", "attention_mask", "token_type_ids", "position_ids")
)
WORDS = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "<pad>", "a", "b")
LONG = " ".join("ab" * 10)  # 20 tokens and two special ones


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A word-level tokenizer without truncation or padding, and a long text next to it."""
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "t.txt").write_text(f"{LONG}\nb\n")
    return tmp_path


def put(folder: Path, name: str, **content: object) -> None:
    (folder / name).write_text(json.dumps(content))


def put_into_tokenizer(folder: Path, *, length: int | None = None, **padding: object) -> None:
    file = str(folder / "tokenizer.json")
    made = Tokenizer.from_file(file)
    if length is not None:
        made.enable_truncation(length, direction="left")
    if padding:
        made.enable_padding(**padding)
    made.save(file)


def read(
    folder: Path,
    inputs: tuple[InputSpec, ...] = INPUTS,
    max_length: int | None = None,
    takes: Takes | None = None,
) -> Feed:
    """The two sentences as one feed."""
    path = folder / "t.txt"
    (feed,) = open_data(path, inputs, tokenizer=folder, max_length=max_length, takes=takes)
    return feed


def width(folder: Path, max_length: int | None = None, takes: Takes | None = None) -> int:
    return int(read(folder, INPUTS, max_length, takes)["input_ids"].shape[1])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"model_max_length": 9}),
        ("tokenizer_config.json", {"model_max_length": 9.0}),
        ("sentence_bert_config.json", {"max_seq_length": 9}),
    ],
)
def test_files_bound_the_length(folder: Path, name: str, content: dict[str, object]) -> None:
    put(folder, name, **content)
    assert width(folder) == 9
    assert width(folder, max_length=12) == 12  # as asked for
    put_into_tokenizer(folder, length=7)
    assert width(folder) == 7  # the smallest


@pytest.mark.parametrize("unlimited", [10**30, 1e30, None, "no", True, 0, -1])
def test_no_limit(folder: Path, unlimited: object) -> None:
    put(folder, "tokenizer_config.json", model_max_length=unlimited)
    assert TextTokenizer(folder).longest is None
    (folder / "t.txt").write_text(" ".join("a" * 200))
    assert width(folder) == 128  # the default


def test_a_fixed_length_is_filled(folder: Path) -> None:
    fixed = tuple(InputSpec(s.name, I64, ("batch", 16)) for s in INPUTS)
    assert read(folder, fixed)["attention_mask"].sum(1).tolist() == [3, 16]
    put(folder, "tokenizer_config.json", model_max_length=9)
    assert read(folder, fixed)["attention_mask"].sum(1).tolist() == [3, 9]
    assert read(folder, fixed, max_length=12)["attention_mask"].sum(1).tolist() == [3, 12]
    with pytest.raises(DataError, match="length 20 was asked for, but the model's is fixed at 16"):
        read(folder, fixed, max_length=20)


def test_truncation_on_the_side_of_the_files(folder: Path) -> None:
    a, b = WORDS.index("a"), WORDS.index("b")
    assert read(folder, max_length=5)["input_ids"][1].tolist() == [1, a, b, a, 2]
    put_into_tokenizer(folder, length=5)
    assert read(folder)["input_ids"][1].tolist() == [1, b, a, b, 2]
    put(folder, "tokenizer_config.json", truncation_side="right")
    assert read(folder)["input_ids"][1].tolist() == [1, a, b, a, 2]


def padded(folder: Path) -> tuple[list[int], list[int]]:
    """Tokens and segments of the short sentence in a row of five."""
    feed = read(folder, max_length=5)
    return feed["input_ids"][0].tolist(), feed["token_type_ids"][0].tolist()


def test_padding_of_each_file_in_transformers_order(folder: Path) -> None:
    b = WORDS.index("b")
    assert padded(folder) == ([1, b, 2, 3, 3], [0] * 5)  # [PAD] is a common one
    put_into_tokenizer(folder, pad_id=0, pad_type_id=4, pad_token="[UNK]", direction="left")
    assert padded(folder) == ([0, 0, 1, b, 2], [4, 4, 0, 0, 0])
    put(folder, "special_tokens_map.json", pad_token={"content": "<pad>"})
    assert padded(folder)[0] == [4, 4, 1, b, 2]
    put(folder, "tokenizer_config.json", pad_token="b", padding_side="right", pad_token_type_id=2)
    assert padded(folder) == ([1, b, 2, b, b], [0, 0, 0, 2, 2])
    put(folder, "tokenizer_config.json", pad_token="not in the vocabulary")
    assert padded(folder)[0] == [4, 4, 1, b, 2]


def positions(folder: Path) -> list[list[int]]:
    found: list[list[int]] = read(folder, max_length=5)["position_ids"].tolist()
    return found


def test_positions_are_counted_without_padding(folder: Path) -> None:
    assert positions(folder) == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 4]]
    put(folder, "tokenizer_config.json", padding_side="left")
    assert positions(folder) == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]


def test_positions_of_roberta_begin_after_that_of_padding(folder: Path) -> None:
    """As transformers' create_position_ids_from_input_ids: cumsum(mask) * mask + padding_idx."""
    put(folder, "config.json", model_type="xlm-roberta", pad_token_id=1)
    assert positions(folder) == [[2, 3, 4, 1, 1], [2, 3, 4, 5, 6]]
    put(folder, "config.json", model_type="bert", pad_token_id=1)
    assert positions(folder) == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 4]]


class Table:
    """A model with so many positions; counts its runs."""

    def __init__(self, rows: int, least: int = 1) -> None:
        self.rows, self.least, self.runs = rows, least, 0

    def __call__(self, feed: dict[str, Array]) -> ModelError | None:
        self.runs += 1
        length = feed["input_ids"].shape[1]
        return None if self.least <= length <= self.rows else ModelError("Add: 16 by 128")


def test_text_is_cut_where_the_model_takes_no_more(folder: Path) -> None:
    table = Table(16)
    feeds = open_data(folder / "t.txt", INPUTS, tokenizer=folder, takes=table)
    assert [f["input_ids"].shape for f in feeds] == [(2, 16)]
    assert [f["input_ids"][1, -1] for f in feeds] == [2]  # the closing token is kept
    assert feeds.note == "text is cut after 16 tokens: the model takes no more"
    assert table.runs < 8
    taken = Table(128)
    assert open_data(folder / "t.txt", INPUTS, tokenizer=folder, takes=taken).note is None
    assert taken.runs == 1
    given = open_data(folder / "t.txt", INPUTS, tokenizer=folder, takes=table)
    text = general_text(given, folder, takes=table)
    assert text is not None and max(f["input_ids"].shape[1] for f in text) == 16


def test_a_length_that_the_model_does_not_take_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="length 20: the model takes 16 tokens at most"):
        read(folder, max_length=20, takes=Table(16))
    fixed = tuple(InputSpec(s.name, I64, (2, 20)) for s in INPUTS)
    with pytest.raises(DataError, match="fixed at 20 tokens, but the model takes 16 at most"):
        read(folder, fixed, takes=Table(16))
    assert width(folder, max_length=16, takes=Table(16)) == 16


def test_a_model_that_lacks_a_token_says_so_itself(folder: Path) -> None:
    """It would take a beginning of the text, whose first tokens it knows."""

    def takes(feed: Feed) -> ModelError | None:
        ids = feed["input_ids"]
        return None if (ids == ids[0, 0]).all() else ModelError("indices element out of bounds")

    assert width(folder, takes=takes) == 22


def test_a_model_that_takes_no_length_says_why_itself(folder: Path) -> None:
    assert width(folder, takes=Table(0)) == 22
