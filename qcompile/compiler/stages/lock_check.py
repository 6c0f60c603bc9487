"""Checks before a locked build: whether the model and the data are those of the lock."""

from __future__ import annotations

from dataclasses import replace

from qcompile.compiler.config.lockfile import Lock
from qcompile.compiler.report.notes import Note
from qcompile.compiler.stages.models import FloatModel
from qcompile.compiler.stages.options import Request
from qcompile.data import feed_digest
from qcompile.data.feeds import Feeds
from qcompile.errors import RecipeError

# They decide which feeds a file gives.
DATA_OPTIONS = ("samples", "batch_size", "max_length", "text_columns")


def apply_lock(request: Request) -> Request:
    """The request of a locked build: no search, and without data neither verified nor timed.

    Instead its bytes are compared with the lock's, which were verified when the lock was written.
    Raises RecipeError for a light lock without data or with another ``--provider``, for one of a
    trained model, and for a lock with ``--tune`` or training.
    """
    options, locked, has_data = request.options, request.options.lock, request.data is not None
    if locked is None:
        return request
    if options.training is not None:
        raise RecipeError("training changes what a lock has fixed: give a recipe in its place")
    if locked.training is not None:
        raise RecipeError(
            "the lock is that of a trained model, whose weights are not in it: qcompile train, "
            "with the same model, texts, recipe and seed, makes it again"
        )
    if options.tune:
        raise RecipeError("--tune chooses what the lock has fixed already: give one of them")
    if locked.is_light and not has_data:
        raise RecipeError(
            "the lock holds no calibration: give the data that it was made with (sha256 "
            f"{_short((locked.data or {}).get('sha256'))}; {_choices(locked)}), or a "
            "full lock, which compile --lock writes"
        )
    _check_provider(locked, options.provider or "cpu")
    return replace(
        request,
        options=replace(
            options,
            search_time=0.0,
            verify=options.verify and has_data,
            bench=options.bench and has_data,
        ),
    )


def _check_provider(locked: Lock, choice: str) -> None:
    """Raises RecipeError for a light lock of ranges that another provider computed."""
    then = (locked.calibration or {}).get("provider", "cpu")
    if locked.is_light and choice != then:
        raise RecipeError(
            f"provider {choice!r}: the lock was calibrated on {then!r}, whose ranges differ in "
            f"their last bits: give --provider {then}, or a full lock, which compile --lock writes"
        )


def check_model(locked: Lock | None, model: FloatModel, name: str) -> list[Note]:
    """A note on changed versions or processors. Raises RecipeError for another model."""
    if locked is None:
        return []
    locked.check_model(model.digest, name)
    changes = "; ".join(locked.changes())
    text = f"the lock was made in another environment: {changes}"
    return [Note("lock-elsewhere", text)] if changes else []


def check_data(locked: Lock | None, digest: str | None, general_text: Feeds | None) -> None:
    """Raises RecipeError if a light lock was made with other data.

    The general text must be the same too: it is run in addition to data that is text, so the same
    tokens from a .npz file are not the same data.
    """
    if locked is None or not locked.is_light or locked.data is None:
        return
    for key, found in digests_of(digest, general_text).items():
        expected = locked.data.get(key)
        if found != expected:
            what = "data" if key == "sha256" else "general text that is run with the data"
            raise RecipeError(
                f"the {what} is not what was locked: sha256 {_short(found)}, expected "
                f"{_short(expected)}: give the data that it was made with ({_choices(locked)}), or "
                "a full lock, which compile --lock writes"
            )


def digests_of(digest: str | None, general_text: Feeds | None) -> dict[str, str | None]:
    """SHA-256 of the data and of the general text, as a lock stores them."""
    text = None if general_text is None else feed_digest.digest_feeds(general_text)
    return {"sha256": digest, "general_text": text}


def _short(digest: object) -> str:
    return "of none" if digest is None else f"{str(digest)[:12]}…"


def _choices(locked: Lock) -> str:
    """The options of the lock that decide which feeds a file gives."""
    options = []
    for key in DATA_OPTIONS:
        option, value = f"--{key.replace('_', '-')}", (locked.data or {}).get(key)
        options.append(f"no {option}" if value is None else f"{option} {value}")
    return f"{', '.join(options)}, text with the same --tokenizer"
