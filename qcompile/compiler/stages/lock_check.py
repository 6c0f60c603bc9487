"""From a finished job to its lock, and from a lock back to the job: is it the same build?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qcompile.compiler.config.lockfile import NOT_KEPT, Lock, environment
from qcompile.compiler.report.ledger import LedgerRow
from qcompile.compiler.report.scales_in_file import Quantizer, quantizers
from qcompile.compiler.stages.job import Job
from qcompile.compiler.stages.options import CompileOptions
from qcompile.data import feed_digest
from qcompile.data.open_data import Data
from qcompile.errors import RecipeError
from qcompile.ir.model_io import read_model
from qcompile.ir.model_io.write_model import ModelFiles


def options_for(options: CompileOptions, data: Data | None) -> CompileOptions:
    """What a locked build is done with: nothing is searched, and without data nothing is judged.

    Its bytes are compared instead: the same bytes have been verified when they were locked. Raises
    RecipeError where the lock is a light one and there is no data, or forms are to be tuned.
    """
    if options.lock is None:
        return options
    if options.tune:
        raise RecipeError("--tune chooses anew what a lock has fixed: give one of them")
    if options.lock.is_light and data is None:
        raise RecipeError(
            "the lock keeps no calibration: give the data that it was made with (sha256 "
            f"{_short((options.lock.data or {}).get('sha256'))}; {_choices(options.lock)}), or a "
            "full lock, which compile --lock writes"
        )
    judged = data is not None
    return replace(
        options,
        search_time=0.0,
        verify=options.verify and judged,
        bench=options.bench and judged,
    )


def check_lock(job: Job) -> None:
    """Raises RecipeError where the model is another one; what else changed becomes a note."""
    locked = job.options.lock
    if locked is None:
        return
    locked.check_model(job.model_digest, job.report.source)
    changes = locked.changes()
    if changes:
        job.report.notes.append(f"the lock was made elsewhere: {'; '.join(changes)}")


def check_data(job: Job) -> None:
    """Raises RecipeError where a light lock was made with other data than the job's.

    General text counts: it is run beside data that is text, so tokens in another form do not do.
    """
    locked = job.options.lock
    if locked is None or not locked.is_light or locked.data is None:
        return
    for key, found in _digests(job).items():
        expected = locked.data.get(key)
        if found != expected:
            what = "data" if key == "sha256" else "general text beside the data"
            raise RecipeError(
                f"the {what} is not what was locked: sha256 {_short(found)}, expected "
                f"{_short(expected)}: give the data that it was made with ({_choices(locked)}), or "
                "a full lock, which compile --lock writes"
            )


def _digests(job: Job) -> dict[str, str | None]:
    """What calibration saw."""
    text = None if job.general_text is None else feed_digest.of_feeds(job.general_text)
    return {"sha256": job.data_digest, "general_text": text}


def _short(digest: object) -> str:
    return "of none" if digest is None else f"{str(digest)[:12]}…"


_CHOICES = ("samples", "batch_size")  # options, and so in the lock


def _choices(locked: Lock) -> str:
    """Options that decide which feeds a file gives."""
    said = []
    for key in _CHOICES:
        option, value = f"--{key.replace('_', '-')}", (locked.data or {}).get(key)
        said.append(f"no {option}" if value is None else f"{option} {value}")
    return f"{', '.join(said)}, text with the same --tokenizer"


def judge(job: Job) -> None:
    """Compare the bytes with the lock's: a difference is a failure that names what changed."""
    locked = job.options.lock
    if locked is None:
        return
    if job.data_digest and locked.data is not None and job.data_digest != locked.data["sha256"]:
        job.report.notes.append("the data is not what was locked: it served to verify only")
    found, expected = job.report.model_sha256, locked.output["sha256"]
    if found != expected:
        why = (
            "; ".join(locked.changes())
            or "though no input changed and no version: qcompile itself may have, since it was made"
        )
        if locked.is_light:
            why += "; it was calibrated anew, so --threads and --max-memory may count too"
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


def lock_of(job: Job, compiled: ModelFiles) -> Lock:
    """The light lock of a build; where its calibration is kept, ``lockfile.save`` says so in it."""
    report = job.report
    return Lock(
        recipe=job.recipe,
        recipe_digest=job.recipe.digest(),
        mode=job.mode,
        pipeline=report.pipeline,
        environment=environment(),
        model={"name": report.source, "bytes": report.float_bytes, "sha256": job.model_digest},
        data=_data(job),
        output={"bytes": compiled.size, "sha256": report.model_sha256},
        verified=_verified(job),
        calibration={"not_kept": NOT_KEPT, **report.calibration} if report.calibration else None,
        decisions=tuple(
            _decisions(report.ledger, quantizers(*read_model.read_model(compiled.path)))
        ),
    )


def _data(job: Job) -> dict[str, Any] | None:
    """What calibrated; a locked build's is the lock's, whatever it was verified with."""
    if job.options.lock is not None:
        return job.options.lock.data
    if not job.data_digest:
        return None
    counts = {k: job.report.calibration.get(k) for k in ("feeds", "held_back")}
    return {**_digests(job), **counts, **{k: getattr(job.options, k) for k in _CHOICES}}


def _verified(job: Job) -> dict[str, Any] | None:
    verdict = job.report.verdict
    if verdict is None:
        return job.options.lock.verified if job.options.lock is not None else None
    cosines = [
        {"name": o.name, "mean_cosine": o.mean_cosine, "worst_cosine": o.worst_cosine}
        for o in verdict.outputs
    ]
    return {"samples": verdict.samples, "outputs": cosines}


def _decisions(rows: list[LedgerRow], found: dict[str, Quantizer]) -> list[dict[str, Any]]:
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
