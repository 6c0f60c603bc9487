"""The gates on accuracy: the compiled bytes in a fresh session, against the float model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qcompile.compiler.report.notes import RANDOM_MODEL, Note, coded_note
from qcompile.compiler.report.records import SaturationAccount
from qcompile.compiler.stages import saturation_check
from qcompile.compiler.stages.prepare import Prepared
from qcompile.compiler.stages.rewrite import Rewritten
from qcompile.data.feeds import Feed
from qcompile.data.synthetic import synthetic_feeds
from qcompile.errors import DataError, ModelError
from qcompile.quant import Array
from qcompile.runtime import session as runtime
from qcompile.runtime.evaluation import closeness
from qcompile.runtime.evaluation.batch_invariance import Invariance, invariance
from qcompile.runtime.evaluation.closeness import Verdict
from qcompile.runtime.evaluation.float16_emulation import rounding_form
from qcompile.runtime.evaluation.user_metric import measure
from qcompile.runtime.session import Session, SessionOptions
from qcompile.system.memory import release_memory

_SYNTHETIC_FEEDS = 4


@dataclass(frozen=True)
class Verified:
    """A compiled model, and how close it is.

    feeds: what it was compared on, or is to be timed on; empty where nothing was asked for.
    operators: counts of what the provider runs. verdict: None where it was not compared.
    """

    rewritten: Rewritten
    feeds: list[Feed]
    operators: dict[str, int]
    saturation: SaturationAccount
    verdict: Verdict | None = None
    notes: tuple[Note, ...] = ()
    failures: tuple[str, ...] = ()

    @property
    def prepared(self) -> Prepared:
        return self.rewritten.prepared

    @property
    def held_out(self) -> list[Feed]:
        """Data to measure on; empty without data."""
        return self.rewritten.calibrated.held_out.feeds


@dataclass
class _Account:
    """What comes up in the course of one verification."""

    notes: list[Note] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def note(self, code: str, text: str) -> None:
        self.notes.append(Note(code, text))


def verify(rewritten: Rewritten) -> Verified:
    """Compare the compiled model with the float one.

    Raises ModelError where ONNX Runtime cannot load or run what was compiled.
    """
    prepared, account = rewritten.prepared, _Account()
    options = prepared.options
    operators = _operators(rewritten, account)
    release_memory()
    with prepared.stopwatch.stage("saturation"):
        sums = saturation_check.Sums(rewritten.compiled.path, prepared.recipe.isa)
    feeds: list[Feed] = []
    if options.verify or options.bench:
        feeds = _feeds(rewritten, account)
    elif options.lock is None:
        account.note("not-verified", "not verified and not timed, as asked")
    verdict = None
    if feeds and options.verify:
        verdict = _verdict(rewritten, feeds, sums, account)
    elif feeds:
        account.note("not-verified", "not verified (--no-verify)")
    with prepared.stopwatch.stage("saturation"):
        looked = feeds[0] if feeds and options.verify else None
        saturation = saturation_check.saturation_account(sums, looked, verdict, options.threads)
    if saturation.advice:
        account.note("saturation", saturation.advice)
    return Verified(
        rewritten,
        feeds,
        dict(sorted(operators.items())),
        saturation,
        verdict,
        tuple(account.notes),
        tuple(account.failures),
    )


def _operators(rewritten: Rewritten, account: _Account) -> Counter[str]:
    """What the target's provider runs; what was written where that provider is missing."""
    prepared, compiled = rewritten.prepared, rewritten.compiled
    if not prepared.provider_missing:
        return runtime.optimized_ops(compiled.path, prepared.provider)
    Session(compiled.path, _options(prepared))  # says what is wrong with a model
    account.note(
        "provider-missing",
        f"{prepared.target.provider} is not installed here: answers are those of the graph as "
        f"written, float16 rounded where it is stored, run by {prepared.provider}",
    )
    return runtime.written_ops(compiled.parsed[0])


def _options(prepared: Prepared, *, compiled: bool = True) -> SessionOptions:
    """How a model runs for its answers: without its provider as written, for no fusion of another
    provider to change them."""
    as_written = compiled and prepared.provider_missing
    threads, provider = prepared.options.threads, prepared.provider
    return SessionOptions(threads, optimize=not as_written, provider=provider)


