"""A model is run once to see whether it takes a feed, and text is cut by it on every command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import qcompile
from qcompile.errors import DataError, ModelError
from qcompile.ir.model_io.read_model import load
from qcompile.ir.model_io.to_proto import to_proto
from qcompile.rewriting.testing import normal, parse
from qcompile.runtime.evaluation import trial_run as module
from qcompile.runtime.evaluation.trial_run import made_up_feeds, trial_run
from qcompile.runtime.latency import TimingOptions
from tests.command_line import assert_one_line, compile_args, run

WIDTH, POSITIONS = 16, 12


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Tokens and positions, which a Slice of the constant 0, 1, … gives, as in exported BERT; text
    and tokenizer next to it."""
    graph = parse(
        """g (int64[B,S] input_ids) => (float[B,S,16] y)
        <int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}> {
            shape = Shape(input_ids) length = Slice(shape, one, two)
            ids = Slice(numbers, zero, length, one) p = Gather(positions, ids)
            e = Gather(words, input_ids) x = Add(e, p) y = MatMul(x, w)
        }""",
        numbers=np.arange(POSITIONS)[None],
        positions=normal(POSITIONS, WIDTH),
        words=normal(30, WIDTH, seed=1),
        w=normal(WIDTH, WIDTH, seed=2),
    )
    path = tmp_path / "model.onnx"
    onnx.save(to_proto(graph), path)
    words = {w: i for i, w in enumerate(("[UNK]", "[PAD]", *"abcdefgh"))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    rng = np.random.default_rng(0)
    lines = (" ".join(rng.choice([*"abcdefgh"], n)) for n in (20, 3, 12, 40, 8, 13, 20, 5, 7))
    (tmp_path / "long.txt").write_text("\n".join(lines))
    return path


def tokens(length: int) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.int64]]]:
    return {"input_ids": np.ones((1, length), np.int64)}


def test_a_feed_runs_or_its_error_is_told(model: Path) -> None:
    loads = []

    def load() -> Path:
        loads.append(model)
        return model

    takes = trial_run(load, threads=1)
    assert not loads
    assert takes(tokens(POSITIONS)) is None
    assert "running Add node" in str(takes(tokens(POSITIONS + 1)))
    assert takes(tokens(1)) is None and len(loads) == 1


def test_a_model_that_does_not_load_takes_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"none")
    takes = trial_run(lambda: tmp_path / "x.onnx")
    assert "cannot load the model" in str(takes(tokens(1)))


def test_every_command_cuts_text_at_the_models_positions(model: Path) -> None:
    folder = model.parent
    options = ("--tokenizer", folder, "--batch-size", 2)
    done = run(*compile_args(model, folder / "long.txt", *options))
    assert done.exit_code == 0, done.output
    assert f"note: text is cut after {POSITIONS} tokens: the model takes no more" in done.output
    out, data = folder / "out.onnx", ("--data", folder / "long.txt", *options)
    for command in (
        ("verify", model, out, *data, "--min-cosine", 0.5),
        ("bench", model, out, *data, "--rounds", 1, "--seconds", 0.01),
        ("sensitivity", model, *data),
    ):
        assert run(*command).exit_code == 0
        failed = run(*command, "--max-length", POSITIONS + 1)
        assert_one_line(failed, 2, "length 13: the model takes 12 tokens at most")
        assert run(*command, "--max-length", 6).exit_code == 0


def test_a_dimension_fixed_beyond_the_positions_is_refused(model: Path) -> None:
    data = (model.parent / "long.txt", "--tokenizer", model.parent)
    failed = run(*compile_args(model, *data, "--dim", "S=13"))
    assert_one_line(failed, 2, "fixed at 13 tokens, but the model takes 12 at most")
    assert run(*compile_args(model, *data, "--dim", "S=12")).exit_code == 0


def test_made_up_inputs_are_as_long_as_the_model_takes(model: Path) -> None:
    """128 is halved until it is within the 12 positions: 64, 32, 16, 8."""
    feeds = made_up_feeds(load(model), model, {"B": 2}, 3)
    assert [feed["input_ids"].shape for feed in feeds] == [(2, 8)] * 3
    result = run("bench", model, "--rounds", 1, "--seconds", 0.01, "--json", "-")
    assert result.exit_code == 0, result.output
    assert '"input_ids"' in result.stdout
    found = qcompile.bench([model], options=TimingOptions(1, rounds=1, seconds=0.01))
    assert found.shapes == {"input_ids": [1, 8]}


def test_given_sizes_stay_and_nothing_is_run(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(module, "Session", refused)
    (feed,) = made_up_feeds(load(model), model, {"S": 40})
    assert feed["input_ids"].shape == (1, 40)
    (feed,) = made_up_feeds(load(model), model, {}, shapes={"input_ids": (2, 13)})
    assert feed["input_ids"].shape == (2, 13)
    with pytest.raises(AssertionError, match="loaded"):
        made_up_feeds(load(model), model, {})


def test_a_model_that_takes_no_length_names_the_option(tmp_path: Path) -> None:
    """Its input must have 3 columns for the product, whatever it declares."""
    graph = parse(
        "g (int64[B,seq] ids) => (float[B,2] y) { c = Cast<to: int = 1>(ids) y = MatMul(c, w) }",
        w=normal(3, 2),
    )
    path = tmp_path / "m.onnx"
    onnx.save(to_proto(graph), path)
    with pytest.raises(DataError, match=r"128 tokens or fewer do not run.*--dim seq=N"):
        made_up_feeds(load(path), path, {})
    assert_one_line(run("bench", path), 2, "--dim seq=N", "--data")
    assert run("bench", path, "--dim", "seq=3", "--rounds", 1, "--seconds", 0.01).exit_code == 0


def test_a_model_that_cannot_be_loaded_is_no_question_of_length(model: Path) -> None:
    with pytest.raises(ModelError, match="cannot load the model"):
        made_up_feeds(load(model), b"bad", {})
