"""A tokenizer's own files: tokens, padding and length as transformers takes them from there.

| file | what is read |
|---|---|
| ``tokenizer.json`` | the tokenizer, its truncation and padding; by the tokenizers package |
| ``tokenizer_config.json`` | ``model_max_length``, ``pad_token``, sides of padding and truncation |
| ``special_tokens_map.json`` | ``pad_token`` |
| ``sentence_bert_config.json`` | ``max_seq_length`` |
| ``config.json`` | whether positions begin after the padding's, as RoBERTa's do |

Where two files differ, tokenizer_config.json counts, as in transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from qcompile.errors import DataError

Sentence: TypeAlias = tuple[str, ...]  # one text, or a pair of texts

TOKENIZER = "tokenizer.json"
_LARGEST_TOKENIZER = 1 << 28
_PAD_TOKENS = ("[PAD]", "<pad>", "<|endoftext|>", "</s>")
# Model types of transformers that count positions from pad_token_id + 1, and give padding the
# position pad_token_id (``create_position_ids_from_input_ids``).
_COUNTED_FROM_PADDING = frozenset(
    (
        "camembert",
        "data2vec-text",
        "esm",
        "ibert",
        "layoutlmv3",
        "lilt",
        "longformer",
        "luke",
        "markuplm",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    )
)


@dataclass(frozen=True)
class Tokens:
    """One tokenized sentence: ids and segment ids, of equal length, special tokens included."""

    ids: Sequence[int]
    types: Sequence[int]


@dataclass(frozen=True)
class Padding:
    """What fills a row up to its batch's width, and on which side.

    ``before_first``: the position before that of a row's first token, which padding has.
    """

    token: int = 0
    segment: int = 0
    left: bool = False
    before_first: int = -1


def folder_near(*models: object) -> Path | None:
    """The folder with the tokenizer of the first of these models that has one; None if none has.

    It is the folder of the model's file, or the one that holds this folder, if that is named onnx,
    as transformers.js and sentence-transformers lay out their files.
    """
    for model in models:
        if not isinstance(model, str | Path):
            continue
        place = Path(model) if Path(model).is_dir() else Path(model).parent
        places = (place, place.parent) if place.resolve().name == "onnx" else (place,)
        for folder in places:
            if (folder / TOKENIZER).is_file():
                return folder
    return None


class TextTokenizer:
    """The tokenizer of a folder with tokenizer.json, or of that file, and what is next to it.

    Raises DataError where there is none.
    """

    def __init__(self, path: Path) -> None:
        self._file = path if path.is_file() else path / TOKENIZER
        if not self._file.is_file():
            raise DataError(f"tokenizer {str(path)!r} holds no tokenizer.json")
        if self._file.stat().st_size > _LARGEST_TOKENIZER:
            raise DataError(f"{self._file} is no tokenizer: {self._file.stat().st_size} bytes")
        # Imported here: 50 ms that commands without text need not pay.
        from tokenizers import Tokenizer

        with _errors_as(f"{self._file} is not a tokenizer"):
            self._engine = Tokenizer.from_file(str(self._file))
        folder = self._file.parent
        self._config = _json(folder / "tokenizer_config.json")
        truncation = self._engine.truncation or {}
        lengths = (
            truncation.get("max_length"),
            self._config.get("model_max_length"),
            _json(folder / "sentence_bert_config.json").get("max_seq_length"),
        )
        self.longest = min((n for length in lengths if (n := _length(length))), default=None)
        self.padding = _padding(self._engine, folder, self._config)
        side = self._config.get("truncation_side") or truncation.get("direction")
        self._cut = "left" if str(side).lower() == "left" else "right"
        self._engine.no_padding()

    def encode(self, sentences: Sequence[Sentence], longest: int) -> list[Tokens]:
        """Tokens of each sentence, ``longest`` at most. Raises DataError."""
        self._truncate(longest, any(len(s) > 1 for s in sentences))
        with _errors_as(f"{self._file} cannot tokenize the text"):
            encoded = self._engine.encode_batch([s if len(s) > 1 else s[0] for s in sentences])
        return [Tokens(e.ids, e.type_ids) for e in encoded]

    def encode_words(
        self, texts: Sequence[Sequence[str]], longest: int
    ) -> list[tuple[Tokens, list[int | None]]]:
        """Tokens of texts that are already split into words, and the word of each token.

        None stands for special tokens, which belong to no word. Raises DataError.
        """
        self._truncate(longest, False)
        with _errors_as(f"{self._file} cannot tokenize the words"):
            encoded = self._engine.encode_batch([list(t) for t in texts], is_pretokenized=True)
        return [(Tokens(e.ids, e.type_ids), e.word_ids) for e in encoded]

    def _truncate(self, longest: int, has_pairs: bool) -> None:
        special = self._engine.num_special_tokens_to_add(has_pairs)
        if longest <= special:
            raise DataError(f"length {longest} leaves no room: {special} tokens are special")
        self._engine.enable_truncation(longest, direction=self._cut)


def _length(value: object) -> int | None:
    """A number of tokens; None where it is none, as transformers' 1e30 for no limit."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if 1 <= value < 1 << 31 else None


@contextmanager
def _errors_as(what: str) -> Iterator[None]:
    """Turn any exception of the tokenizers package into a DataError.

    It raises bare Exception, and where its Rust code panics only a BaseException.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:
        raise DataError(f"{what}: {(str(e) or type(e).__name__).splitlines()[0]}") from e


def _padding(engine: Any, folder: Path, config: dict[str, Any]) -> Padding:
    """Each of its values from the first file that has it; else a common pad token's id."""
    own = engine.padding or {}
    special = _json(folder / "special_tokens_map.json")
    named = [_content(c.get("pad_token")) for c in (config, special)]
    ids = [engine.token_to_id(t) for t in named if isinstance(t, str)]
    ids.append(own.get("pad_id"))
    ids += [engine.token_to_id(t) for t in _PAD_TOKENS]
    # Padded positions are masked out, so a tokenizer that has no pad token may use any id.
    token = next((i for i in ids if i is not None), 0)
    side = config.get("padding_side") or own.get("direction")
    segment = config.get("pad_token_type_id", own.get("pad_type_id"))
    return Padding(
        token,
        segment if isinstance(segment, int) else 0,
        str(side).lower() == "left",
        _before_first(_json(folder / "config.json")),
    )


def _content(token: object) -> object:
    """The text of a token, which files hold as it is or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def _before_first(model: dict[str, Any]) -> int:
    """The position before that of a row's first token."""
    padding = model.get("pad_token_id")
    if model.get("model_type") not in _COUNTED_FROM_PADDING:
        return -1
    return padding if isinstance(padding, int) and padding >= 0 else 1


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
