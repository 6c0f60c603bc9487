"""Which of the target's forms a recipe asks for, and what that makes of lowering."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from qcompile.compiler.config.recipe import Recipe
from qcompile.errors import RecipeError
from qcompile.planning.context import Attention
from qcompile.rewriting.registry import nearest
from qcompile.targets.target import LoweringChoice, LoweringOption, Mode, Target


def chosen_options(target: Target, mode: Mode, recipe: Recipe) -> list[LoweringChoice]:
    """The recipe's choices other than the target's own ways, in the target's order.

    Raises RecipeError: an unknown form or choice, one of another mode, a pipeline beside it.
    """
    if recipe.forms and recipe.pipeline:
        raise RecipeError("forms and a pipeline contradict each other: a pipeline is all there is")
    wanted, found = dict(recipe.forms), []
    for form in target.forms:
        name = wanted.pop(form.name, form.own)
        known = (form.own, *form.others)
        if name not in known:
            hint = nearest(name, known)
            raise RecipeError(f"unknown choice {name!r} of form {form.name!r}{hint}")
        if name == form.own:
            continue
        if not _applies(form.others[name], target, mode):
            raise RecipeError(f"form {form.name!r} has no choice {name!r} in mode {mode!r}")
        found.append(form.others[name])
    for name in wanted:
        names = [form.name for form in target.forms]
        hint = nearest(name, names) if names else f": target {target.name!r} has none"
        raise RecipeError(f"unknown form {name!r}{hint}")
    return found


def lowering_passes(target: Target, mode: Mode, choices: Sequence[LoweringChoice]) -> list[str]:
    """Pipelines that lowering consists of: passes, or what stands in their place."""
    instead: dict[str, str] = {}
    for choice in choices:
        instead |= choice.instead
    placed = (instead.get(name, name) for name in target.lower[mode])
    return [passes for passes in placed if passes]


def chosen_attention(choices: Sequence[LoweringChoice]) -> Attention | None:
    """Which products of attention run in integers, None where no choice says."""
    return next((c.attention for c in choices if c.attention), None)


def other_recipes(
    target: Target, mode: Mode, form: LoweringOption, recipe: Recipe
) -> Iterator[tuple[str, Recipe]]:
    """(choice, recipe) for each way of a form that a mode has, other than the recipe's."""
    kept = tuple((n, c) for n, c in recipe.forms if n != form.name)
    current = dict(recipe.forms).get(form.name, form.own)
    if current != form.own:
        yield form.own, replace(recipe, forms=kept)
    for name, choice in form.others.items():
        if name != current and _applies(choice, target, mode):
            yield name, replace(recipe, forms=(*kept, (form.name, name)))


def _applies(choice: LoweringChoice, target: Target, mode: Mode) -> bool:
    replaces = not choice.instead or any(name in target.lower[mode] for name in choice.instead)
    return mode in choice.modes and replaces
