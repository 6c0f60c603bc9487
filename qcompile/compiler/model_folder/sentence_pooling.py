"""The pooling that a sentence-transformers folder asks for: its modules behind the transformer.

``modules.json`` lists them in order, each with its folder. ``1_Pooling/config.json`` names the
pooling, by ``pooling_mode`` or, before version 6, by one true key ``pooling_mode_*``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qcompile.compiler.config.recipe import AUTO, Recipe, merge_settings
from qcompile.compiler.model_folder.layout import Folder
from qcompile.errors import ModelError
from qcompile.ir.pooling import KINDS

MODULES = "modules.json"
_OLD_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_OUTSIDE = (
    "give --pooling and --normalize yourself, and run what else the modules do outside the model"
)


def with_folder_pooling(recipe: Recipe, folder: Folder) -> Recipe:
    """The recipe with the folder's pooling in place of ``auto``; others as they are.

    Raises ModelError where the folder has none, or one that is not put into a graph.
    """
    if recipe.pooling != AUTO:
        return recipe
    modules = _json(folder, MODULES)
    if not isinstance(modules, list) or not all(isinstance(m, Mapping) for m in modules):
        raise ModelError(f"{MODULES} holds no list of modules")
    kind, normalize = "", recipe.normalize
    for module in modules:
        name = str(module.get("type", "")).rpartition(".")[2]
        if name == "Pooling" and not kind:
            kind = _kind(folder, f"{module.get('path', '')}/config.json")
        elif name == "Normalize" and kind:
            normalize = True
        elif name != "Transformer" or kind:
            raise ModelError(f"{MODULES} has a module {name!r}, which stays outside: {_OUTSIDE}")
    if not kind:
        raise ModelError(f"{MODULES} has no module 'Pooling': name one (--pooling mean)")
    return merge_settings(recipe, {"pooling": kind, "normalize": normalize}, MODULES)


def _kind(folder: Folder, name: str) -> str:
    """The one pooling that a configuration names."""
    config = _json(folder, name)
    if not isinstance(config, Mapping):
        raise ModelError(f"{name} holds no mapping of keys to values")
    if config.get("include_prompt") is False:
        raise ModelError(
            f"{name} leaves prompts out, which no graph can tell from text: {_OUTSIDE}"
        )
    given = config.get("pooling_mode")
    old = [kind for key, kind in _OLD_KEYS.items() if config.get(key) is True]
    kinds: list[Any] = given if isinstance(given, list) else old if given is None else [given]
    if len(kinds) != 1:
        found = " and ".join(map(str, kinds)) or "none"
        raise ModelError(f"{name} names {found}, expected one pooling: {_OUTSIDE}")
    if kinds[0] not in KINDS:
        raise ModelError(f"{name} names pooling {kinds[0]!r}, expected one of {', '.join(KINDS)}")
    return str(kinds[0])


def _json(folder: Folder, name: str) -> Any:
    """A file of the folder, whose links were checked."""
    if name not in folder.companions:
        raise ModelError(
            f"pooling auto needs {name!r} in folder {str(folder.path)!r}: name one (--pooling mean)"
        )
    try:
        return json.loads((folder.path / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ModelError(f"{name} cannot be read: {type(e).__name__}") from e