def _feeds(rewritten: Rewritten, account: _Account) -> list[Feed]:
    """Held-out feeds; without data, made-up ones, which the report says.

    Raises DataError where those are over the memory budget.
    """
    prepared, held_out = rewritten.prepared, rewritten.calibrated.held_out.feeds
    if held_out:
        return held_out
    try:
        feeds = synthetic_feeds(prepared.graph, {}, _SYNTHETIC_FEEDS, prepared.recipe.seed)
    except (DataError, ModelError) as e:
        return _none(account, e)
    prepared.budget.check(feeds)
    try:
        Session(prepared.float_model.running).run(feeds[0])
    except (DataError, ModelError) as e:  # a float model that fails says nothing of ours
        return _none(account, e)
    account.note(
        "made-up-inputs", "verified on made-up inputs: give --data for a verdict that counts"
    )
    return feeds


def _none(account: _Account, why: Exception) -> list[Feed]:
    account.note("not-verified", f"not verified, give --data: made-up inputs do not do: {why}")
    return []


def _verdict(
    rewritten: Rewritten, feeds: list[Feed], sums: saturation_check.Sums, account: _Account
) -> Verdict | None:
    prepared = rewritten.prepared
    prepared.progress.step("verify", (1 + len(sums.kinds)) * len(feeds))
    with prepared.stopwatch.stage("verify"):
        # One session at a time: the float model's outputs are kept, then the compiled one runs.
        reference = Session(prepared.float_model.running, _options(prepared, compiled=False))
        old = list(_outputs(prepared, reference, feeds))
        del reference
        release_memory()  # or the next session's weights come on top of this one's
        try:
            verdict = saturation_check.judge_by_sums(
                sums, lambda kind: _judged(prepared, sums, feeds, old, kind)
            )
        except DataError as e:
            if rewritten.calibrated.held_out.feeds and rewritten.quantized:
                raise DataError(f"{e} (--no-verify compiles without comparing)") from e
            account.note("not-verified", f"not verified: {e}")
            return None
    if verdict.failures and not _repeats(rewritten, old, feeds):
        account.notes.append(coded_note(RANDOM_MODEL))
        return None
    for text in saturation_check.unemulated_notes(verdict):
        account.note("not-emulated", text)
    dependent = Invariance(verdict.alone, verdict.padded).note
    if dependent is not None:
        account.note("batch-dependent", dependent)
    account.failures += verdict.failures
    return verdict


def _judged(
    prepared: Prepared,
    sums: saturation_check.Sums,
    feeds: list[Feed],
    old: list[dict[str, Array]],
    kind: str,
) -> Verdict:
    """The compiled model by one kind of sums, against outputs of the float model."""
    runner, metric = _runner(prepared, sums, kind), prepared.options.metric
    new = _outputs(prepared, runner, feeds)
    if metric is not None:
        new = iter(kept := list(new))
    verdict = closeness.judge(zip(old, new, feeds, strict=True), prepared.gates)
    if metric is not None:
        was, now = (measure(metric, feeds, made) for made in (old, kept))
        verdict.measured(was, now, prepared.gates)
    return invariance(runner.run, feeds).on(runner.on(verdict))


def _runner(prepared: Prepared, sums: saturation_check.Sums, kind: str) -> saturation_check.Runner:
    """The compiled model in a session with one kind of sums."""
    options = _options(prepared)
    if not prepared.provider_missing:
        return sums.runner(kind, options)
    assert isinstance(sums.model, Path)
    emulated = Session(rounding_form(sums.model.read_bytes()), options)
    return saturation_check.Runner(emulated, options.entries)


def _repeats(rewritten: Rewritten, old: list[dict[str, Array]], feeds: list[Feed]) -> bool:
    """False where the float model misses the gates against itself: it draws random numbers.

    Fresh sessions start with the same seed, so one runs everything twice. Equal answers repeat,
    whatever the gates: some cannot be reached at all. Where nothing was quantized nothing less than
    equal will do, of ``old`` too: some operators answer by what their memory held before.
    """
    prepared, quantized = rewritten.prepared, rewritten.quantized
    session = Session(prepared.float_model.running, _options(prepared, compiled=False))
    first, second = ([session.run(feed) for feed in feeds] for _ in range(2))
    if _equal(first, second) and (quantized or _equal(old, first)):
        return True
    made = zip(first, second, feeds, strict=True)
    return quantized and closeness.judge(made, prepared.gates).passed


def _equal(first: list[dict[str, Array]], second: list[dict[str, Array]]) -> bool:
    """True where all arrays are the same, NaN and all; sequences, maps and text say no."""
    pairs = zip(first, second, strict=True)
    return all(
        isinstance(x, np.ndarray) and x.dtype != object and x.tobytes() == b[name].tobytes()
        for a, b in pairs
        for name, x in a.items()
    )


def _outputs(
    prepared: Prepared, session: Session | saturation_check.Runner, feeds: list[Feed]
) -> Iterator[dict[str, Array]]:
    for feed in feeds:
        yield prepared.budget.kept(session.run(feed))
        prepared.progress.advance()
