"""Small text models of random weights, trained for seconds, and the texts for them.

Nothing is downloaded. Sentences are put together from words of four topics; a classifier learns
the topic, a reranker which words make a passage useful. Training makes answers that differ clearly
from text to text, as those of a real model do.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TOPICS = {
    "weather": "rain storm cloud wind snow sunshine thunder fog forecast frost",
    "food": "bread soup cheese apple kitchen dinner spice recipe oven breakfast",
    "sport": "match goal team race stadium coach player league medal referee",
    "music": "song guitar concert piano singer melody drum album choir rhythm",
}
FRAME = (
    "the {a} and the {b} were better than we expected",
    "she wrote about {a} and {b} in her last letter",
    "nobody in the town remembers such a {a} before the {b}",
    "my neighbour talks about the {a} every day , and about the {b}",
)
MOST_TOKENS = 64
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
SIZES = {
    "hidden_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "max_position_embeddings": MOST_TOKENS + 2,
    "initializer_range": 0.05,
}
FURTHER: dict[str, dict[str, Any]] = {
    "distilbert": {"dim": 192, "n_layers": 3, "n_heads": 3, "hidden_dim": 768},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "roberta": {"type_vocab_size": 1},
    "xlm-roberta": {"type_vocab_size": 1},
    "modernbert": {"reference_compile": False, "local_attention": 16},
}
TYPES = {"bert": ("token_type_ids",)}  # architectures that tell a pair's parts by an input
STEPS, BATCH = 80, 32


def sentence(topic: str, rng: random.Random) -> str:
    """A sentence with two words of a topic."""
    a, b = rng.sample(TOPICS[topic].split(), 2)
    return rng.choice(FRAME).format(a=a, b=b)


def labelled(count: int, seed: int) -> list[tuple[str, str]]:
    """Sentences with their topics."""
    rng = random.Random(seed)
    topics = [rng.choice(list(TOPICS)) for _ in range(count)]
    return [(sentence(topic, rng), topic) for topic in topics]


def paired(count: int, seed: int) -> list[tuple[str, str, float]]:
    """Question, passage, and how useful the passage is: 0 for weather to 1 for music.

    Two words of a passage count, by their places in TOPICS. That can be learned in seconds, unlike
    what a question means; the question makes inputs of two texts.
    """
    rng = random.Random(seed)
    places = {word: n / 39 for n, word in enumerate(" ".join(TOPICS.values()).split())}
    found = []
    for _ in range(count):
        question, passage = (sentence(rng.choice(list(TOPICS)), rng) for _ in range(2))
        useful = [places[word] for word in passage.split() if word in places]
        found.append((question, passage, sum(useful) / len(useful)))
    return found


def write_texts(work: Path) -> None:
    """texts.txt to calibrate on and held-out.txt to compare on, a sentence a line."""
    for name, seed in (("texts", 1), ("held-out", 2)):
        lines = [text for text, _ in labelled(128, seed)]
        (work / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_pairs(work: Path) -> None:
    """pairs.csv to calibrate on, and queries.json: 12 questions with 16 passages each."""
    with (work / "pairs.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["question", "passage"])
        rows.writerows(pair[:2] for pair in paired(128, 1))
    rng = random.Random(2)
    passages = [text for text, _ in labelled(16, 3)]
    questions = [sentence(rng.choice(list(TOPICS)), rng) for _ in range(12)]
    values = {"questions": questions, "passages": passages}
    (work / "queries.json").write_text(json.dumps(values), encoding="utf-8")


def held_out(work: Path) -> list[str]:
    """The sentences of held-out.txt."""
    return (work / "held-out.txt").read_text(encoding="utf-8").splitlines()


def encoder(model_type: str) -> Callable[[Path], None]:
    """What makes the folder ``model``: random weights, for embeddings."""

    def make(work: Path) -> None:
        from transformers import AutoModel

        write_texts(work)
        tokenizer = tokenizer_of(model_type)
        save(seeded(AutoModel, config_of(model_type, tokenizer)), tokenizer, work)

    return make


def classifier(model_type: str) -> Callable[[Path], None]:
    """What makes the folder ``model``: trained to tell the topic of a sentence."""

    def make(work: Path) -> None:
        from transformers import AutoModelForSequenceClassification

        write_texts(work)
        tokenizer = tokenizer_of(model_type)
        config = config_of(model_type, tokenizer)
        config.id2label, config.label2id = dict(enumerate(TOPICS)), _numbers()
        model = seeded(AutoModelForSequenceClassification, config)
        fit(model, topic_batches(tokenizer))
        save(model, tokenizer, work)

    return make


def reranker(model_type: str) -> Callable[[Path], None]:
    """What makes the folder ``model``: trained to score passages by their words."""

    def make(work: Path) -> None:
        from transformers import AutoModelForSequenceClassification

        write_pairs(work)
        tokenizer = tokenizer_of(model_type)
        config = config_of(model_type, tokenizer)
        config.id2label, config.label2id = {0: "score"}, {"score": 0}
        model = seeded(AutoModelForSequenceClassification, config)
        fit(model, pair_batches(tokenizer))
        save(model, tokenizer, work)

    return make


def _numbers() -> dict[str, int]:
    return {topic: number for number, topic in enumerate(TOPICS)}


def tokenizer_of(model_type: str) -> Any:
    """A fast tokenizer of the architecture's kind, trained on sentences as above."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    corpus = [text for text, _ in labelled(2000, 0)]
    if "roberta" in model_type:
        special = ROBERTA_SPECIAL
        bos, pad, eos, unknown, mask = special
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=600, special_tokens=special, show_progress=False
        )
        pair = f"{bos} $A {eos} {eos} $B {eos}"
    else:
        special = SPECIAL
        pad, unknown, bos, eos, mask = special
        tokenizer = Tokenizer(models.WordPiece(unk_token=unknown))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(
            vocab_size=600, special_tokens=special, show_progress=False
        )
        pair = f"{bos} $A {eos} $B:1 {eos}:1"
    tokenizer.train_from_iterator(corpus, trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in (bos, eos)]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A {eos}", pair=pair, special_tokens=ids
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MOST_TOKENS,
        pad_token=pad,
        unk_token=unknown,
        cls_token=bos,
        sep_token=eos,
        mask_token=mask,
        model_input_names=["input_ids", "attention_mask", *TYPES.get(model_type, ())],
    )


