"""A model folder in optimum's layout for tests: a small encoder, its tokenizer, text for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from qcompile.rewriting.testing import model_proto, normal

WIDTH = 64
WORDS = [*"abcdefgh"]


def encoder() -> onnx.ModelProto:
    """Two linears over embedded tokens and segments, padding zeroed; BERT's names."""
    tokens = "int64[batch_size,sequence_length] "
    return model_proto(
        f"""g ({tokens} input_ids, {tokens} attention_mask, {tokens} token_type_ids)
            => (float[batch_size,sequence_length,{WIDTH}] last_hidden_state) {{
            e = Gather(table, input_ids) t = Gather(kinds, token_type_ids) s = Add(e, t)
            f = Cast<to = 1>(attention_mask) u = Unsqueeze(f, last) m = Mul(s, u)
            h = MatMul(m, w1) r = Relu(h) last_hidden_state = MatMul(r, w2) }}""",
        table=normal(WIDTH, WIDTH),
        kinds=normal(2, WIDTH, seed=3) / 4,
        last=np.array([2]),
        w1=normal(WIDTH, 4 * WIDTH, seed=1) / 8,
        w2=normal(4 * WIDTH, WIDTH, seed=2) / 16,
    )


def decoder() -> onnx.ModelProto:
    """A linear over what no tokenizer makes."""
    states = f"float[batch_size,sequence_length,{WIDTH}] "
    body = "logits = MatMul(encoder_hidden_states, w)"
    return model_proto(
        f"g ({states} encoder_hidden_states) => ({states} logits) {{ {body} }}",
        w=normal(WIDTH, WIDTH) / 8,
    )


def write_folder(root: Path) -> Path:
    """model.onnx, config.json and tokenizer.json."""
    root.mkdir()
    onnx.save(encoder(), root / "model.onnx")
    (root / "config.json").write_text('{"model_type": "bert"}')
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(root / "tokenizer.json"))
    return root


def write_text(path: Path, seed: int = 0) -> Path:
    """48 sentences of 2 to 11 words."""
    rng = np.random.default_rng(seed)
    lines = (" ".join(rng.choice(WORDS, rng.integers(2, 12))) for _ in range(48))
    path.write_text("\n".join(lines))
    return path
