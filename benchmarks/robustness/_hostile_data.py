"""Hostile data, tokenizers and recipes: each builder returns arguments for compile."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.robustness._hostile_base import ESCAPE, linear, save

Builder = Callable[[Path], list[str]]
BUILDERS: dict[str, Builder] = {}
WORDS = {"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3}
TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordLevel", "vocab": WORDS, "unk_token": "[UNK]"},
}


def hostile(build: Builder) -> Builder:
    """Register a builder under its name."""
    BUILDERS[build.__name__] = build
    return build


def text_model(folder: Path) -> Path:
    """A table of four words and a linear layer, on input_ids [batch, length]."""
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (int64[batch,length] input_ids) => (float[batch,length,4] y)
        <float[4,4] t = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7},
         float[4,4] w = {1,0,0,0,0,1,0,0,0,0,1,0,0,0,0,1}>
        { h = Gather(t, input_ids)
          y = MatMul(h, w) }"""
    )
    return save(model, folder)


def tokenizer(folder: Path, text: str | None = None, **changes: Any) -> str:
    home = folder / "tokenizer"
    home.mkdir()
    (home / "tokenizer.json").write_text(text or json.dumps({**TOKENIZER, **changes}))
    return str(home)


def _numbers(folder: Path, file: Path) -> list[str]:
    return [str(save(linear(), folder)), "--data", str(file)]


def _text(folder: Path, name: str, content: bytes, home: str = "") -> list[str]:
    (folder / name).write_bytes(content)
    home = home or tokenizer(folder)
    return [str(text_model(folder)), "--data", str(folder / name), "--tokenizer", home]


def _recipe(folder: Path, text: str) -> list[str]:
    (folder / "r.yaml").write_text(text)
    good = folder / "x.npz"
    np.savez(good, x=np.ones((8, 4), np.float32))
    return [*_numbers(folder, good), "--recipe", str(folder / "r.yaml")]


def _npy(shape: tuple[int, ...], descr: str = "<f4", data: bytes = b"") -> bytes:
    """An .npy with this header, whatever the data."""
    file = io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + data


