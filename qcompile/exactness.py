"""What a compiled model answers where integer sums are exact, and on x86 without VNNI.

Where no sum can leave int16 whatever comes in, both are one. Else a model is judged by both, as far
as its recipe names such processors: by sessions with exact sums, and by what x86 without VNNI
computes, which runs there and is emulated elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx

from qcompile import isa, loading, runtime, saturation, writing
from qcompile.compare import Verdict
from qcompile.errors import ModelError
from qcompile.feeds import Feed, common_batch
from qcompile.qtypes import Array
from qcompile.runtime import Session, SessionOptions, with_outputs
from qcompile.saturating_form import saturating_form
from qcompile.saturation import Linear, Saturation
from qcompile.tensors import Storage

EXACT, SATURATING = "exact", "saturating"
_WITHOUT_VNNI = "on x86 without VNNI"
_SAMPLES = 4
# What to write where a session is opened in Python.
OPTION = 'options.add_session_config_entry("{}", "{}")'.format(*runtime.EXACT_SUMS)
REMEDY = (
    f"Serve the model there with {OPTION}, or compile it from the float model with --isa avx2 or "
    "without --isa"
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
        """The verdict, with how it was come by."""
        return replace(verdict, session_options=self.entries, not_emulated=self.left)


def runner(model: bytes | Path, kind: str, options: SessionOptions) -> Runner:
    """A model with exact sums, or as x86 without VNNI computes it: there by a plain session."""
    if kind == EXACT:
        return Runner(Session(model, options), options.entries)
    plain = replace(options, exact=False)
    if runtime.saturates():
        return Runner(Session(model, plain), plain.entries)
    with TemporaryDirectory() as folder:
        optimized = runtime.write_optimized(model, Path(folder))
        graph = onnx.load(optimized, load_external_data=False)
        form = saturating_form(graph, Storage(optimized.parent))
        path = optimized.with_name("saturating.onnx")
        path.write_bytes(form.model.SerializeToString())
        return Runner(Session(path, replace(plain, optimize=False)), {}, form.left)


@dataclass(frozen=True)
class Sums:
    """The integer products of a model, what can happen to their sums, and where it is to run."""

    linears: list[Linear]
    bounds: list[Saturation]
    isa: str = ""

    @property
    def same(self) -> bool:
        """True where no sum can saturate."""
        return saturation.exact_on_all(self.bounds)

    @property
    def kinds(self) -> tuple[str, ...]:
        """By which sums the model is to be judged; one kind where both are the same."""
        if self.same:
            return (EXACT,)
        asked = (isa.exact(self.isa), isa.saturating(self.isa))
        return tuple(k for k, yes in zip((EXACT, SATURATING), asked, strict=True) if yes)


def sums_of(model: loading.Source, isa_name: str = "") -> Sums:
    """The integer products of a model that is to run where a recipe's isa says."""
    found = list(saturation.linears(*loading.read(model)))
    return Sums(found, [saturation.bound(linear) for linear in found], isa_name)


def judged(sums: Sums, judge: Callable[[str], Verdict]) -> Verdict:
    """The verdict of ``judge`` by each kind of sums that counts: the worse, with both beside it.

    Its failures are those of all. A model that cannot be emulated is judged by exact sums alone.
    """
    found: dict[str, Verdict] = {}
    for kind in sums.kinds:
        try:
            found[kind] = judge(kind)
        except ModelError as e:
            if kind != SATURATING or not found or runtime.saturates():
                raise
            found[EXACT] = replace(found[EXACT], not_emulated=(("the model", str(e)),))
    worst = max(found, key=lambda kind: found[kind].error)
    if len(found) == 1:
        return replace(found[worst], sums=worst)
    failures = list(found[EXACT].failures)
    failures += [f"{_WITHOUT_VNNI}: {f}" for f in found[SATURATING].failures if f not in failures]
    return replace(found[worst], sums=worst, failures=failures, by_sums=found)


def account(
    sums: Sums, compiled: Path, feed: Feed | None, verdict: Verdict | None, threads: int = 0
) -> dict[str, Any]:
    """What a report says of a compiled model's sums; ``feed``: where to look what did saturate."""
    bounds = sums.bounds
    can = [linear for linear, b in zip(sums.linears, bounds, strict=True) if b.can]
    if can and feed is not None and isa.saturating(sums.isa):
        seen = {s.node: s for s in _observe(compiled, can, feed, threads)}
        bounds = [seen.get(b.node, b) for b in bounds]
    return {
        "isa": sums.isa or isa.ANY,
        "same_without_vnni": sums.same,
        "linears": len(bounds),
        "can_saturate": sum(b.can > 0 for b in bounds),
        "did_saturate": sum((b.did or 0) > 0 for b in bounds),
        "advice": advice(sums, verdict),
        "rows": [asdict(b) for b in bounds if b.can],
    }


def advice(sums: Sums, verdict: Verdict | None) -> str:
    """One line for whoever serves or compiles a model whose answers differ, else nothing."""
    if sums.same or not isa.saturating(sums.isa):
        return ""
    can = sum(b.can > 0 for b in sums.bounds)
    figures = ""
    if verdict is not None and verdict.by_sums:
        there, elsewhere = (verdict.by_sums[k].worst_cosine for k in (SATURATING, EXACT))
        figures = f" (worst cosine {there:.4f} there, {elsewhere:.4f} elsewhere)"
    return (
        f"answers may differ {_WITHOUT_VNNI}: {can} of {len(sums.bounds)} integer products can "
        f"saturate{figures}. {REMEDY}"
    )


def _observe(compiled: Path, found: list[Linear], feed: Feed, threads: int) -> list[Saturation]:
    """What happened in one run of a few samples; nothing where the model does not run so."""
    apart = writing.apart_from(compiled)  # else the runtime would hold the weights twice
    path = compiled if apart is None else apart.path
    model = onnx.load(path, load_external_data=False)
    reachable = [linear for linear in found if linear.left]
    computed = {name for node in model.graph.node for name in node.output}
    names = {n for linear in reachable for n in (linear.left, linear.right)} & computed
    if not names:
        return []
    few = {k: v[:_SAMPLES] if common_batch(feed) > 1 else v for k, v in feed.items()}
    tapped = path.with_name("tapped.onnx")
    tapped.write_bytes(with_outputs(model, sorted(names)).SerializeToString())
    for part in (few, feed):  # a model that fixes its batch takes the whole
        try:
            made = Session(tapped, SessionOptions(threads=threads, optimize=False)).run(part)
        except ModelError:
            continue
        values = {**part, **made}  # an operand can be an input of the model
        return [
            saturation.observe(x, values[x.left], values.get(x.right))
            for x in reachable
            if x.left in values and (x.weight is not None or x.right in values)
        ]
    return []
