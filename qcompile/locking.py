"""From a finished job to its lock, and from a lock back to the job: is it the same build?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qcompile import loading
from qcompile.data import Data
from qcompile.job import Job, Options
from qcompile.ledger import Row
from qcompile.lock import Lock, environment
from qcompile.quantizers import Quantizer, quantizers
from qcompile.writing import Written


def options_for(options: Options, data: Data | None) -> Options:
    """What a locked build is done with: nothing is searched, and without data nothing is judged.

    Its bytes are compared instead: the same bytes have been verified when they were locked.
    """
    if options.lock is None:
        return options
    judged = data is not None
    return replace(
        options,
        search_time=0.0,
        verify=options.verify and judged,
        bench=options.bench and judged,
    )


def check(job: Job) -> None:
    """Raises RecipeError where the model is another one; what else changed becomes a note."""
    locked = job.options.lock
    if locked is None:
        return
    locked.check_model(job.model_digest, job.report.source)
    changes = locked.changes()
    if changes:
        job.report.notes.append(f"the lock was made elsewhere: {'; '.join(changes)}")


def judge(job: Job) -> None:
    """Compare the bytes with the lock's: a difference is a failure that names what changed."""
    locked = job.options.lock
    if locked is None:
        return
    if job.data_digest and locked.data is not None and job.data_digest != locked.data["sha256"]:
        job.report.notes.append("the data is not what was locked: it served to verify only")
    found, expected = job.report.model_sha256, locked.output["sha256"]
    if found != expected:
        why = "; ".join(locked.changes()) or "though no version and no input changed"
        job.report.failures.append(
            f"the bytes differ from the lock's (sha256 {found[:12]}…, expected "
            f"{expected[:12]}…): {why}"
        )
        return
    said = "not verified then" if locked.verified is None else _closeness(locked.verified)
    job.report.notes.append(f"the same bytes as locked, {said}")


def _closeness(verified: dict[str, Any]) -> str:
    mean = min((o["mean_cosine"] for o in verified["outputs"]), default=1.0)
    return f"verified then on {verified['samples']} samples: cosine mean {mean:.4f}"


def lock_of(job: Job, compiled: Written) -> Lock:
    """The lock of a build; where its calibration lies is known once it is written."""
    report = job.report
    data = None
    if job.data_digest:
        counts = {k: report.calibration[k] for k in ("feeds", "held_back") if report.calibration}
        data = {"sha256": job.data_digest, **counts}
    return Lock(
        recipe=job.recipe,
        recipe_digest=job.recipe.digest(),
        mode=job.mode,
        pipeline=report.pipeline,
        environment=environment(),
        model={"name": report.source, "bytes": report.float_bytes, "sha256": job.model_digest},
        data=data,
        output={"bytes": compiled.size, "sha256": report.model_sha256},
        verified=_verified(job),
        decisions=tuple(_decisions(report.ledger, quantizers(*loading.read(compiled.path)))),
    )


def _verified(job: Job) -> dict[str, Any] | None:
    verdict = job.report.verdict
    if verdict is None:
        return job.options.lock.verified if job.options.lock is not None else None
    cosines = [
        {"name": o.name, "mean_cosine": o.mean_cosine, "worst_cosine": o.worst_cosine}
        for o in verdict.outputs
    ]
    return {"samples": verdict.samples, "outputs": cosines}


def _decisions(rows: list[Row], found: dict[str, Quantizer]) -> list[dict[str, Any]]:
    """Weights and activations of the ledger, with the scales that the graph holds for them."""
    made = []
    for row in rows:
        if row.kind not in ("weight", "activation"):
            continue
        plain: dict[str, Any] = {"tensor": row.tensor, "kind": row.kind, "as": row.dtype}
        if row.low is not None and row.high is not None:
            plain |= {"low": row.low, "high": row.high}
        if row.scale is not None:
            plain |= {"scale": row.scale, "zero_point": row.zero_point}
        elif row.name in found and row.dtype != "float":
            plain |= found[row.name].to_dict()
        made.append({**plain, "reason": row.reason})
    return made
