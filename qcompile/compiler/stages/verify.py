"""The gates on accuracy: the compiled bytes in a fresh session, against the float model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import onnx

from qcompile.compiler.report import ledger
from qcompile.compiler.report.ledger import LedgerRow
from qcompile.compiler.report.notes import RANDOM_MODEL, Note, coded_note
from qcompile.compiler.report.records import SaturationAccount
from qcompile.compiler.stages import saturation_check
from qcompile.compiler.stages.prepare import Prepared
from qcompile.compiler.stages.rewrite import Rewritten
from qcompile.data.feeds import Feed, first_sample, is_floating
from qcompile.data.synthetic import synthetic_feeds
from qcompile.errors import DataError, ModelError
from qcompile.ir import is_float, rank
from qcompile.ir.model_io import read_model
from qcompile.quant import Array
from qcompile.runtime import session as runtime
from qcompile.runtime.evaluation import closeness, other_sizes
from qcompile.runtime.evaluation.batch_invariance import Invariance, invariance
from qcompile.runtime.evaluation.closeness import Verdict
from qcompile.runtime.evaluation.compared_outputs import ComparedModels, compared_models
from qcompile.runtime.evaluation.float16_emulation import rounding_form
from qcompile.runtime.evaluation.user_metric import measure
from qcompile.runtime.session import Session, SessionOptions
from qcompile.system.memory import release_memory

_FUSED = "com.microsoft.MatMulNBits"
_EMULATED = (
    "float16: ONNX Runtime's CPU provider computes it in float32, with casts in between, so expect "
    "a smaller file and no more speed here; outputs were compared as it runs here, and with every "
    "float16 result rounded, as on processors that compute in float16, and the worse is reported"
)
_SYNTHETIC_FEEDS = 4
_TRIAL_SAMPLES = 2  # of a feed whose sizes are changed
_IMAGE_SIZES = (64, 224)
_TEXT_LENGTHS = (512, 256, 128)  # of which the longest that the float model takes is run


@dataclass(frozen=True)
class Verified:
    """A compiled model, and how close its outputs are to the float model's.

    feeds: used to compare, and later to time; empty if neither was asked for. operators: number of
    nodes that the provider runs, by operator. ledger: with what becomes of constants in a run.
    verdict: None if it was not compared.
    """

    rewritten: Rewritten
    feeds: list[Feed]
    operators: dict[str, int]
    saturation: SaturationAccount
    ledger: list[LedgerRow]
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


@dataclass(frozen=True)
class _LongerText:
    """A feed of ``length`` tokens, more than the ``verified_at`` of the data, and the float model's
    outputs."""

    verified_at: int
    length: int
    feed: Feed
    outputs: dict[str, Array]


@dataclass
class _Account:
    """Notes and failures of one verification."""

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
    sums, run_graph = rewritten.sums, _run_graph(rewritten, account)
    parsed = rewritten.compiled.parsed[0]
    release_memory()
    feeds: list[Feed] = []
    if prepared.unknown_operator:
        missing = f"operator {prepared.unknown_operator} needs its library (--custom-ops LIBRARY)"
        account.note("not-verified", f"not verified and not timed: {missing}")
    elif options.verify or options.bench:
        feeds = _feeds(rewritten, account)
    elif options.lock is None:
        account.note("not-verified", "not verified and not timed, as requested")
    verdict = None
    if feeds and options.verify:
        verdict = _verdict(rewritten, feeds, sums, account)
    elif feeds:
        account.note("not-verified", "not verified (--no-verify)")
    with prepared.stopwatch.stage("saturation"):
        feed = feeds[0] if feeds and options.verify else None
        # A model that came in quantized is compared with itself, with the same sums.
        measured = None if rewritten.brought_alone else verdict
        saturation = saturation_check.saturation_account(
            sums, feed, measured, rewritten.ledger, options.threads
        )
    if saturation.advice:
        account.note("saturation", saturation.advice)
    for text in saturation_check.same_notes(measured):
        account.note("same-sums", text)
    return Verified(
        rewritten,
        feeds,
        dict(sorted(runtime.count_ops(run_graph or parsed.graph).items())),
        saturation,
        ledger.with_uses(rewritten.ledger, parsed, run_graph),
        verdict,
        tuple(account.notes),
        tuple(account.failures),
    )


def check_sizes(verified: Verified) -> list[Note]:
    """Run what was written at other sizes than those of the data, in every mode.

    Returns a note on how close longer text is, if ranges were calibrated on text. Raises ModelError
    where the compiled model fails at sizes at which the float model runs. Builds that a lock
    repeats without data were checked when they were locked.
    """
    prepared, options = verified.prepared, verified.prepared.options
    if options.lock is not None and not (options.verify or options.bench):
        return []
    if prepared.unknown_operator:
        return []  # neither model runs here
    with prepared.stopwatch.stage("other sizes"):
        feeds = list(_trial_feeds(verified))
        if not feeds:
            return []
        reference = Session(prepared.float_model.running, _options(prepared, compiled=False))
        feeds = other_sizes.feeds_that_run(reference.run, feeds)
        longer = _longer_text(verified, reference)
        del reference
        release_memory()
        compiled = Session(verified.rewritten.compiled.path, _options(prepared))
        other_sizes.check_runs(compiled.run, feeds)
        return [] if longer is None else _closeness_of(verified, longer, compiled)


def _longer_text(verified: Verified, reference: Session) -> _LongerText | None:
    """Text longer than the data, if ranges were calibrated on text and the float model takes it."""
    prepared, ranges = verified.prepared, verified.rewritten.calibrated.account
    if verified.verdict is None or ranges is None:
        return None
    graph = prepared.graph
    verified_at = max((other_sizes.longest_text(graph, f) for f in verified.held_out), default=0)
    for length in (n for n in _TEXT_LENGTHS if 0 < verified_at < n):
        feed = other_sizes.longer_text(graph, first_sample(verified.held_out[0]), length)
        with suppress(DataError, ModelError):  # over the memory limit, or no position for a token
            (part,) = prepared.budget.parts(feed)
            return _LongerText(verified_at, length, part, reference.run(part))
    return None


def _closeness_of(verified: Verified, longer: _LongerText, compiled: Session) -> list[Note]:
    """The note on longer text; none where the outputs have nothing to compare."""
    gate = verified.prepared.gates.min_cosine
    new = compiled.run(longer.feed)
    try:
        verdict = closeness.judge([(longer.outputs, new, longer.feed)], closeness.Gates())
    except DataError:
        return []
    worst = min(verdict.outputs, key=lambda o: o.mean_cosine, default=None)
    if worst is None:
        return []
    text = (
        f"the texts verified have up to {longer.verified_at} tokens; at {longer.length} tokens, "
        f"made by repetition, the cosine of output {worst.name!r} is {worst.mean_cosine:.4f}"
    )
    if gate is not None and worst.mean_cosine < gate:
        text += (
            f", below {gate:g} (--min-cosine): calibrate on texts as long as yours (--data, "
            "--max-length)"
        )
    return [Note("longer-text", text)]


def _trial_feeds(verified: Verified) -> Iterator[Feed]:
    """Feeds of other sizes than those of the data, or of several sizes, within the memory limit."""
    prepared = verified.prepared
    feeds = (verified.feeds or verified.held_out)[:1]
    if feeds and prepared.budget.divisible:
        feeds = [{name: values[:_TRIAL_SAMPLES] for name, values in feeds[0].items()}]
    for feed in feeds or _made_up(prepared):
        for resized in (feed, *other_sizes.resized_feeds(prepared.graph, feed)):
            with suppress(DataError):  # over the memory limit
                yield from prepared.budget.parts(resized)


def _made_up(prepared: Prepared) -> Iterator[Feed]:
    """Made-up inputs, also with images of usual sizes; none where no inputs can be made."""
    graph, seed = prepared.graph, prepared.recipe.seed
    images = [t.name for t in graph.inputs if is_float(t) and rank(t) == 4]
    for size in (None, *_IMAGE_SIZES) if images else (None,):
        shapes = {} if size is None else dict.fromkeys(images, (1, 3, size, size))
        with suppress(DataError, ModelError):
            yield synthetic_feeds(graph, {}, 1, seed, shapes=shapes)[0]


def _run_graph(rewritten: Rewritten, account: _Account) -> onnx.GraphProto | None:
    """The graph that the target's provider runs; None if the provider or an operator is missing."""
    prepared, compiled = rewritten.prepared, rewritten.compiled
    if prepared.unknown_operator:
        return None
    if not prepared.provider_missing:
        found = runtime.optimized_graph(compiled.path, prepared.provider)
        written = runtime.written_ops(compiled.parsed[0])
        fused = runtime.count_ops(found)[_FUSED] - written[_FUSED]
        if fused > 0:
            name, value = runtime.FLOAT_DATA
            account.note(
                "data-quantized-by-runtime",
                "ONNX Runtime turns multiplications of float data by dequantized weights into "
                "MatMulNBits "
                f"({fused} here), which quantizes the data to 8 bits in each run, also for these "
                f"figures; its session option {name}={value} keeps the data float",
            )
        return found
    Session(compiled.path, _options(prepared))  # raises ModelError for an invalid model
    account.note(
        "provider-missing",
        f"{prepared.target.provider} is not installed here: outputs are those of the graph as "
        f"written, float16 rounded where it is stored, run by {prepared.provider}",
    )
    return None


