"""Tells in the report whether the compiled model answers alike with and without VNNI."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import onnx

from qcompile import isa, loading, saturation, writing
from qcompile.errors import ModelError
from qcompile.feeds import Feed, common_batch
from qcompile.job import Job
from qcompile.machine import saturates
from qcompile.runtime import Session, SessionOptions, with_outputs
from qcompile.saturation import Linear, Saturation

_SAMPLES = 4


def tell(job: Job, compiled: Path, feeds: list[Feed]) -> None:
    """Fill ``job.report.saturation``, and note it where sums did saturate on these feeds."""
    found = list(saturation.linears(*loading.read(compiled)))
    bounds = [saturation.bound(linear) for linear in found]
    asked = isa.TABLE.get(job.recipe.isa)
    can = [linear for linear, b in zip(found, bounds, strict=True) if b.can]
    if can and feeds and (asked is None or asked.saturates):
        seen = {s.node: s for s in _observe(compiled, can, feeds[0], job.options.threads)}
        bounds = [seen.get(b.node, b) for b in bounds]
    job.report.saturation = {
        "isa": job.recipe.isa or "any",
        "same_without_vnni": saturation.exact_on_all(bounds),
        "linears": len(bounds),
        "can_saturate": sum(b.can > 0 for b in bounds),
        "did_saturate": sum((b.did or 0) > 0 for b in bounds),
        "rows": [asdict(b) for b in bounds if b.can],
    }
    note = _note(job, bounds)
    if note:
        job.report.notes.append(note)


def _note(job: Job, bounds: list[Saturation]) -> str:
    did = sum((b.did or 0) > 0 for b in bounds)
    if not did:
        return ""
    here = "; this machine is one, and the figures above are with it" if saturates() else ""
    advice = "" if job.recipe.isa else ": a recipe with isa: avx2 gives weights of 7 bits"
    return (
        f"answers differ on x86 without VNNI, where sums of {did} of {len(bounds)} integer "
        f"products saturated on these inputs{here}{advice}"
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
