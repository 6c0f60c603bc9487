"""A folder with a small classifier of texts, and labelled texts for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx

from qcompile.rewriting.testing import model_proto, normal
from tests.compiler.model_folder.written_folder import WIDTH, WORDS, write_folder

LABELS = ("even", "odd")


def classifier() -> onnx.ModelProto:
    """Embedded tokens, a linear layer over each, their mean without padding, and two logits."""
    tokens = "int64[batch_size,sequence_length] "
    return model_proto(
        f"""g ({tokens} input_ids, {tokens} attention_mask)
            => (float[batch_size,2] logits) {{
            e = Gather(table, input_ids)
            h = MatMul(e, w1) b = Add(h, b1) r = Relu(b)
            f = Cast<to = 1>(attention_mask) u = Unsqueeze(f, last) m = Mul(r, u)
            s = ReduceSum<keepdims = 0>(m, middle) c = ReduceSum<keepdims = 0>(u, middle)
            d = Div(s, c) p = MatMul(d, w2) logits = Add(p, b2) }}""",
        table=normal(16, WIDTH),
        last=np.array([2]),
        middle=np.array([1]),
        w1=normal(WIDTH, WIDTH, seed=1) / 8,
        b1=normal(WIDTH, seed=4) / 8,
        w2=normal(WIDTH, 2, seed=2) / 8,
        b2=np.zeros(2, np.float32),
    )


def write_classifier(root: Path) -> Path:
    """model.onnx, config.json with two labels, tokenizer.json."""
    write_folder(root)
    onnx.save(classifier(), root / "model.onnx")
    names = {str(i): name for i, name in enumerate(LABELS)}
    config = {"architectures": ["BertForSequenceClassification"], "id2label": names}
    (root / "config.json").write_text(json.dumps(config))
    return root


def write_labelled(path: Path, count: int = 64, seed: int = 0) -> Path:
    """Texts that the classifier has to learn: whether the first half of the words prevails."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        words = rng.choice(WORDS, rng.integers(2, 8))
        few = sum(word in WORDS[:4] for word in words) * 2 > len(words)
        rows.append({"text": " ".join(words), "label": LABELS[int(few)]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