def _options(prepared: Prepared, *, compiled: bool = True) -> SessionOptions:
    """Session options for comparing outputs. If the provider is missing, the compiled graph runs as
    written, because fusions of another provider would change the outputs."""
    as_written = compiled and prepared.provider_missing
    threads, provider = prepared.options.threads, prepared.provider
    return SessionOptions(threads, optimize=not as_written, provider=provider)


def _feeds(rewritten: Rewritten, account: _Account) -> list[Feed]:
    """Held-out feeds; without data random ones, with a note. Empty if the model rejects those.

    Raises DataError if random feeds exceed the memory budget.
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
    except (DataError, ModelError) as e:  # nothing can be compared if the float model fails
        return _none(account, e)
    account.note(
        "made-up-inputs", "verified on random inputs: give --data for a meaningful verdict"
    )
    return feeds


def _none(account: _Account, why: Exception) -> list[Feed]:
    account.note("not-verified", f"not verified, give --data: random inputs do not work: {why}")
    return []


def _verdict(
    rewritten: Rewritten, feeds: list[Feed], sums: saturation_check.IntegerSums, account: _Account
) -> Verdict | None:
    prepared = rewritten.prepared
    twice = _is_judged_twice(prepared)
    runs = 2 if twice else 1
    prepared.progress.step("verify", (1 + runs * len(sums.kinds)) * len(feeds))
    with prepared.stopwatch.stage("verify"):
        models = compared_models(
            prepared.selection, prepared.float_model.running, rewritten.compiled.path
        )
        # One session at a time: the float model's outputs are stored, then the compiled one runs.
        reference = Session(models.reference, _options(prepared, compiled=False))
        old = list(_outputs(prepared, reference, feeds))
        del reference
        release_memory()  # so that the weights of both sessions are never in memory together
        try:
            judge = partial(_judged, rewritten, sums, models, feeds, old)
            verdict = saturation_check.judge_by_sums(
                sums, lambda kind: _worse(partial(judge, kind)) if twice else judge(kind)
            )
        except DataError as e:
            if rewritten.calibrated.held_out.feeds and rewritten.quantized:
                raise DataError(f"{e} (--no-verify compiles without comparing)") from e
            account.note("not-verified", f"not verified: {e}")
            return None
    if twice:
        account.note("float16-emulated", _EMULATED)
    if verdict.failures and not _repeats(rewritten, models, old, feeds):
        account.notes.append(coded_note(RANDOM_MODEL))
        return None
    for text in saturation_check.unemulated_notes(verdict):
        account.note("not-emulated", text)
    for text in saturation_check.session_notes(verdict):
        account.note("session-options", text)
    if models.note:
        account.note("selects-by-values", models.note)
    dependent = Invariance(verdict.alone, verdict.padded).note
    if dependent is not None:
        account.note("batch-dependent", dependent)
    account.failures += verdict.failures
    if verdict.failures:
        account.failures += _not_finite(old)
    return verdict


def _reference(
    rewritten: Rewritten,
    models: ComparedModels,
    feeds: list[Feed],
    old: list[dict[str, Array]],
    kind: str,
) -> list[dict[str, Array]]:
    """Outputs of the model that came in; ``old`` are those with exact sums.

    If all integers came with it, its own sums saturate on the same processors.
    """
    if kind == saturation_check.EXACT or not rewritten.brought_alone:
        return old
    prepared = rewritten.prepared
    given = saturation_check.IntegerSums(models.reference, prepared.recipe.isa)
    return list(_outputs(prepared, given.runner(kind, _options(prepared)), feeds))


def _not_finite(outputs: list[dict[str, Array]]) -> list[str]:
    """Messages on the float model's outputs with NaN or infinity, which nothing is close to."""
    messages = []
    for name in outputs[0]:
        arrays = [o[name] for o in outputs if isinstance(o[name], np.ndarray)]
        bad = sum(not np.isfinite(a).all() for a in arrays if is_floating(a.dtype))
        if bad:
            largest = " (float16 ends at 65504)" if arrays[0].dtype == np.float16 else ""
            messages.append(
                f"the float model's own output {name!r} holds NaN or infinity for {bad} of "
                f"{len(arrays)} feeds{largest}: correct the model, or choose other data"
            )
    return messages


