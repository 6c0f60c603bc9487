"""The outputs of a compiled model with exact integer sums, and on x86 without VNNI.

If no sum of two int8 products can exceed int16, whatever the inputs, both are the same. Otherwise
the model is judged by both kinds of sums, as far as its recipe includes such processors: in
sessions with exact sums, and with the saturating sums of x86 without VNNI, which are emulated on
other processors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx

from qcompile.compiler.report.ledger import LedgerRow
from qcompile.compiler.report.records import BoundCost, SaturationAccount
from qcompile.data.feeds import Feed, common_batch
from qcompile.errors import ModelError
from qcompile.ir.model_io import read_model
from qcompile.ir.model_io.external_data import Storage
from qcompile.quant import Array
from qcompile.runtime import session as runtime
from qcompile.runtime.evaluation import int16_saturation
from qcompile.runtime.evaluation.closeness import NotEmulated, Verdict
from qcompile.runtime.evaluation.int16_saturation import Saturation
from qcompile.runtime.evaluation.saturating_form import saturating_form
from qcompile.runtime.exact_sums import shares_weights
from qcompile.runtime.session import Session, SessionOptions, with_outputs
from qcompile.system.temporary_folder import TemporaryFolder
from qcompile.targets import instruction_sets

EXACT, SATURATING = "exact", "saturating"
# Key of a compiled file's metadata for those who open it: the session option that it needs on x86
# without VNNI, NAME=VALUE, or NO_OPTION. Files whose sums cannot saturate do not have the key.
METADATA, NO_OPTION = "qcompile.x86_without_vnni", "none"
# Labels of figures by the kind of sums, where both kinds are shown.
LABELS = {EXACT: "exact sums", SATURATING: "x86 without VNNI"}
_WITHOUT_VNNI = "on x86 without VNNI"
_SAMPLES = 4
# The call for users who open a session in Python.
OPTION = 'add_session_config_entry("{}", "{}")'.format(*runtime.EXACT_SUMS)
REMEDY = (
    "For exact sums there, open it by qcompile.session, or with onnxruntime.SessionOptions()."
    f"{OPTION}, or compile the float model again without --isa, or with --isa avx2 (in a recipe, "
    "isa: avx2)"
)


@dataclass(frozen=True)
class Runner:
    """A session with one kind of sums.

    ``entries``: its session options. ``left``: nodes whose saturation is not emulated, and why.
    """

    session: Session
    entries: dict[str, str]
    left: tuple[tuple[str, str], ...] = ()

    def run(self, feed: Feed) -> dict[str, Array]:
        """Outputs by name for one feed. Raises ModelError where the runtime fails."""
        return self.session.run(feed)

    def on(self, verdict: Verdict) -> Verdict:
        """The verdict, with the options and omissions of this session."""
        left = tuple(NotEmulated(*pair) for pair in self.left)
        return replace(verdict, session_options=self.entries, not_emulated=left)


class IntegerSums:
    """The int8 operators of a model as ONNX Runtime runs it, and the processors it is made for.

    ``provider``: that the model is made for; the processor's sums matter to the CPU's alone. The
    model's optimized graph is in a temporary folder that lives as long as this object.
    """

    def __init__(
        self, model: read_model.Source, isa_name: str = "", provider: str = runtime.CPU
    ) -> None:
        self.model, self.isa, self.provider = read_model.runnable(model), isa_name, provider
        self._folder = TemporaryFolder()
        self._unoptimized = ""
        try:
            self.path = runtime.write_optimized(self.model, self._folder.path)
        except ModelError as e:  # made for another provider, or with operators that are not here
            self.path = self._written()
            self._unoptimized = f"what ONNX Runtime fuses is not known, it fails here: {e}"
        parsed = read_model.read_model(self.path)
        self.linears = list(int16_saturation.linears(*parsed, unoptimized=self._unoptimized))
        self.bounds = [int16_saturation.bound(linear) for linear in self.linears]

    def _written(self) -> Path:
        if isinstance(self.model, Path):
            return self.model
        path = self._folder.path / "model.onnx"
        path.write_bytes(self.model)
        return path

    def of_copy(self, model: Path) -> IntegerSums:
        """The same for a copy of the model's file with other metadata."""
        found = copy(self)
        found.path = model if self.path == self.model else self.path
        found.model = model
        return found

    @property
    def needed_option(self) -> str:
        """The value of ``METADATA``; empty where sums cannot saturate.

        ``NO_OPTION``: they can, and the session option has no effect, or fails because several
        operators read one weight.
        """
        if self.same or not self.on_processor:
            return ""
        both = zip(self.linears, self.bounds, strict=True)
        constant = any(linear.weight is not None for linear, bound in both if bound.can)
        works = constant and not shares_weights(read_model.read_model(self.model)[0])
        return "=".join(runtime.EXACT_SUMS) if works else NO_OPTION

    @property
    def same(self) -> bool:
        """True where no sum can saturate."""
        return int16_saturation.exact_on_all(self.bounds)

    @property
    def on_processor(self) -> bool:
        """False for a model whose integers another provider adds, such as a GPU's."""
        return self.provider == runtime.CPU

    @property
    def can_differ(self) -> bool:
        """True where sums may saturate on processors that the model is made for."""
        return not self.same and self.on_processor and instruction_sets.saturating(self.isa)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of sums to judge the model by; one kind if both are the same."""
        if self.same or not self.on_processor:
            return (EXACT,)
        needed = (instruction_sets.exact(self.isa), instruction_sets.saturating(self.isa))
        return tuple(k for k, yes in zip((EXACT, SATURATING), needed, strict=True) if yes)

    def runner(self, kind: str, options: SessionOptions) -> Runner:
        """A session with exact sums, or with those of x86 without VNNI, emulated if necessary.

        Raises ModelError where ONNX Runtime cannot load the model or the emulating one.
        """
        if kind == EXACT:
            needed = replace(options, exact=options.exact and not self.same)
            return Runner(Session(self.model, needed), needed.entries)
        if runtime.saturates():  # this machine computes such sums itself
            inexact = replace(options, exact=False)
            return Runner(Session(self.model, inexact), inexact.entries)
        return self.emulated(options)

    def emulated(self, options: SessionOptions) -> Runner:
        """A session of the graph that computes the sums of x86 without VNNI on any processor.

        Raises ModelError where ONNX Runtime cannot load it.
        """
        graph = onnx.load(self.path, load_external_data=False)
        emulation = saturating_form(graph, Storage(self.path.parent))
        path = self.path.with_name("saturating.onnx")
        path.write_bytes(emulation.model.SerializeToString())
        session = Session(path, replace(options, exact=True, optimize=False))
        whole = (("the model", self._unoptimized),) if self._unoptimized else ()
        return Runner(session, {}, (*whole, *emulation.left))

    def observed(self, feed: Feed, threads: int = 0) -> list[Saturation]:
        """The bounds, with the saturation observed in one run of a few samples, if that works."""
        both = zip(self.linears, self.bounds, strict=True)
        risky = {i: x for i, (x, b) in enumerate(both) if b.can and x.left}
        model = onnx.load(self.path, load_external_data=False)
        computed = {name for node in model.graph.node for name in node.output}
        names = {n for linear in risky.values() for n in (linear.left, linear.right)} & computed
        if not names:
            return self.bounds
        tapped = self.path.with_name("tapped.onnx")
        tapped.write_bytes(with_outputs(model, sorted(names)).SerializeToString())
        few = {k: v[:_SAMPLES] if common_batch(feed) > 1 else v for k, v in feed.items()}
        for part in (few, feed):  # a model with a fixed batch size needs the whole feed
            try:
                outputs = Session(tapped, SessionOptions(threads=threads, optimize=False)).run(part)
            except ModelError:
                continue
            values = {**part, **outputs}  # an operand can be an input of the model
            observed = {
                i: int16_saturation.observe(x, values[x.left], values.get(x.right))
                for i, x in risky.items()
                if x.left in values and (x.weight is not None or x.right in values)
            }
            return [observed.get(i, b) for i, b in enumerate(self.bounds)]
        return self.bounds


def saturates_here(model: read_model.Source) -> bool:
    """True where this processor's sums saturate, and those of the model can.

    Raises ModelError where the model cannot be read.
    """
    return runtime.saturates() and not IntegerSums(model).same


def saturating_here(
    models: Iterable[tuple[str, bytes | Path]], provider: str = runtime.CPU
) -> frozenset[str]:
    """Labels of the models whose default sessions may saturate on this processor."""
    if provider != runtime.CPU:
        return frozenset()
    return frozenset(label for label, model in models if saturates_here(model))


def judge_by_sums(sums: IntegerSums, judge: Callable[[str], Verdict]) -> Verdict:
    """The worse verdict of ``judge`` by each kind of ``sums.kinds``; it holds both.

    Its failures are those of both. A model that cannot be emulated is judged by exact sums alone.
    """
    by_kind: dict[str, Verdict] = {}
    missing = ""
    for kind in sums.kinds:
        try:
            by_kind[kind] = judge(kind)
        except ModelError:
            if kind != SATURATING or runtime.saturates():
                raise
            missing = "ONNX Runtime cannot run the graph that emulates it"
    if missing:
        verdict = by_kind.get(EXACT) or judge(EXACT)
        return replace(verdict, sums=EXACT, not_emulated=(NotEmulated("the model", missing),))
    worst = max(by_kind, key=lambda kind: (by_kind[kind].error, kind == SATURATING))
    if len(by_kind) == 1:
        return replace(by_kind[worst], sums=worst)
    failures = list(by_kind[EXACT].failures)
    failures += [f"{_WITHOUT_VNNI}: {f}" for f in by_kind[SATURATING].failures if f not in failures]
    left = by_kind[SATURATING].not_emulated
    worse = by_kind[worst]
    return replace(worse, sums=worst, failures=failures, not_emulated=left, by_sums=by_kind)


def saturation_account(
    sums: IntegerSums,
    feed: Feed | None,
    verdict: Verdict | None,
    ledger: Iterable[LedgerRow] = (),
    threads: int = 0,
) -> SaturationAccount:
    """The report's part on a compiled model's sums; ``feed``: to observe which ones saturate."""
    observe = feed is not None and sums.can_differ
    bounds = sums.observed(feed, threads) if observe and feed is not None else sums.bounds
    return SaturationAccount(
        isa=sums.isa or instruction_sets.ANY,
        same_without_vnni=sums.same,
        linears=len(bounds),
        can_saturate=sum(b.can > 0 for b in bounds),
        did_saturate=sum((b.did or 0) > 0 for b in bounds),
        advice=saturation_advice(sums, verdict),
        rows=[b for b in bounds if b.can],
        cost=bound_cost(ledger),
    )


def bound_cost(ledger: Iterable[LedgerRow]) -> BoundCost | None:
    """What the bound on sums costs in all, None where no tensor is bounded."""
    costs = {row.tensor: row.bound_db for row in ledger if row.bound_db is not None}
    if not costs:
        return None
    worst = max(costs, key=lambda name: costs[name])
    exact = [name for name, isa in instruction_sets.TABLE.items() if not isa.saturates]
    return BoundCost(
        tensors=len(costs),
        mean_db=float(np.mean(list(costs.values()))),
        worst_db=costs[worst],
        worst=worst,
        avoided_by=f"isa: {', '.join(exact[:-1])} or {exact[-1]}",
    )


def saturation_advice(sums: IntegerSums, verdict: Verdict | None) -> str:
    """One line of advice for a model whose sums may saturate, else an empty string.

    Also empty where both kinds of sums were measured to give the same outputs.
    """
    if not sums.can_differ or (verdict is not None and is_same_on_data(verdict)):
        return ""
    can = sum(b.can > 0 for b in sums.bounds)
    return (
        f"outputs may differ {_WITHOUT_VNNI}: {can} of {len(sums.bounds)} int8 operators have sums "
        f"that can saturate{_figures(verdict)}. {REMEDY}"
    )


def is_same_on_data(verdict: Verdict) -> bool:
    """True where both kinds of sums were measured, and gave the same outputs."""
    if not verdict.by_sums or verdict.not_emulated:
        return False
    there, elsewhere = (verdict.by_sums[k] for k in (SATURATING, EXACT))
    return there.sqnr_db == elsewhere.sqnr_db  # cosines do not see a common factor


def shown(verdict: Verdict) -> dict[str, Verdict]:
    """By label what to show of a verdict: both kinds of sums if they differ, else one without."""
    if not verdict.by_sums or is_same_on_data(verdict):
        return {"": verdict}
    return {LABELS[kind]: one for kind, one in verdict.by_sums.items()}


def _figures(verdict: Verdict | None) -> str:
    """The worst cosines by both kinds of sums, if both are known."""
    if verdict is None or not verdict.by_sums or verdict.not_emulated:
        return ""
    there, elsewhere = (verdict.by_sums[k] for k in (SATURATING, EXACT))
    return f" (worst cosine {there.worst_cosine:.4f} there, {elsewhere.worst_cosine:.4f} elsewhere)"


def difference(verdict: Verdict) -> str:
    """One line on processors whose outputs differ; empty where only one kind of sums was judged, or
    both gave the same outputs."""
    if not verdict.by_sums or is_same_on_data(verdict):
        return ""
    return f"outputs differ {_WITHOUT_VNNI}{_figures(verdict)}. {REMEDY}"


def same_notes(verdict: Verdict | None) -> list[str]:
    """A note where sums can saturate, but did not change an output."""
    if verdict is None or not is_same_on_data(verdict):
        return []
    return [f"sums can saturate {_WITHOUT_VNNI}; on this data the outputs are the same"]


def unemulated_notes(verdict: Verdict) -> list[str]:
    """A note for each operator whose saturation is not in the figures."""
    return [
        f"the result of {node} {_WITHOUT_VNNI} is not emulated: {reason}"
        for node, reason in verdict.not_emulated
    ]


def session_notes(verdict: Verdict) -> list[str]:
    """A note where exact sums needed session options on this processor."""
    exact = verdict.by_sums.get(EXACT, verdict)
    if exact.sums != EXACT or not exact.session_options:
        return []
    entries = ", ".join(f"{key}={value}" for key, value in exact.session_options.items())
    return [
        f"exact sums were measured in a session with {entries}, without which they can saturate on "
        "this processor; qcompile.session opens the same"
    ]
