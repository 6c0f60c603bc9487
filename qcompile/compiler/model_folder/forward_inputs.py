"""What a transformers model takes: which inputs of its ``forward`` an exported file must have.

A tracing exporter fixes whatever it is not fed at the model's default, silently: the boxes of a
layout model, say, at zero. So every tensor in the signature of ``forward`` counts, unless it is
derived from the others or stands for one of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from qcompile.errors import ModelError

IDS, MASK, TYPES = "input_ids", "attention_mask", "token_type_ids"
POSITIONS, BOXES = "position_ids", "bbox"
# Inputs whose valid values are known, so that an exported file can be compared with the model.
FED = (IDS, MASK, TYPES, POSITIONS, BOXES)
# What forward computes itself where it is absent (positions, the decoder's inputs of BART), what
# replaces another input (embeddings, unpadded sequences), what continues another run (caches), what
# serves training only, and what absent means "none of it" by definition (heads to switch off).
_DERIVED = frozenset(
    (
        POSITIONS,
        "inputs",
        "inputs_embeds",
        "sliding_window_mask",
        "indices",
        "cu_seqlens",
        "input_mask",
        "question_lengths",
        "question_positions",
        "decoder_input_ids",
        "decoder_attention_mask",
        "decoder_inputs_embeds",
        "decoder_position_ids",
        "encoder_outputs",
        "encoder_hidden_states",
        "encoder_attention_mask",
        "past_key_values",
        "past_buckets_states",
        "cache",
        "cache_params",
        "cache_position",
        "mems",
        "state",
        "use_cache",
        "logits_to_keep",
        "labels",
        "entity_labels",
        "start_positions",
        "end_positions",
        "head_mask",
        "decoder_head_mask",
        "cross_attn_head_mask",
        "perm_mask",
        "target_mapping",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
    )
)


@dataclass(frozen=True)
class ForwardInputs:
    """kept: the file must have them. unknown: tensors whose valid values are not known.
    dropped: left at the model's default as the user says."""

    kept: tuple[str, ...]
    unknown: tuple[str, ...]
    dropped: tuple[str, ...]


def forward_inputs(
    model: Any, *, tokenizer_gives_types: bool, dropped: Collection[str]
) -> ForwardInputs:
    """The inputs of ``model.forward``. Raises ModelError: no input_ids, or no input to drop.

    token_type_ids count where the model has several types, or, where it does not say how many, if
    its tokenizer gives them.
    """
    parameters = inspect.signature(model.forward).parameters
    tensors = [name for name, p in parameters.items() if _is_tensor(p)]
    kind = type(model).__name__
    if IDS not in tensors:
        own = ", ".join(n for n in tensors if n not in _DERIVED)
        raise ModelError(f"{kind} takes {own or 'nothing'}, expected {IDS}")
    absent = [name for name in dropped if name not in tensors or name == IDS]
    if absent:
        droppable = ", ".join(n for n in tensors if n not in _DERIVED and n != IDS)
        raise ModelError(f"{kind} has no input {absent[0]!r} to drop; there are: {droppable}")
    kinds_of_types = getattr(model.config, "type_vocab_size", None)
    typed = tokenizer_gives_types if kinds_of_types is None else _is_several(kinds_of_types)
    boxed = hasattr(model.config, "max_2d_position_embeddings")
    fed = {IDS, MASK} | ({TYPES} if typed else set()) | ({BOXES} if boxed else set())
    known = fed | _DERIVED | {TYPES} | set(dropped)
    return ForwardInputs(
        kept=tuple(n for n in FED if n in tensors and n in fed and n not in dropped),
        unknown=tuple(n for n in tensors if n not in known),
        dropped=tuple(dropped),
    )


def _is_several(kinds: object) -> bool:
    return not isinstance(kinds, int) or kinds > 1


def _is_tensor(parameter: inspect.Parameter) -> bool:
    """True for what may be a tensor: by its annotation, or without one."""
    if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
        return False
    annotation = str(parameter.annotation)
    return parameter.annotation is parameter.empty or "Tensor" in annotation
