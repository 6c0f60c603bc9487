"""What a compiled model answers where integer sums are exact, and on x86 without VNNI.

Where no sum can leave int16 whatever comes in, both are one. Else a model is judged by both, as far
as its recipe names such processors: by sessions with exact sums, and by what x86 without VNNI
computes, which runs there and is emulated elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from qcompile.compiler.report.records import SaturationAccount
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
from qcompile.runtime.session import Session, SessionOptions, with_outputs
from qcompile.system.temporary_folder import TemporaryFolder
from qcompile.targets import instruction_sets

EXACT, SATURATING = "exact", "saturating"
_WITHOUT_VNNI = "on x86 without VNNI"
_SAMPLES = 4
# What to write where a session is opened in Python.
OPTION = 'add_session_config_entry("{}", "{}")'.format(*runtime.EXACT_SUMS)
REMEDY = (
    f"For exact sums there, call onnxruntime.SessionOptions().{OPTION}, or compile the float model "
    "again without --isa, or with --isa avx2"
)


@dataclass(frozen=True)
class Runner:
    """A session with one kind of sums.

    ``entries``: session options that it was given. ``left``: nodes whose saturation is not
    emulated, and why.
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


class Sums:
    """The integer products of a model as ONNX Runtime runs it, and where it is to run.

    The model's optimized graph lies in a temporary folder for as long as this object lives.
    """

    def __init__(self, model: read_model.Source, isa_name: str = "") -> None:
        self.model, self.isa = read_model.runnable(model), isa_name
        self._folder = TemporaryFolder()
        try:
            self.path = runtime.write_optimized(self.model, self._folder.path)
        except ModelError:  # made for another provider: as it is written, then
            self.path = self._written()
        self.linears = list(int16_saturation.linears(*read_model.read_model(self.path)))
        self.bounds = [int16_saturation.bound(linear) for linear in self.linears]

    def _written(self) -> Path:
        if isinstance(self.model, Path):
            return self.model
        path = self._folder.path / "model.onnx"
        path.write_bytes(self.model)
        return path

    @property
    def same(self) -> bool:
        """True where no sum can saturate."""
        return int16_saturation.exact_on_all(self.bounds)

    @property
    def kinds(self) -> tuple[str, ...]:
        """By which sums the model is to be judged; one kind where both are the same."""
        if self.same:
            return (EXACT,)
        asked = (instruction_sets.exact(self.isa), instruction_sets.saturating(self.isa))
        return tuple(k for k, yes in zip((EXACT, SATURATING), asked, strict=True) if yes)

    def runner(self, kind: str, options: SessionOptions) -> Runner:
        """The model with exact sums, or as x86 without VNNI computes it: there as it is.

        Raises ModelError where ONNX Runtime cannot load it, or its emulation.
        """
        if kind == EXACT:
            return Runner(Session(self.model, options), options.entries)
        plain = replace(options, exact=False)
        if runtime.saturates():
            return Runner(Session(self.model, plain), plain.entries)
        graph = onnx.load(self.path, load_external_data=False)
        form = saturating_form(graph, Storage(self.path.parent))
        path = self.path.with_name("saturating.onnx")
        path.write_bytes(form.model.SerializeToString())
        return Runner(
            Session(path, replace(plain, optimize=False)),
            {},
            form.left,
        )

    def observed(self, feed: Feed, threads: int = 0) -> list[Saturation]:
        """The bounds, with what happened in one run of a few samples where the model runs so."""
        found = [x for x, b in zip(self.linears, self.bounds, strict=True) if b.can and x.left]
        model = onnx.load(self.path, load_external_data=False)
        computed = {name for node in model.graph.node for name in node.output}
        names = {n for linear in found for n in (linear.left, linear.right)} & computed
        if not names:
            return self.bounds
        tapped = self.path.with_name("tapped.onnx")
        tapped.write_bytes(with_outputs(model, sorted(names)).SerializeToString())
        few = {k: v[:_SAMPLES] if common_batch(feed) > 1 else v for k, v in feed.items()}
        for part in (few, feed):  # a model that fixes its batch takes the whole
            try:
                made = Session(tapped, SessionOptions(threads=threads, optimize=False)).run(part)
            except ModelError:
                continue
            values = {**part, **made}  # an operand can be an input of the model
            seen = {
                x.node: int16_saturation.observe(x, values[x.left], values.get(x.right))
                for x in found
                if x.left in values and (x.weight is not None or x.right in values)
            }
            return [seen.get(b.node, b) for b in self.bounds]
        return self.bounds


