"""What to build, as a frozen, checked value: from a YAML file, options, or both.

Unknown keys are an error with the nearest known one; the digest identifies the recipe in reports
and in the compiled model's metadata.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from qcompile.api import MODES, Calibrator, Mode
from qcompile.errors import RecipeError
from qcompile.pipeline import parse_items
from qcompile.registry import build, calibrators, nearest


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the compiled model will be, apart from model and data.

    mode: None is static with data, dynamic without. pipeline: "" is the target's own.
    transforms: passes between calibration and insertion, "" is the target's own, "none" is none.
    calibrator: a name with options, ``percentile{percentile=99.9}``. mask_padding: positions that
    attention_mask marks as padding do not count.
    """

    target: str = "cpu"
    mode: Mode | None = None
    calibrator: str = "minmax"
    pipeline: str = ""
    transforms: str = ""
    keep_float: tuple[str, ...] = ()
    mask_padding: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode is not None and self.mode not in MODES:
            raise RecipeError(f"unknown mode {self.mode!r}{nearest(self.mode, MODES)}")
        if self.seed < 0:
            raise RecipeError(f"seed is {self.seed}, expected 0 or more")

    def digest(self) -> str:
        """Short hash over all settings."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def make_calibrator(self) -> Calibrator:
        """The calibrator with its options. Raises RecipeError on unknown names or options."""
        items = parse_items(self.calibrator, "calibrator")
        if len(items) != 1:
            raise RecipeError(f"one calibrator expected, found {self.calibrator!r}")
        return build("calibrator", calibrators(), *items[0])


_TYPES: dict[str, tuple[type, str]] = {
    "target": (str, "a name"),
    "mode": (str, "a name"),
    "calibrator": (str, "a name"),
    "pipeline": (str, "a pipeline string"),
    "transforms": (str, "a pipeline string"),
    "keep_float": (list, "a list of patterns"),
    "mask_padding": (bool, "true or false"),
    "seed": (int, "a whole number"),
}


def read(source: str | Path) -> Recipe:
    """A recipe file. Raises RecipeError: not there, not YAML, unknown key, wrong type."""
    path = Path(source)
    try:
        loaded = yaml.safe_load(path.read_text())
    except OSError as e:
        raise RecipeError(f"recipe {str(path)!r} cannot be read: {e.strerror}") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        first = str(e).splitlines()[0]
        raise RecipeError(f"recipe {str(path)!r} is not YAML: {first}") from e
    if not isinstance(loaded, dict):
        raise RecipeError(f"recipe {str(path)!r} holds no mapping of keys to values")
    return merged(Recipe(), loaded, f"recipe {str(path)!r}")


def merged(base: Recipe, settings: Mapping[str, Any], where: str) -> Recipe:
    """``base`` with some settings replaced; None leaves one as it is."""
    known = [f.name for f in fields(Recipe)]
    changes: dict[str, Any] = {}
    for raw, value in settings.items():
        key = str(raw).replace("-", "_")
        if key not in known:
            raise RecipeError(f"{where} has unknown key {str(raw)!r}{nearest(key, known)}")
        if value is None:
            continue
        kind, expected = _TYPES[key]
        if isinstance(value, tuple):
            value = list(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise RecipeError(f"{where}: {key} is {value!r}, expected {expected}")
        changes[key] = tuple(map(str, value)) if isinstance(value, list) else value
    return replace(base, **changes)
