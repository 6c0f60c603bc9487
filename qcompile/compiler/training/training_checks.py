"""What excludes training, found before any work."""

from __future__ import annotations

from importlib.util import find_spec

from qcompile.compiler.stages.options import ONE_FILE, Request
from qcompile.compiler.stages.prepare import Prepared
from qcompile.data.text import FORMATS
from qcompile.errors import DataError, RecipeError, TrainingError

INSTALL = "pip install -e '.[train]' in a checkout"
MODES = ("static", "weight-only")


def check_request(request: Request) -> None:
    """Raise RecipeError for options that exclude training, TrainingError where torch is missing."""
    options = request.options
    if options.training is None:
        return
    excluded = {
        "--tune": options.tune,
        "--max-size": options.max_size is not None,
        "the search for precision (--search-time)": options.search_time > 0,
    }
    for what, given in excluded.items():
        if given:
            raise RecipeError(
                f"{what} compiles many models, and training is of one: search first, by compile, "
                "and give train the recipe that was found"
            )
    if find_spec("torch") is None:
        raise TrainingError(f"training needs torch: {INSTALL}")
    if options.training.data.suffix.lower() not in FORMATS:
        raise DataError(
            f"training data {str(options.training.data)!r}: expected {', '.join(FORMATS)}; "
            f"{ONE_FILE}"
        )


def check_prepared(prepared: Prepared) -> None:
    """Raise RecipeError for a mode that cannot be trained, DataError where texts cannot be read."""
    options = prepared.options
    if options.training is None:
        return
    if prepared.mode not in MODES:
        why = {
            "dynamic": "takes each range from the data of a run, so there is none to train",
            "float": "quantizes nothing",
        }[prepared.mode]
        raise RecipeError(f"mode {prepared.mode} {why}: train in mode static")
    if prepared.request.tokenizer is None:
        raise DataError("training reads text: give --tokenizer, a folder holding tokenizer.json")
    if prepared.unknown_operator:
        raise TrainingError(f"operator {prepared.unknown_operator} is unknown, so not trained")