def judge_by_sums(sums: Sums, judge: Callable[[str], Verdict]) -> Verdict:
    """The verdict of ``judge`` by each kind of sums that counts: the worse, with both in it.

    Its failures are those of all. A model that cannot be emulated is judged by exact sums alone.
    """
    found: dict[str, Verdict] = {}
    missing = ""
    for kind in sums.kinds:
        try:
            found[kind] = judge(kind)
        except ModelError:
            if kind != SATURATING or runtime.saturates():
                raise
            missing = "ONNX Runtime cannot run the graph that emulates it"
    if missing:
        verdict = found.get(EXACT) or judge(EXACT)
        return replace(verdict, sums=EXACT, not_emulated=(NotEmulated("the model", missing),))
    worst = max(found, key=lambda kind: (found[kind].error, kind == SATURATING))
    if len(found) == 1:
        return replace(found[worst], sums=worst)
    failures = list(found[EXACT].failures)
    failures += [f"{_WITHOUT_VNNI}: {f}" for f in found[SATURATING].failures if f not in failures]
    left = found[SATURATING].not_emulated
    return replace(found[worst], sums=worst, failures=failures, not_emulated=left, by_sums=found)


def saturation_account(
    sums: Sums, feed: Feed | None, verdict: Verdict | None, threads: int = 0
) -> SaturationAccount:
    """What a report says of a compiled model's sums; ``feed``: where to look what did saturate."""
    look = feed is not None and not sums.same and instruction_sets.saturating(sums.isa)
    bounds = sums.observed(feed, threads) if look and feed is not None else sums.bounds
    return SaturationAccount(
        isa=sums.isa or instruction_sets.ANY,
        same_without_vnni=sums.same,
        linears=len(bounds),
        can_saturate=sum(b.can > 0 for b in bounds),
        did_saturate=sum((b.did or 0) > 0 for b in bounds),
        advice=saturation_advice(sums, verdict),
        rows=[b for b in bounds if b.can],
    )


def saturation_advice(sums: Sums, verdict: Verdict | None) -> str:
    """One line for whoever serves or compiles a model whose sums may saturate, else nothing."""
    if sums.same or not instruction_sets.saturating(sums.isa):
        return ""
    can = sum(b.can > 0 for b in sums.bounds)
    return (
        f"outputs may differ {_WITHOUT_VNNI}: {can} of {len(sums.bounds)} int8 operators have sums "
        f"that can saturate{_figures(verdict)}. {REMEDY}"
    )


def _figures(verdict: Verdict | None) -> str:
    """The worst cosines by both kinds of sums, where both are known."""
    if verdict is None or not verdict.by_sums or verdict.not_emulated:
        return ""
    there, elsewhere = (verdict.by_sums[k] for k in (SATURATING, EXACT))
    if there.sqnr_db == elsewhere.sqnr_db:
        return ", but on these inputs the outputs are the same"
    return f" (worst cosine {there.worst_cosine:.4f} there, {elsewhere.worst_cosine:.4f} elsewhere)"


def unemulated_notes(verdict: Verdict) -> list[str]:
    """A note for each operator whose saturation is not in the figures."""
    return [
        f"the result of {node} {_WITHOUT_VNNI} is not emulated: {reason}"
        for node, reason in verdict.not_emulated
    ]


def difference_notes(verdict: Verdict) -> list[str]:
    """A note on what was compared by both kinds of sums."""
    if not verdict.by_sums:
        return []
    there, elsewhere = (verdict.by_sums[k] for k in (SATURATING, EXACT))
    if there.sqnr_db == elsewhere.sqnr_db:  # cosines do not see a common factor
        return [f"sums can saturate {_WITHOUT_VNNI}; on this data the outputs are the same"]
    return [f"outputs differ {_WITHOUT_VNNI}. {REMEDY}"]
