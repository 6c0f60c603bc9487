"""Every tensor that forward takes is kept, derived from the others, or unknown: none is lost."""

from __future__ import annotations

from inspect import Parameter, Signature
from types import SimpleNamespace
from typing import Any

import pytest

from qcompile.compiler.model_folder.forward_inputs import ForwardInputs, forward_inputs
from qcompile.errors import ModelError


class Forward:
    """A function with these tensors as arguments, and switches as all models have them."""

    def __init__(self, names: tuple[str, ...]) -> None:
        kind = Parameter.KEYWORD_ONLY
        switch = Parameter("use_cache", kind, annotation="Optional[bool]")
        self.__signature__ = Signature(
            [
                *(Parameter(name, kind, annotation="Optional[torch.Tensor]") for name in names),
                switch,
                Parameter("return_dict", kind),
                Parameter("kwargs", Parameter.VAR_KEYWORD),
            ]
        )

    def __call__(self) -> None:
        """Only its signature is read."""


def model(*names: str, **config: object) -> Any:
    return SimpleNamespace(forward=Forward(names), config=SimpleNamespace(**config))


def read(model: Any, *dropped: str, types: bool = False) -> ForwardInputs:
    return forward_inputs(model, tokenizer_gives_types=types, dropped=dropped)


BERT = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds",
        "head_mask", "past_key_values", "labels")  # fmt: skip


def test_what_a_text_encoder_takes() -> None:
    assert read(model(*BERT, type_vocab_size=2)) == ForwardInputs(BERT[:3], (), ())
    assert read(model(*BERT, type_vocab_size=1)).kept == BERT[:2]


def test_types_that_the_configuration_does_not_count() -> None:
    """XLNet's tokenizer gives them, GPT-2's does not."""
    assert read(model(*BERT), types=True).kept == BERT[:3]
    assert read(model(*BERT)).kept == BERT[:2]


def test_boxes_are_kept_where_their_range_is_known() -> None:
    takes = ("input_ids", "bbox", "attention_mask")
    layout = read(model(*takes, max_2d_position_embeddings=1024))
    assert set(layout.kept) == set(takes) and not layout.unknown
    assert read(model(*takes)).unknown == ("bbox",)  # fractions of the page, in BROS


def test_other_tensors_are_unknown_until_dropped() -> None:
    takes = model("input_ids", "pixel_values", "entity_ids")
    assert read(takes).unknown == ("pixel_values", "entity_ids")
    found = read(takes, "entity_ids")
    assert (found.kept, found.unknown, found.dropped) == (
        ("input_ids",), ("pixel_values",), ("entity_ids",)
    )  # fmt: skip
    assert read(model(*BERT, type_vocab_size=2), "token_type_ids").kept == BERT[:2]


@pytest.mark.parametrize(
    ("takes", "dropped", "said"),
    [
        (("pixel_values",), (), "takes pixel_values, expected input_ids"),
        (("input_ids",), ("bbox",), "has no input 'bbox' to drop; there are: "),
        (("input_ids", "bbox"), ("input_ids",), "no input 'input_ids' to drop; there are: bbox"),
    ],
)
def test_refusals(takes: tuple[str, ...], dropped: tuple[str, ...], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        read(model(*takes), *dropped)