def _npz(folder: Path, content: bytes) -> list[str]:
    with zipfile.ZipFile(folder / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", content)
    return _numbers(folder, folder / "x.npz")


# ---- arrays
@hostile
def npz_claims_2_60_rows(folder: Path) -> list[str]:
    return _npz(folder, _npy((1 << 60, 4), data=bytes(64)))


@hostile
def npz_row_of_2_40(folder: Path) -> list[str]:
    return _npz(folder, _npy((8, 1 << 40), data=bytes(64)))


@hostile
def npz_bomb(folder: Path) -> list[str]:
    """4 GiB of zeros in 4 MB: eight rows of 512 MiB."""
    with (
        zipfile.ZipFile(folder / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w", force_zip64=True) as member,
    ):
        member.write(_npy((8, 1 << 27)))
        for _ in range(64):  # 1 GiB of it is enough
            member.write(bytes(1 << 24))
    return _numbers(folder, folder / "x.npz")


@hostile
def npz_pickle(folder: Path) -> list[str]:
    """Would write a file if it were ever loaded."""

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.write_text, (folder / "pwned", "x"))

    return _npz(folder, _npy((8,), "|O", pickle.dumps(Bomb())))


@hostile
def npz_item_of_2_40(folder: Path) -> list[str]:
    return _npz(folder, _npy((8, 4), f"|S{1 << 30}", bytes(64)))


@hostile
def npz_negative_shape(folder: Path) -> list[str]:
    return _npz(folder, _npy((-8, 4), data=bytes(128)))


@hostile
def npz_name_steers_a_terminal(folder: Path) -> list[str]:
    with zipfile.ZipFile(folder / "x.npz", "w") as archive:
        archive.writestr(f"{ESCAPE}.npy", _npy((8, 4), data=bytes(128)))
    return _numbers(folder, folder / "x.npz")


@hostile
def npz_header_is_code(folder: Path) -> list[str]:
    text = b"{'descr': __import__('os').system('touch pwned'), 'shape': (8, 4)}"
    head = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
    return _npz(folder, head + bytes(128))


@hostile
def npz_is_no_zip(folder: Path) -> list[str]:
    (folder / "x.npz").write_bytes(b"PK\x03\x04" + bytes(100))
    return _numbers(folder, folder / "x.npz")


# ---- text
@hostile
def jsonl_line_of_100_mb(folder: Path) -> list[str]:
    return _text(folder, "x.jsonl", b'{"text": "' + b"a " * 50_000_000 + b'"}\n')


@hostile
def txt_line_of_100_mb(folder: Path) -> list[str]:
    return _text(folder, "x.txt", b"a " * 50_000_000)


@hostile
def csv_line_of_100_mb(folder: Path) -> list[str]:
    return _text(folder, "x.csv", b"text\n" + b"a " * 50_000_000)


@hostile
def jsonl_nested_deep(folder: Path) -> list[str]:
    return _text(folder, "x.jsonl", b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n")


@hostile
def jsonl_number_of_a_million_digits(folder: Path) -> list[str]:
    return _text(folder, "x.jsonl", b'{"text": ' + b"9" * 1_000_000 + b"}\n")


@hostile
def jsonl_lone_surrogate(folder: Path) -> list[str]:
    return _text(folder, "x.jsonl", b'{"text": "\\ud800 a"}\n' * 4)


@hostile
def jsonl_keys_steer_a_terminal(folder: Path) -> list[str]:
    return _text(folder, "x.jsonl", json.dumps({ESCAPE: 1}, ensure_ascii=False).encode() + b"\n")


@hostile
def text_is_no_utf8(folder: Path) -> list[str]:
    return _text(folder, "x.txt", b"a b\n\xff\xfe\x00a\n")


@hostile
def text_is_null_bytes(folder: Path) -> list[str]:
    return _text(folder, "x.txt", bytes(100_000) + b"\n")


# ---- tokenizers
@hostile
def tokenizer_nested_deep(folder: Path) -> list[str]:
    home = tokenizer(folder, '{"a":' + "[" * 100_000 + "]" * 100_000 + "}")
    return _text(folder, "x.txt", b"a b\n", home)


@hostile
def tokenizer_config_nested_deep(folder: Path) -> list[str]:
    home = tokenizer(folder)
    Path(home, "tokenizer_config.json").write_text("[" * 100_000)
    return _text(folder, "x.txt", b"a b\n" * 4, home)


@hostile
def tokenizer_ids_beyond_the_table(folder: Path) -> list[str]:
    vocab = {"[PAD]": 0, "[UNK]": 1, "a": 4_000_000_000, "b": 3}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"}
    return _text(folder, "x.txt", b"a b\n" * 4, tokenizer(folder, model=model))


@hostile
def tokenizer_pads_to_2_60(folder: Path) -> list[str]:
    padding = {
        "strategy": {"Fixed": 1 << 60}, "direction": "Right", "pad_to_multiple_of": 1 << 60,
        "pad_id": 4_294_967_295, "pad_type_id": 0, "pad_token": "[PAD]",
    }  # fmt: skip
    return _text(folder, "x.txt", b"a b\na\n" * 4, tokenizer(folder, padding=padding))


@hostile
def tokenizer_truncates_absurdly(folder: Path) -> list[str]:
    truncation = {
        "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 1 << 60
    }  # fmt: skip
    return _text(folder, "x.txt", b"a b\n" * 4, tokenizer(folder, truncation=truncation))


@hostile
def tokenizer_of_bytes(folder: Path) -> list[str]:
    return _text(folder, "x.txt", b"a b\n", tokenizer(folder, "\x00\x01{"))


@hostile
def tokenizer_model_without_unknown(folder: Path) -> list[str]:
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[NONE]"}
    return _text(folder, "x.txt", b"z z\n" * 4, tokenizer(folder, model=model))


@hostile
def tokenizer_post_processor_lies(folder: Path) -> list[str]:
    """Asks for a special token that it does not define."""
    piece = {"SpecialToken": {"id": "[CLS]", "type_id": 0}}
    processor = {
        "type": "TemplateProcessing",
        "single": [piece, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [piece], "special_tokens": {},
    }  # fmt: skip
    return _text(folder, "x.txt", b"a b\n" * 4, tokenizer(folder, post_processor=processor))


# ---- recipes
@hostile
def recipe_alias_bomb(folder: Path) -> list[str]:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    return _recipe(folder, "\n".join([*lines, "keep_float: *a9"]))


@hostile
def recipe_alias_in_precision(folder: Path) -> list[str]:
    lines = ["precision:", "  p: &a0 [x, x]"]
    lines += [f"  p{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    return _recipe(folder, "\n".join(lines))


@hostile
def recipe_tag(folder: Path) -> list[str]:
    return _recipe(folder, "target: !!python/object/apply:os.system ['touch pwned']")


@hostile
def recipe_nested_deep(folder: Path) -> list[str]:
    return _recipe(folder, "precision: " + "[" * 10_000)


@hostile
def recipe_impossible_date(folder: Path) -> list[str]:
    return _recipe(folder, "target: 2001-99-99")


@hostile
def recipe_unhashable_key(folder: Path) -> list[str]:
    return _recipe(folder, "{[a]: b}: c")


@hostile
def recipe_of_10_mb(folder: Path) -> list[str]:
    return _recipe(folder, "target: " + "c" * 10_000_000)


@hostile
def recipe_steers_a_terminal(folder: Path) -> list[str]:
    return _recipe(folder, json.dumps({ESCAPE: 1}))


@hostile
def recipe_number_too_long(folder: Path) -> list[str]:
    return _recipe(folder, "seed: " + "9" * 10_000)


@hostile
def recipe_seed_2_100(folder: Path) -> list[str]:
    return _recipe(folder, f"seed: {1 << 100}")


@hostile
def recipe_pipeline_of_braces(folder: Path) -> list[str]:
    return _recipe(folder, "pipeline: '" + "a{b=" * 20_000 + "'")


@hostile
def recipe_pattern_that_backtracks(folder: Path) -> list[str]:
    return _recipe(folder, "keep_float: ['" + "*a" * 500 + "b']")
