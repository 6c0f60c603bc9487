"""After a build: its lock, or whether it gave the same bytes as the one that it was built from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from qcompile.compiler.config.lockfile import NOT_KEPT, Lock, environment
from qcompile.compiler.report.ledger import LedgerRow
from qcompile.compiler.report.notes import Note
from qcompile.compiler.report.scales_in_file import Quantizer, quantizers
from qcompile.compiler.stages.lock_check import DATA_OPTIONS, digests_of
from qcompile.compiler.stages.rewrite import Rewritten
from qcompile.compiler.stages.verify import Verified


@dataclass(frozen=True)
class Repeated:
    """Whether a locked build gave the same bytes."""

    notes: tuple[Note, ...] = ()
    failures: tuple[str, ...] = ()


def judge(rewritten: Rewritten) -> Repeated:
    """Compare the bytes with the lock's: a difference is a failure that names what changed."""
    locked = rewritten.prepared.options.lock
    if locked is None:
        return Repeated()
    notes, digest = [], rewritten.calibrated.held_out.digest
    if digest and locked.data is not None and digest != locked.data["sha256"]:
        text = "the data is not what was locked: it served to verify only"
        notes.append(Note("other-data", text))
    found, expected = rewritten.compiled.sha256, locked.output["sha256"]
    if found == expected:
        said = "not verified then" if locked.verified is None else _closeness(locked.verified)
        return Repeated((*notes, Note("same-bytes", f"the same bytes as locked, {said}")))
    why = (
        "; ".join(locked.changes())
        or "though no input changed and no version: qcompile itself may have, since it was made"
    )
    if locked.is_light:
        why += "; it was calibrated anew, so --threads and --max-memory may count too"
    failure = (
        f"the bytes differ from the lock's (sha256 {found[:12]}…, expected {expected[:12]}…): {why}"
    )
    return Repeated(tuple(notes), (failure,))


def _closeness(verified: dict[str, Any]) -> str:
    mean = min((o["mean_cosine"] for o in verified["outputs"]), default=1.0)
    return f"verified then on {verified['samples']} samples: cosine mean {mean:.4f}"


def lock_of(verified: Verified) -> Lock:
    """The light lock of a build; where its calibration is kept, ``lockfile.save`` says so in it."""
    rewritten, prepared = verified.rewritten, verified.prepared
    model, compiled, account = (
        prepared.float_model,
        rewritten.compiled,
        rewritten.calibrated.account,
    )
    return Lock(
        recipe=prepared.recipe,
        recipe_digest=prepared.recipe.digest(),
        mode=prepared.mode,
        pipeline=rewritten.pipeline.text,
        environment=environment(),
        model={"name": prepared.request.source, "bytes": model.size, "sha256": model.digest},
        data=_data(rewritten),
        output={"bytes": compiled.size, "sha256": compiled.sha256},
        verified=_verified(verified),
        calibration={"not_kept": NOT_KEPT, **asdict(account)} if account else None,
        decisions=tuple(_decisions(rewritten.ledger, quantizers(*compiled.parsed))),
    )


def _data(rewritten: Rewritten) -> dict[str, Any] | None:
    """What calibrated; a locked build's is the lock's, whatever it was verified with."""
    prepared, calibrated = rewritten.prepared, rewritten.calibrated
    if prepared.options.lock is not None:
        return prepared.options.lock.data
    digest = calibrated.held_out.digest
    if digest is None:
        return None
    account = calibrated.account
    counts = {
        "feeds": account and account.feeds,
        "held_back": account and account.held_out,
    }
    chosen = {k: getattr(prepared.options, k) for k in DATA_OPTIONS}
    return {**digests_of(digest, prepared.general_text), **counts, **chosen}


def _verified(verified: Verified) -> dict[str, Any] | None:
    verdict, locked = verified.verdict, verified.prepared.options.lock
    if verdict is None:
        return locked.verified if locked is not None else None
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
