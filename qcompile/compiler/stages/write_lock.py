"""After a build: makes its lock, or compares its bytes with the lock that it was built from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from qcompile.compiler.config.lockfile import NOT_KEPT, Lock, environment
from qcompile.compiler.report.ledger import LedgerRow
from qcompile.compiler.report.notes import Note
from qcompile.compiler.report.scales_in_file import Quantizer, read_quantizers
from qcompile.compiler.stages.lock_check import DATA_OPTIONS, digests_of
from qcompile.compiler.stages.rewrite import Rewritten
from qcompile.compiler.stages.verify import Verified


@dataclass(frozen=True)
class Repeated:
    """Whether a locked build gave the same bytes."""

    notes: tuple[Note, ...] = ()
    failures: tuple[str, ...] = ()


def compare_with_lock(rewritten: Rewritten) -> Repeated:
    """Compare the bytes with the lock's: a difference is a failure that names what changed."""
    locked = rewritten.prepared.options.lock
    if locked is None:
        return Repeated()
    notes, digest = [], rewritten.calibrated.held_out.digest
    if digest and locked.data is not None and digest != locked.data["sha256"]:
        text = "the data is not what was locked: it is only used to verify"
        notes.append(Note("other-data", text))
    found, expected = rewritten.compiled.sha256, locked.output["sha256"]
    if found == expected:
        verified = "not verified then" if locked.verified is None else _closeness(locked.verified)
        return Repeated((*notes, Note("same-bytes", f"the same bytes as locked, {verified}")))
    why = (
        "; ".join(locked.changes())
        or "although no input and no version changed: the code of qcompile may have changed"
    )
    if locked.is_light:
        others = "--threads and --max-memory"
        if (locked.calibration or {}).get("provider", "cpu") != "cpu":
            others = "the GPU, --threads and --max-memory"
        why += f"; calibration ran again, so {others} may matter too"
    failure = (
        f"the bytes differ from the lock's (sha256 {found[:12]}…, expected {expected[:12]}…): {why}"
    )
    return Repeated(tuple(notes), (failure,))


def _closeness(verified: dict[str, Any]) -> str:
    mean = min((o["mean_cosine"] for o in verified["outputs"]), default=1.0)
    return f"verified then on {verified['samples']} samples: cosine mean {mean:.4f}"


def make_lock(verified: Verified) -> Lock:
    """The light lock of a build; ``lockfile.save_lock`` adds the calibration to it, if kept."""
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
        training=None if rewritten.learned is None else rewritten.learned.for_lock,
        decisions=tuple(_decisions(rewritten.ledger, read_quantizers(*compiled.parsed))),
    )


def _data(rewritten: Rewritten) -> dict[str, Any] | None:
    """The calibration data; in a locked build that of the lock, whatever it was verified with."""
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
    chosen["text_columns"] = ",".join(prepared.options.text_columns) or None
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


def _decisions(rows: list[LedgerRow], in_file: dict[str, Quantizer]) -> list[dict[str, Any]]:
    """Weights and activations of the ledger, with their scales in the graph."""
    decisions = []
    for row in rows:
        if row.kind not in ("weight", "activation"):
            continue
        entry: dict[str, Any] = {"tensor": row.tensor, "kind": row.kind, "as": row.dtype}
        if row.low is not None and row.high is not None:
            entry |= {"low": row.low, "high": row.high}
        if row.scale is not None:
            entry |= {"scale": row.scale, "zero_point": row.zero_point}
        elif row.name in in_file and row.dtype != "float":
            entry |= in_file[row.name].to_dict()
        decisions.append({**entry, "reason": row.reason})
    return decisions
