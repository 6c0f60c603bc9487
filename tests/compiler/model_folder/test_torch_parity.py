"""An export counts only where it computes what the model does, on every shape and with padding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest

from qcompile.compiler.model_folder.torch_parity import (
    SHAPES,
    TOLERANCE,
    Parity,
    Vocabulary,
    compare_with_torch,
    example_feed,
)
from qcompile.errors import GateError, ModelError
from qcompile.ir.model_io.to_proto import to_proto
from qcompile.quant import Array
from qcompile.rewriting.testing import normal, parse

VOCABULARY = Vocabulary(size=20, padding=3, segments=2, longest=128)
TABLE = normal(20, 4)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """Embedded tokens, padding zeroed."""
    graph = parse(
        """g (int64[B,S] input_ids, int64[B,S] attention_mask) => (float[B,S,4] y)
        <int64[1] last = {2}> {
            e = Gather(table, input_ids) f = Cast<to = 1>(attention_mask) m = Unsqueeze(f, last)
            y = Mul(e, m)
        }""",
        table=TABLE,
    )
    onnx.save(to_proto(graph), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def reference(feed: Mapping[str, Array]) -> dict[str, Array]:
    return {"y": TABLE[feed["input_ids"]] * feed["attention_mask"][..., None].astype(np.float32)}


def test_the_same_function_passes(exported: Path) -> None:
    found = compare_with_torch(exported, reference, VOCABULARY)
    assert (found.worst, found.shapes) == (0.0, SHAPES)
    assert str(found).startswith(
        "differs from torch by 0.0e+00 of the largest value at most, on 2x"
    )


def test_lengths_stay_within_the_model(exported: Path) -> None:
    short = Vocabulary(size=20, padding=3, segments=0, longest=7)
    assert compare_with_torch(exported, reference, short).shapes == ((2, 7), (1, 7), (3, 7), (2, 1))


def lost_mask(feed: Mapping[str, Array]) -> dict[str, Array]:
    return {"y": TABLE[feed["input_ids"]]}


def baked_in_length(feed: Mapping[str, Array]) -> dict[str, Array]:
    return {"y": reference(feed)["y"][:, : SHAPES[0][1]]}


def slightly_off(feed: Mapping[str, Array]) -> dict[str, Array]:
    return {"y": reference(feed)["y"] * np.float32(1 + 2 * TOLERANCE)}


def not_a_number(feed: Mapping[str, Array]) -> dict[str, Array]:
    return {"y": reference(feed)["y"] * np.float32("nan")}


@pytest.mark.parametrize("other", [lost_mask, baked_in_length, slightly_off, not_a_number])
def test_another_function_fails(exported: Path, other: object) -> None:
    assert callable(other)
    with pytest.raises(GateError, match="the exported model differs from torch: 'y' by"):
        compare_with_torch(exported, other, VOCABULARY)


def test_rounding_passes(exported: Path) -> None:
    """A tenth of the limit, which is more than float32 rounding and less than any fault."""

    def rounded(feed: Mapping[str, Array]) -> dict[str, Array]:
        return {"y": reference(feed)["y"] * np.float32(1 + TOLERANCE / 10)}

    found = compare_with_torch(exported, rounded, VOCABULARY)
    # of 1 + 1e-5, which float32 rounds by up to 6e-8
    assert found.worst == pytest.approx(1e-5, rel=0.02) and found.output == "y"


def test_examples_are_padded_at_their_ends() -> None:
    names = ("input_ids", "attention_mask", "token_type_ids")
    ids, mask, types = example_feed(names, VOCABULARY, 3, 8).values()
    assert mask.sum(axis=1).tolist() == [8, 6, 4]
    assert ((ids == VOCABULARY.padding) == (mask == 0)).all()
    assert types[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    again = example_feed(names, VOCABULARY, 3, 8)
    assert all((again[n] == a).all() for n, a in zip(names, (ids, mask, types), strict=True))
    one_kind = example_feed(names, Vocabulary(20, 0, 1, 9), 2, 1)
    assert not one_kind["token_type_ids"].any() and one_kind["attention_mask"].all()


def test_boxes_and_positions_are_valid() -> None:
    limits = Vocabulary(size=20, padding=3, segments=2, longest=9, boxes=1000)
    boxes, positions = example_feed(("bbox", "position_ids"), limits, 3, 9).values()
    assert boxes.shape == (3, 9, 4) and boxes.min() >= 0 and 900 < boxes.max() <= 1000
    assert (boxes[..., :2] <= boxes[..., 2:]).all() and (boxes[..., :2] < boxes[..., 2:]).any()
    assert positions[0].tolist() == list(range(9)) and positions[1].tolist() == [*range(7), 6, 6]


def test_outputs_of_padding_on_the_left_are_not_compared(exported: Path) -> None:
    left = Vocabulary(size=20, padding=3, segments=2, longest=128, left=True)
    mask, positions = example_feed(("attention_mask", "position_ids"), left, 2, 5).values()
    assert mask.tolist() == [[1] * 5, [0, 0, 1, 1, 1]]
    assert positions.tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]
    assert compare_with_torch(exported, lost_mask, left).worst == 0.0  # differs in padding alone
    with pytest.raises(GateError, match="differs from torch"):
        compare_with_torch(exported, slightly_off, left)


def test_an_output_of_its_own_is_refused(exported: Path) -> None:
    with pytest.raises(ModelError, match="output 'y', which the model does not give"):
        compare_with_torch(exported, lambda _feed: {}, VOCABULARY)


def test_plain_values() -> None:
    assert Parity(1e-6, "y", ((1, 2),)).to_dict() == {
        "worst": 1e-6, "output": "y", "shapes": [[1, 2]], "tolerance": TOLERANCE,
    }  # fmt: skip