def _is_judged_twice(prepared: Prepared) -> bool:
    """True where the provider here computes float16 in float32, unlike others."""
    return prepared.rounds_to_float16 and not prepared.provider_missing


def _worse(judge: Callable[..., Verdict]) -> Verdict:
    """Of the model as it runs here, and with every float16 result rounded, as elsewhere."""
    rounded, here = judge(), judge(as_it_runs=True)
    failures = [*dict.fromkeys([*rounded.failures, *here.failures])]
    return replace(max(rounded, here, key=lambda verdict: verdict.error), failures=failures)


def _judged(
    rewritten: Rewritten,
    sums: saturation_check.IntegerSums,
    models: ComparedModels,
    feeds: list[Feed],
    old: list[dict[str, Array]],
    kind: str,
    *,
    as_it_runs: bool = False,
) -> Verdict:
    """The compiled model by one kind of sums, against outputs of the float model."""
    prepared, metric = rewritten.prepared, rewritten.prepared.options.metric
    old = _reference(rewritten, models, feeds, old, kind)
    run = partial(compiled_runner, prepared, kind=kind, as_it_runs=as_it_runs)
    if models.fed:
        runner = run(saturation_check.IntegerSums(models.candidate, sums.isa))
        fed = [models.feed(*pair) for pair in zip(feeds, old, strict=True)]
    else:
        runner, fed = run(sums), feeds
    new: Iterable[dict[str, Array]] = map(models.named, _outputs(prepared, runner, fed))
    if metric is not None:
        new = stored = list(new)
    pairs = zip(old, new, feeds, strict=True)
    padding = prepared.recipe.keep_padding_rows
    verdict = closeness.judge(pairs, prepared.gates, padding=padding)
    if metric is not None:
        if models.fed:  # the user's measure is of what the compiled model selects itself
            stored = [*_outputs(prepared, run(sums), feeds)]
        before, after = (measure(metric, feeds, outputs) for outputs in (old, stored))
        verdict.measured(before, after, prepared.gates)
    verdict = runner.on(verdict)
    return verdict if models.fed else invariance(runner.run, feeds).on(verdict)