def config_of(model_type: str, tokenizer: Any) -> Any:
    """A small configuration of an architecture."""
    from transformers import AutoConfig

    return AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        cls_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id,
        **SIZES,
        **FURTHER.get(model_type, {}),
    )


def seeded(model_class: Any, config: Any) -> Any:
    """A model of random weights, the same at every call."""
    import torch

    torch.manual_seed(0)
    model = model_class.from_config(config)
    for weight in model.parameters():
        if weight.dim() > 1 and not weight.any():  # YOLOS: equal tokens would stay equal
            torch.nn.init.normal_(weight, std=0.5)
    return model


def topic_batches(tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Batches of sentences with the number of their topic."""
    import torch

    numbers = _numbers()
    for step in range(STEPS):
        rows = labelled(BATCH, 1000 + step)
        batch = tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")
        yield {**batch, "labels": torch.tensor([numbers[topic] for _, topic in rows])}


def pair_batches(tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Batches of pairs with the score to learn."""
    import torch

    for step in range(2 * STEPS):
        rows = paired(BATCH, 1000 + step)
        first, second = [r[0] for r in rows], [r[1] for r in rows]
        batch = tokenizer(first, second, padding=True, return_tensors="pt")
        yield {**batch, "labels": torch.tensor([r[2] for r in rows])}


def fit(model: Any, batches: Iterator[dict[str, Any]]) -> None:
    """Train a transformers model by its own loss."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    model.train()
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def save(model: Any, processor: Any, work: Path) -> None:
    """Write the folder ``model``, as a model from a hub looks."""
    model.save_pretrained(work / "model")
    processor.save_pretrained(work / "model")
