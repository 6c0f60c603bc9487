"""Text is tokenized, sorted and padded as the model wants it; what cannot be is one clear error."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qcompile.data.feeds import InputSpec, sample_count
from qcompile.data.open_data import general_text, open_data, sample_feeds
from qcompile.data.text import read_sentences
from qcompile.errors import DataError
from tests.command_line import run_module

F32, I32, I64 = np.dtype(np.float32), np.dtype(np.int32), np.dtype(np.int64)
TEXT = tuple(
    InputSpec(name, I64, ("batch", "seq"))
    for name in ("input_ids", "attention_mask", "token_type_ids")
)
WORDS = ("[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "on", "mat", "dog", "[PAD]", "ran", "far")
PAD = WORDS.index("[PAD]")  # not 0, so that padding shows


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A folder with a word-level tokenizer that itself truncates and pads, as MiniLM's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    cls, sep = ("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])
    made.post_processor = processors.BertProcessing(sep, cls)
    made.enable_truncation(20)
    made.enable_padding(pad_id=PAD, pad_type_id=3, pad_token="[PAD]", length=20)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    return folder


SENTENCES = ["the cat sat on the mat", "the dog ran", "cat", "the dog ran far far", "dog sat"]


def write_text(folder: Path, name: str, lines: list[str]) -> Path:
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_text_is_padded_with_the_pad_id_in_batches_of_like_length(
    tmp_path: Path, tokenizer: Path
) -> None:
    path = write_text(tmp_path, "t.txt", ["", *SENTENCES, "  "])
    feeds = open_data(path, TEXT, tokenizer=tokenizer, batch_size=2)
    found = sorted(feeds, key=lambda f: f["input_ids"].shape[1])
    assert [f["input_ids"].shape for f in found] == [(2, 4), (2, 7), (1, 8)]
    short = found[0]
    assert short["input_ids"][0].tolist() == [1, 4, 2, PAD]  # [CLS] cat [SEP] [PAD]
    assert short["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert short["token_type_ids"].tolist() == [[0, 0, 0, 3], [0] * 4]
    assert all(a.dtype == I64 for a in short.values())
    assert feeds.reusable and len(list(feeds)) == 3


def test_text_forms_say_the_same(tmp_path: Path, tokenizer: Path) -> None:
    txt = write_text(tmp_path, "t.txt", SENTENCES)
    rows_of = [json.dumps({"text": s, "label": 1}) for s in SENTENCES]
    jsonl = write_text(tmp_path, "t.jsonl", ["\ufeff" + rows_of[0], "", *rows_of[1:]])
    csv = write_text(tmp_path, "t.csv", ["label,text", *(f'1,"{s}"' for s in SENTENCES)])
    read = [next(iter(open_data(p, TEXT, tokenizer=tokenizer))) for p in (txt, jsonl, csv)]
    assert len(read[0]["input_ids"]) == len(SENTENCES)
    for other in read[1:]:
        assert np.array_equal(read[0]["input_ids"], other["input_ids"])


def test_pairs_have_segments(tmp_path: Path, tokenizer: Path) -> None:
    path = write_text(tmp_path, "t.jsonl", ['{"text_a": "the cat", "text_b": "dog"}'])
    (feed,) = open_data(path, TEXT, tokenizer=tokenizer / "tokenizer.json")
    assert feed["input_ids"].tolist() == [[1, 3, 4, 2, 8, 2]]
    assert feed["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1]]


def test_only_declared_inputs_are_fed_in_their_types(tmp_path: Path, tokenizer: Path) -> None:
    path = write_text(tmp_path, "t.txt", SENTENCES)
    mask = InputSpec("attention_mask", F32, ("b", "s"))
    (feed,) = open_data(path, [InputSpec("input_ids", I32, None), mask], tokenizer=tokenizer)
    assert {n: a.dtype for n, a in feed.items()} == {"input_ids": I32, "attention_mask": F32}


def test_fixed_shapes_are_honoured(tmp_path: Path, tokenizer: Path) -> None:
    path = write_text(tmp_path, "t.txt", SENTENCES)
    inputs = [InputSpec(s.name, I64, (3, 5)) for s in TEXT]
    feeds = list(open_data(path, inputs, tokenizer=tokenizer))
    assert [f["input_ids"].shape for f in feeds] == [(3, 5)] * 2
    ends = np.concatenate([f["input_ids"][:, -1] for f in feeds])
    assert set(ends.tolist()) == {2, PAD}  # cut rows keep their [SEP]
    with pytest.raises(DataError, match="batch size 8 was asked for, expected 3"):
        open_data(path, inputs, tokenizer=tokenizer, batch_size=8)


def test_samples_and_length_bound_the_text(tmp_path: Path, tokenizer: Path) -> None:
    path = write_text(tmp_path, "t.txt", SENTENCES * 100)
    feeds = list(open_data(path, TEXT, tokenizer=tokenizer, max_length=4))
    assert sum(map(sample_count, feeds)) == 256
    assert max(f["input_ids"].shape[1] for f in feeds) == 4
    assert sum(map(sample_count, open_data(path, TEXT, tokenizer=tokenizer, samples=3))) == 3
    assert [f["input_ids"].shape[1] for f in feeds] != sorted(
        f["input_ids"].shape[1] for f in feeds
    )


def test_padding_from_the_files_beside_the_tokenizer(tmp_path: Path, tokenizer: Path) -> None:
    from tokenizers import Tokenizer

    file = tokenizer / "tokenizer.json"
    plain = Tokenizer.from_file(str(file))
    plain.no_padding()
    plain.save(str(file))
    config = {"pad_token": {"content": "[UNK]"}, "padding_side": "left"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    path = write_text(tmp_path, "t.txt", ["cat", "the cat"])
    (feed,) = open_data(path, TEXT, tokenizer=tokenizer)
    assert feed["input_ids"].tolist() == [[0, 1, 4, 2], [1, 3, 4, 2]]
    assert feed["attention_mask"].tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    (tokenizer / "tokenizer_config.json").write_text("[1]")
    (feed,) = open_data(path, TEXT, tokenizer=tokenizer)
    assert feed["input_ids"][0].tolist() == [1, 4, 2, PAD]


@pytest.mark.parametrize(
    ("name", "lines", "said"),
    [
        ("t.jsonl", ['{"text": "a"}', "{oops"], "t.jsonl, line 2: not JSON"),
        ("t.jsonl", ["", "[1]"], "line 2: found list, expected an object"),
        ("t.jsonl", ['{"label": 1}'], "line 1: no field 'text', or .*; found label"),
        ("t.jsonl", ['{"text_a": "x"}'], "line 1: no field .*; found text_a"),
        ("t.jsonl", ['{"text": 5}'], "line 1: field 'text' is int, expected a string"),
        ("t.jsonl", ['{"text": "\\ud800"}'], "cannot tokenize the text"),
        ("t.jsonl", [""], "holds no text"),
        ("t.txt", ["", " "], "holds no text"),
        ("t.csv", ["text"], "holds no text"),
        ("t.csv", ["label,words", "1,cat"], "line 2: no field .*; found label, words"),
        ("t.csv", ["text_a,text_b", "cat"], "line 2: field 'text_b' is empty"),
        ("t.csv", ["text", "a" * 200_000], "not CSV: field larger"),
    ],
)
def test_text_that_cannot_be_used(
    tmp_path: Path, tokenizer: Path, name: str, lines: list[str], said: str
) -> None:
    path = write_text(tmp_path, name, lines)
    with pytest.raises(DataError, match=said):
        open_data(path, TEXT, tokenizer=tokenizer)


def test_text_that_is_not_utf8(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"caf\xe9 au lait\n")
    with pytest.raises(DataError, match=r"t\.txt is not UTF-8 text"):
        open_data(tmp_path / "t.txt", TEXT, tokenizer=tokenizer)


def test_tokenizers_that_cannot_be_used(tmp_path: Path, tokenizer: Path) -> None:
    path = write_text(tmp_path, "t.txt", SENTENCES)
    with pytest.raises(DataError, match=r"needs a tokenizer: a folder holding tokenizer\.json"):
        open_data(path, TEXT)
    with pytest.raises(DataError, match=r"holds no tokenizer\.json"):
        open_data(path, TEXT, tokenizer=tmp_path)
    with pytest.raises(DataError, match="length 2 leaves no room: 2 tokens are special"):
        open_data(path, TEXT, tokenizer=tokenizer, max_length=2)
    (tokenizer / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer"):
        open_data(path, TEXT, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (InputSpec("pixels", F32, ("b", "s")), "input 'pixels' cannot be made from text"),
        (InputSpec("input_ids", I64, ("b",)), "input 'input_ids' has rank 1, expected 2"),
        (InputSpec("input_ids", F32, ("b", "s")), "is float32, expected int32 or int64"),
        (InputSpec("input_ids", np.dtype(np.int8), None), "is int8, expected int32 or int64"),
        (InputSpec("attention_mask", I64, None), "declares attention_mask, expected input_ids"),
    ],
)
def test_inputs_that_text_cannot_fill(
    tmp_path: Path, tokenizer: Path, spec: InputSpec, said: str
) -> None:
    with pytest.raises(DataError, match=said):
        open_data(write_text(tmp_path, "t.txt", SENTENCES), [spec], tokenizer=tokenizer)
    with pytest.raises(DataError, match=said):
        sample_feeds([spec])


def test_recipe_of_the_samples_gives_the_same_bytes(tmp_path: Path, tokenizer: Path) -> None:
    script = "tools.tokenize_samples"
    text = write_text(tmp_path, "t.txt", SENTENCES)
    made = []
    for name in ("a.npz", "b.npz"):
        done = run_module(script, tokenizer, "--text", text, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
        made.append((tmp_path / name).read_bytes())
    assert made[0] == made[1]
    with np.load(tmp_path / "a.npz") as stored:
        assert stored["lengths"].tolist() == [len(s.split()) + 2 for s in SENTENCES]
    failed = run_module(script, tmp_path)
    assert failed.returncode == 2 and "tokenizer.json does not exist" in failed.stderr


def test_general_text_speaks_the_tokens_of_the_data(tmp_path: Path, tokenizer: Path) -> None:
    path = write_text(tmp_path, "t.txt", SENTENCES)
    given = open_data(path, TEXT, tokenizer=tokenizer)
    feeds = general_text(given, tokenizer, 32)
    assert feeds is not None and sum(map(sample_count, feeds)) == 256
    assert max(int(f["input_ids"].max()) for f in feeds) < len(WORDS)
    assert general_text(open_data([{}], TEXT), tokenizer) is None  # its tokens are unknown
    assert general_text(given, None) is None


def test_a_seed_draws_from_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "sorted.txt"
    path.write_text("\n".join(f"s{i:03}" for i in range(500)))
    drawn = read_sentences(path, 50, seed=0)
    assert len(set(drawn)) == 50 and drawn == sorted(drawn)  # in the order of the file
    assert 150 < sum(int(text[1:]) for (text,) in drawn) / 50 < 350
    assert drawn == read_sentences(path, 50, seed=0) != read_sentences(path, 50, seed=1)
    assert read_sentences(path, 50) == [(f"s{i:03}",) for i in range(50)]
    assert len(read_sentences(path, 600, seed=0)) == 500


def test_every_sentence_may_be_drawn(tmp_path: Path) -> None:
    path = tmp_path / "few.txt"
    path.write_text("a\nb\nc")
    assert {read_sentences(path, 1, seed=s)[0][0] for s in range(20)} == {"a", "b", "c"}


def test_words_are_text(tmp_path: Path) -> None:
    """Rows of token classification calibrate too."""
    path = tmp_path / "t.jsonl"
    path.write_text('{"tokens": ["a", "b"], "tags": [0, 1]}\n')
    assert read_sentences(path, 9) == [("a b",)]
    path.write_text('{"tokens": ["a", 1]}\n')
    with pytest.raises(DataError, match="no field 'text'"):
        read_sentences(path, 9)