def compiled_runner(
    prepared: Prepared,
    sums: saturation_check.IntegerSums,
    kind: str,
    *,
    float_data: bool = False,
    as_it_runs: bool = False,
) -> saturation_check.Runner:
    """The compiled model in a session with one kind of sums; ``float_data``: see SessionOptions.

    ``as_it_runs``: not in float32 with explicit rounding, where the provider here computes so.
    """
    options = replace(_options(prepared), float_data=float_data)
    if as_it_runs or not prepared.rounds_to_float16:
        return sums.runner(kind, options)
    options = replace(options, optimize=False)
    emulated = Session(rounding_form(read_model.embedded(sums.model)), options)
    return saturation_check.Runner(emulated, options.entries)


def _repeats(
    rewritten: Rewritten, models: ComparedModels, old: list[dict[str, Array]], feeds: list[Feed]
) -> bool:
    """False if the float model fails the gates against itself, because it draws random numbers.

    New sessions start with the same seed, so one session runs everything twice. Equal outputs
    repeat, whatever the gates, which may be impossible to pass. If nothing was quantized the
    outputs must be equal, also to ``old``: some operators read uninitialized memory.
    """
    prepared, quantized = rewritten.prepared, rewritten.quantized
    session = Session(models.reference, _options(prepared, compiled=False))
    first, second = ([session.run(feed) for feed in feeds] for _ in range(2))
    if _equal(first, second) and (quantized or _equal(old, first)):
        return True
    pairs = zip(first, second, feeds, strict=True)
    return quantized and closeness.judge(pairs, prepared.gates).passed


def _equal(first: list[dict[str, Array]], second: list[dict[str, Array]]) -> bool:
    """True if all arrays have the same bytes, NaN included; False for sequences, maps and text."""
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
