"""Small encoders of several architectures with random weights, as transformers folders.

Each has its own tokenizer: 1000 tokens, from the sentences that are part of qcompile, with the
special tokens of its family. Weights are drawn so that a linear layer preserves the magnitude of
its input; with transformers' default of 0.02, attention would weight all positions alike.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models._common import need
from models._encoder import vary_vectors

TOKENS, HIDDEN, LAYERS, HEADS = 1000, 128, 3, 4
SENTENCES = Path(__file__).parent.parent / "qcompile" / "data" / "samples" / "calibration.txt"
BERT_TOKENS = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]",
               "sep_token": "[SEP]", "mask_token": "[MASK]"}  # fmt: skip
ROBERTA_TOKENS = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>",
                  "unk_token": "<unk>", "mask_token": "<mask>"}  # fmt: skip
TASKS = {
    "feature-extraction": "Model",
    "text-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
}
_SIZES = {
    "vocab_size": TOKENS,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 4 * HIDDEN,
    "max_position_embeddings": 130,
    "initializer_range": HIDDEN**-0.5,
}
_DEBERTA = {
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_buckets": 32,
    "max_relative_positions": -1,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "position_biased_input": False,
}


@dataclass(frozen=True)
class Architecture:
    """Prefix of the class names in transformers, configuration values, special tokens."""

    prefix: str
    config: Mapping[str, Any]
    special: Mapping[str, str]


ARCHITECTURES = {
    "bert": Architecture("Bert", _SIZES, BERT_TOKENS),
    "roberta": Architecture(
        "Roberta", {**_SIZES, "type_vocab_size": 1, "pad_token_id": 1}, ROBERTA_TOKENS
    ),
    "distilbert": Architecture(
        "DistilBert",
        {
            "vocab_size": TOKENS,
            "dim": HIDDEN,
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "hidden_dim": 4 * HIDDEN,
            "max_position_embeddings": 130,
            "initializer_range": HIDDEN**-0.5,
        },
        BERT_TOKENS,
    ),
    "mpnet": Architecture("MPNet", {**_SIZES, "pad_token_id": 1}, ROBERTA_TOKENS),
    "electra": Architecture("Electra", {**_SIZES, "embedding_size": HIDDEN // 2}, BERT_TOKENS),
    "deberta-v2": Architecture(
        "DebertaV2", {**_SIZES, **_DEBERTA, "conv_kernel_size": 3, "conv_act": "gelu"}, BERT_TOKENS
    ),
    "deberta-v3": Architecture("DebertaV2", {**_SIZES, **_DEBERTA}, BERT_TOKENS),
}


def write(name: str, task: str, folder: Path, seed: int = 0) -> None:
    """Save config.json, model.safetensors and the tokenizer of one architecture for one task."""
    torch, transformers = need("torch"), need("transformers")
    architecture = ARCHITECTURES[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{architecture.prefix}Config")(**architecture.config)
    model = getattr(transformers, architecture.prefix + TASKS[task])(config)
    vary_vectors(model)
    model.save_pretrained(folder)
    segments = getattr(config, "type_vocab_size", 0) > 1
    write_tokenizer(folder, architecture.special, segments=segments)


def _vocabulary(special: Mapping[str, str]) -> dict[str, int]:
    """Special tokens, letters and the most common words; a trainer would break ties randomly."""
    text = SENTENCES.read_text(encoding="utf-8").lower()
    letters = sorted(set(text) - set(string.whitespace))
    words = Counter(re.findall(r"\w\w+", text))
    common = sorted(words, key=lambda w: (-words[w], w))
    tokens = [*special.values(), *letters, *(f"##{c}" for c in letters), *common]
    return {token: i for i, token in enumerate(tokens[:TOKENS])}


def write_tokenizer(folder: Path, special: Mapping[str, str], *, segments: bool) -> None:
    """Save a WordPiece tokenizer of the sample sentences for transformers."""
    tokenizers, transformers = need("tokenizers"), need("transformers")
    unknown = special["unk_token"]
    engine = tokenizers.Tokenizer(
        tokenizers.models.WordPiece(_vocabulary(special), unk_token=unknown)
    )
    engine.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    engine.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    first, last = special["cls_token"], special["sep_token"]
    engine.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B:1 {last}:1",
        special_tokens=[(t, engine.token_to_id(t)) for t in (first, last)],
    )
    inputs = ["input_ids", "attention_mask", *(["token_type_ids"] if segments else [])]
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=engine, model_input_names=inputs, model_max_length=128, **special
    ).save_pretrained(folder)
