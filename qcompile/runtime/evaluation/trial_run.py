"""Whether a model takes a feed, found by running it; feeds made such that it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

from qcompile.data.feeds import Feed, input_specs
from qcompile.data.synthetic import DEFAULT_LENGTH, guessed_lengths, synthetic_feeds
from qcompile.data.text import Takes
from qcompile.errors import DataError, ModelError
from qcompile.ir import Graph
from qcompile.runtime.session import CPU, Session, SessionOptions
from qcompile.system.memory import release_memory


def trial_run(model: Callable[[], bytes | Path], threads: int = 0) -> Takes:
    """A function that runs a feed; its result is None, or the error that it met.

    The model is read and loaded by the first call, once, and lives as long as the function.
    """

    @cache
    def loaded() -> Session | ModelError:
        try:
            return Session(model(), SessionOptions(threads=threads, optimize=False))
        except ModelError as e:
            return e

    def takes(feed: Feed) -> ModelError | None:
        session = loaded()
        if isinstance(session, ModelError):
            return session
        try:
            session.run(feed)
        except ModelError as e:
            return e
        return None

    return takes


def made_up_feeds(
    graph: Graph,
    model: bytes | Path,
    dims: Mapping[str, int],
    count: int = 1,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    provider: str = CPU,
) -> list[Feed]:
    """Made-up inputs of 128 tokens, or of half as many until the model takes them.

    A position table may have fewer than 128 rows. Sizes that ``dims`` and ``shapes`` give stay, and
    where they give all, nothing is run. Raises DataError as ``synthetic_feeds`` does, and where the
    model runs at no length, ModelError where it cannot be loaded.
    """

    def made(length: int) -> list[Feed]:
        return synthetic_feeds(graph, dims, count, 0, shapes=shapes, length=length)

    guessed = guessed_lengths(input_specs(graph), dims, shapes or {})
    if not guessed:
        return made(DEFAULT_LENGTH)
    feeds, error = _longest_taken(model, made, provider)
    release_memory()  # else the weights of the first timed model come in addition
    if feeds:
        return feeds
    name, dim = guessed[0]
    option = f"--shape {name}=..." if dim == "?" else f"--dim {dim}=N"
    raise DataError(
        f"random inputs of {DEFAULT_LENGTH} tokens or fewer do not run: {error}; give the sizes "
        f"({option}) or real inputs (--data)"
    )


def _longest_taken(
    model: bytes | Path, made: Callable[[int], list[Feed]], provider: str
) -> tuple[list[Feed], ModelError | None]:
    """Feeds of 128, 64, … 1 tokens, the first that the model takes; and its error at 128 tokens."""
    session = Session(model, SessionOptions(provider=provider, exact=False))
    longest: ModelError | None = None
    length = DEFAULT_LENGTH
    while length:
        feeds = made(length)
        try:
            session.run(feeds[0])
        except ModelError as e:
            longest, length = longest or e, length // 2
        else:
            return feeds, longest
    return [], longest
