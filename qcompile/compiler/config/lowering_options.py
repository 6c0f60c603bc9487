"""The lowering options that a recipe chooses (its key ``forms``), and the resulting passes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from qcompile.compiler.config.recipe import Recipe
from qcompile.errors import RecipeError
from qcompile.planning.context import Attention
from qcompile.rewriting.registry import nearest
from qcompile.targets.target import LoweringChoice, LoweringOption, Mode, Target

_BETWEEN_PASSES = re.compile(r",(?![^{}]*\})")  # a comma that is not between options


def chosen_options(target: Target, mode: Mode, recipe: Recipe) -> list[LoweringChoice]:
    """The recipe's choices that are not the target's own, in the target's order.

    Raises RecipeError: unknown option or choice, a choice of another mode, or a pipeline too.
    """
    if recipe.forms and recipe.pipeline:
        raise RecipeError(
            "a recipe cannot have both forms and pipeline: a pipeline already fixes all passes"
        )
    remaining, choices = dict(recipe.forms), []
    for option in target.forms:
        name = remaining.pop(option.name, option.own)
        known = (option.own, *option.others)
        if name not in known:
            hint = nearest(name, known)
            raise RecipeError(f"unknown choice {name!r} of lowering option {option.name!r}{hint}")
        if name == option.own:
            continue
        if not _applies(option.others[name], target, mode):
            raise RecipeError(
                f"lowering option {option.name!r} has no choice {name!r} in mode {mode!r}"
            )
        choices.append(option.others[name])
    for name in remaining:
        names = [option.name for option in target.forms]
        hint = nearest(name, names) if names else f": target {target.name!r} has none"
        raise RecipeError(f"unknown lowering option {name!r}{hint}")
    return choices


def lowering_passes(target: Target, mode: Mode, choices: Sequence[LoweringChoice]) -> list[str]:
    """Pipeline strings of the lowering: the target's passes, or what the choices put instead.

    Choices are applied one after another: a later one may replace what an earlier one put.
    """
    placed = list(target.lower[mode])
    for choice in choices:
        placed = [new for old in placed for new in _items(choice.instead.get(old, old))]
    return placed


def _items(pipeline: str) -> list[str]:
    """The passes of a pipeline string, each with its options."""
    return [item for item in _BETWEEN_PASSES.split(pipeline) if item]


def chosen_attention(choices: Sequence[LoweringChoice]) -> Attention | None:
    """Which matrix multiplications of attention run in int8; None if no choice decides that."""
    return next((c.attention for c in choices if c.attention), None)


def other_recipes(
    target: Target, mode: Mode, option: LoweringOption, recipe: Recipe
) -> Iterator[tuple[str, Recipe]]:
    """(choice, recipe) for each choice of an option in a mode, other than the recipe's."""
    others = tuple((n, c) for n, c in recipe.forms if n != option.name)
    current = dict(recipe.forms).get(option.name, option.own)
    if current != option.own:
        yield option.own, replace(recipe, forms=others)
    for name, choice in option.others.items():
        if name != current and _applies(choice, target, mode):
            yield name, replace(recipe, forms=(*others, (option.name, name)))


def _applies(choice: LoweringChoice, target: Target, mode: Mode) -> bool:
    replaces = not choice.instead or any(name in target.lower[mode] for name in choice.instead)
    return mode in choice.modes and replaces
