"""Before a locked build: is it the same model, and are these the same data?"""

from __future__ import annotations

from dataclasses import replace

from qcompile.compiler.config.lockfile import Lock
from qcompile.compiler.report.notes import Note
from qcompile.compiler.stages.models import FloatModel
from qcompile.compiler.stages.options import Request
from qcompile.data import feed_digest
from qcompile.data.feeds import Feeds
from qcompile.errors import RecipeError

DATA_OPTIONS = ("samples", "batch_size")  # they decide which feeds a file gives


def fitted(request: Request) -> Request:
    """What a locked build is done with: nothing is searched, and without data nothing is judged.

    Its bytes are compared instead: the same bytes have been verified when they were locked. Raises
    RecipeError where the lock is a light one and there is no data, or forms are to be tuned.
    """
    options, locked, judged = request.options, request.options.lock, request.data is not None
    if locked is None:
        return request
    if options.tune:
        raise RecipeError("--tune chooses anew what a lock has fixed: give one of them")
    if locked.is_light and not judged:
        raise RecipeError(
            "the lock keeps no calibration: give the data that it was made with (sha256 "
            f"{_short((locked.data or {}).get('sha256'))}; {_choices(locked)}), or a "
            "full lock, which compile --lock writes"
        )
    return replace(
        request,
        options=replace(
            options,
            search_time=0.0,
            verify=options.verify and judged,
            bench=options.bench and judged,
        ),
    )


def check_model(locked: Lock | None, model: FloatModel, name: str) -> list[Note]:
    """What else changed. Raises RecipeError where the model is another one."""
    if locked is None:
        return []
    locked.check_model(model.digest, name)
    changes = "; ".join(locked.changes())
    return [Note("lock-elsewhere", f"the lock was made elsewhere: {changes}")] if changes else []


def check_data(locked: Lock | None, digest: str | None, general_text: Feeds | None) -> None:
    """Raises RecipeError where a light lock was made with other data than this.

    General text counts: it is run in addition to data that is text, so tokens in another form do
    not do.
    """
    if locked is None or not locked.is_light or locked.data is None:
        return
    for key, found in digests_of(digest, general_text).items():
        expected = locked.data.get(key)
        if found != expected:
            what = "data" if key == "sha256" else "general text beside the data"
            raise RecipeError(
                f"the {what} is not what was locked: sha256 {_short(found)}, expected "
                f"{_short(expected)}: give the data that it was made with ({_choices(locked)}), or "
                "a full lock, which compile --lock writes"
            )


def digests_of(digest: str | None, general_text: Feeds | None) -> dict[str, str | None]:
    """What calibration saw."""
    text = None if general_text is None else feed_digest.digest_feeds(general_text)
    return {"sha256": digest, "general_text": text}


def _short(digest: object) -> str:
    return "of none" if digest is None else f"{str(digest)[:12]}…"


def _choices(locked: Lock) -> str:
    """Options that decide which feeds a file gives."""
    said = []
    for key in DATA_OPTIONS:
        option, value = f"--{key.replace('_', '-')}", (locked.data or {}).get(key)
        said.append(f"no {option}" if value is None else f"{option} {value}")
    return f"{', '.join(said)}, text with the same --tokenizer"
