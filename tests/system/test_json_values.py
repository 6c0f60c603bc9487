"""Records become JSON by the keys that they name, and come back from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pytest

from qcompile.system.json_values import Record, Unbounded, from_json, json_value, members


class Pair(NamedTuple):
    a: int
    b: int


@dataclass(frozen=True)
class Point:
    x: float
    label: str | None = None


@dataclass(frozen=True)
class Shape(Record):
    """All forms of keys."""

    points: tuple[Point, ...]
    kind: Literal["open", "closed"]
    lows: list[int] = field(default_factory=list)
    origin: Point | None = None
    note: str | None = None
    error: Unbounded = 0.0

    JSON = members("points kind from=lows origin{} note? size first=origin.x? error **tail")

    @property
    def size(self) -> int:
        return len(self.points)

    @property
    def tail(self) -> Pair:
        return Pair(1, 2)


@dataclass(frozen=True)
class Kept(Record):
    points: Annotated[tuple[Point, ...], "all"]
    kind: Literal["open", "closed"] = "open"
    lows: list[int] | None = None

    JSON = members("points kind from=lows")


def test_keys_are_those_that_a_record_names() -> None:
    shape = Shape((Point(1.0),), "open", [3], Point(0.5, "o"), error=float("inf"))
    assert shape.to_dict() == {
        "points": [{"x": 1.0, "label": None}],
        "kind": "open",
        "from": [3],
        "origin": {"x": 0.5, "label": "o"},
        "size": 1,
        "first": 0.5,
        "error": None,
        "a": 1,
        "b": 2,
    }


def test_what_is_none_is_null_or_an_empty_object_or_left_out() -> None:
    @dataclass
    class Optional(Record):
        a: int | None = None
        b: Point | None = None
        c: int | None = None

        JSON = members("a b{} c?")

    assert json_value(Optional()) == {"a": None, "b": {}}


def test_other_values() -> None:
    found = {1: (float("nan"), Path("a/b")), "p": Pair(1, 2)}
    assert json_value(found) == {"1": [None, "a/b"], "p": {"a": 1, "b": 2}}


def test_records_come_back() -> None:
    kept = Kept((Point(1.0, "p"), Point(2.0)), "closed", [1, 2])
    assert from_json(Kept, kept.to_dict()) == kept
    assert from_json(Kept, {"points": [{"x": 1}], "new": 3}) == Kept((Point(1),))


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"points": 3},
        {"points": ["x"]},
        {"points": [{"x": "1"}]},
        {"points": [{}]},
        {"points": [], "kind": 1},
        [],
        3,
    ],
)
def test_what_is_no_record_is_an_error(value: Any) -> None:
    with pytest.raises(TypeError):
        from_json(Kept, value)
