"""Discovery by folder and by entry point; unknown names and wrong options get a hint."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest

from qcompile.errors import RecipeError, TargetError
from qcompile.quant import Calibrator
from qcompile.rewriting import Pass, Stage, registry
from qcompile.rewriting.registry import build, calibrators, nearest, passes, target, targets
from qcompile.targets.cpu import CPU


@dataclass(frozen=True)
class Plugin:
    """A class with an option of each type, and one that refuses a value."""

    name = "plugin"
    count: int = 1
    share: float = 0.5
    word: str = "a"
    flag: bool = False

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count {self.count} is negative")


CLASSES = {"plugin": Plugin}


def test_all_files_of_the_folders_are_found() -> None:
    assert {"insert-qdq", "fuse-gelu", "fold-constants"} <= set(passes())
    assert set(calibrators()) == {"entropy", "minmax", "moving-average", "mse", "percentile"}
    assert targets()["cpu"] is CPU and "qdq" in targets()
    assert list(passes()) == sorted(passes())


@pytest.mark.parametrize("group", [passes, calibrators])
def test_names_are_spelled_like_their_files_and_classes_say_what_they_do(group: Any) -> None:
    for name, cls in group().items():
        assert issubclass(cls, Pass | Calibrator)
        assert cls.__module__.rsplit(".", 1)[-1] == name.replace("-", "_")
        assert (cls.__doc__ or "").strip()


def misplaced(classes: Iterable[type[Pass]]) -> list[str]:
    """Passes in the folder of another stage; ``insert-qdq`` is the first of those that lower."""
    folder = {Stage.INSERT: "lower"}
    return [
        f"{c.name} ({c.stage.name.lower()}): {c.__module__}"
        for c in classes
        if c.__module__.split(".")[2] != folder.get(c.stage, c.stage.name.lower())
    ]


def test_the_folder_of_a_pass_is_its_stage() -> None:
    assert misplaced(passes().values()) == []


def test_a_misplaced_pass_is_seen() -> None:
    stray = type("Stray", (passes()["fuse-gelu"],), {"stage": Stage.LOWER})
    stray.__module__ = "qcompile.passes.simplify.stray"
    assert misplaced([stray]) == ["fuse-gelu (lower): qcompile.passes.simplify.stray"]


def test_hints() -> None:
    assert nearest("fuse-gleu", ["fuse-gelu", "other"]) == ", did you mean 'fuse-gelu'?"
    assert nearest("zzz", ["one", "two"]) == ", expected one of: one, two"


def test_unknown_names() -> None:
    with pytest.raises(RecipeError, match="unknown pass 'fuse-gleu', did you mean 'fuse-gelu'"):
        build("pass", passes(), "fuse-gleu", {})
    with pytest.raises(RecipeError, match="unknown calibrator 'kl', expected one of: entropy, "):
        build("calibrator", calibrators(), "kl", {})
    with pytest.raises(TargetError, match="unknown target 'cup', did you mean 'cpu'"):
        target("cup")


def test_options_are_set() -> None:
    options = {"count": 3, "share": 1, "word": "b", "flag": True}
    assert build("thing", CLASSES, "plugin", options) == Plugin(3, 1, "b", True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cuont": 1}, "thing 'plugin' has no option 'cuont', did you mean 'count'"),
        ({"count": 1.5}, "option 'count' of thing 'plugin' is 1.5, expected int"),
        ({"count": True}, "is True, expected int"),
        ({"count": "3"}, "is '3', expected int"),
        ({"share": "x"}, "is 'x', expected float"),
        ({"share": True}, "is True, expected float"),
        ({"word": 3}, "is 3, expected str"),
        ({"flag": 1}, "is 1, expected bool"),
        ({"count": None}, "is None, expected int"),
        ({"count": -1}, "thing 'plugin': count -1 is negative"),
    ],
)
def test_wrong_options(options: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        build("thing", CLASSES, "plugin", options)


def test_a_class_without_options_says_so() -> None:
    with pytest.raises(RecipeError, match="has no option 'a', it has no options"):
        build("pass", passes(), "eliminate-identity", {"a": 1})


class Entry:
    """What importlib.metadata gives for an installed plugin."""

    def __init__(self, item: object) -> None:
        self.item = item

    def load(self) -> object:
        return self.item


def test_plugins_are_found_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda group: [Entry(Plugin)])
    assert passes.__wrapped__()["plugin"] is Plugin  # type: ignore[comparison-overlap]
    assert calibrators.__wrapped__()["plugin"] is Plugin  # type: ignore[comparison-overlap]


def test_a_clash_of_names_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [Entry(passes()["fuse-gelu"])]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries)
    with pytest.raises(RecipeError, match="pass 'fuse-gelu' is registered twice"):
        passes.__wrapped__()
