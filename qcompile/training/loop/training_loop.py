"""The training loop: batches, gradients, rates, evaluations, checkpoints.

Same data, seed, threads and versions give the same result, also where the run was killed and
continued: the order of the data is a function of the seed, and a checkpoint holds everything else.
A run that is limited by time is an exception, since its rates follow the clock.
"""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qcompile.errors import OutputError, TrainingError
from qcompile.system.atomic_write import check_writable
from qcompile.system.interrupts import deferred_interrupts
from qcompile.system.progress import Progress, Silent
from qcompile.training.labelled.labelled_data import Batch, LabelledData
from qcompile.training.labelled.metrics import Score
from qcompile.training.loop import checkpoint
from qcompile.training.loop.evaluation import evaluate
from qcompile.training.loop.objectives import Objective, TensorBatch
from qcompile.training.loop.processes import Processes, joined
from qcompile.training.loop.schedule import Schedule

_MOST_SKIPPED = 5  # steps in a row without a finite loss, after which training has failed
_LOWERED = 0.5  # factor of the rates after such a step
_TOKENS_AT_ONCE = 1536  # of which autograd keeps all intermediate results
_SHARE_OF_WRITING = 0.05  # of the time, for periodic checkpoints


@dataclass(frozen=True)
class Trainee:
    """What is trained.

    Attributes:
        student: ``student(feed, watch)`` gives outputs and watched tensors by name.
        teacher: the same of the float model; None where labels alone teach.
        weights: parameters trained with the rate of weights, by name.
        ranges: parameters trained with the rate of ranges, by name.
        quantizers: a module that holds parameters outside of ``student``, to be moved to the
            device.
        factors: of the rate of weights, by name; 1 for those that are not in it.
    """

    student: nn.Module
    teacher: nn.Module | None
    weights: Mapping[str, nn.Parameter]
    ranges: Mapping[str, nn.Parameter]
    quantizers: nn.Module | None = None
    factors: Mapping[str, float] = field(default_factory=dict)

    def parameters(self) -> dict[str, nn.Parameter]:
        """All trained parameters. Raises TrainingError where there are none."""
        found = {f"weight {n}": p for n, p in self.weights.items()}
        found |= {f"range {n}": p for n, p in self.ranges.items()}
        if not found:
            raise TrainingError("nothing to train: no weight and no range is a parameter")
        return found


@dataclass(frozen=True)
class Point:
    """One evaluation: after ``step`` batches, with the mean loss since the one before."""

    step: int
    epoch: float
    loss: float | None
    score: Score
    seconds: float


@dataclass(frozen=True)
class Trained:
    """The outcome; the parameters are those of ``best``.

    ``skipped``: steps without a finite loss. ``seconds`` are those of all runs together.
    ``is_first``: False in all but one of several processes (``processes.py``).
    """

    curve: tuple[Point, ...]
    best: Point
    seconds: float
    steps: int
    skipped: int
    notes: tuple[str, ...]
    is_first: bool = True


def train(
    trainee: Trainee,
    data: LabelledData,
    evaluation: LabelledData,
    objective: Objective,
    schedule: Schedule,
    *,
    state: Path | None = None,
    run: Mapping[str, str] | None = None,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train in place, and leave the parameters with the best score on ``evaluation``.

    Where the teacher alone is learned from, although ``evaluation`` has labels, the best are those
    whose answers are closest to the teacher's, whatever their metric. The state before training
    counts too, so training never ends with a worse one.

    state: the file of the checkpoint; training continues from it. It stays where training ends.
    run: digests of what else the result depends on, such as the graph. device: CUDA where present,
    else the CPU. Under torchrun, all processes train together, each on its own device
    (``processes.py``). An interrupt writes a checkpoint before KeyboardInterrupt leaves this
    function.

    Raises TrainingError where there is nothing to train, shapes do not fit, the loss stays without
    a finite value, or the checkpoint is not one of this run; OutputError where ``state`` cannot be
    written; DataError where a data file has changed.
    """
    identity = run_identity(data, evaluation, objective, schedule, run or {})
    with joined(device) as processes, _reproducible(schedule.seed, processes.device):
        shown = progress if progress is not None and processes.is_first else Silent()
        loop = _Loop(trainee, data, evaluation, objective, schedule, processes, shown)
        if state is not None:
            loop.keep_in(state, identity)
        try:
            loop.run()
        except KeyboardInterrupt as e:
            loop.save()
            if state is None or not loop.is_saved:
                raise
            kept = f"{loop.step} of {loop.total} steps are kept in {state.name}"
            raise type(e)(f"{kept}, the same command continues from there") from None
        return loop.outcome()


def run_identity(
    data: LabelledData,
    evaluation: LabelledData,
    objective: Objective,
    schedule: Schedule,
    others: Mapping[str, str],
) -> dict[str, str]:
    """What the result of a run depends on, with a digest of each."""
    settings = {k: v for k, v in asdict(schedule).items() if k != "checkpoint_seconds"}
    parts = {"data": data.digest, "evaluation data": evaluation.digest}
    parts |= {"objective": repr(objective), "settings": repr(settings), **others}
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in parts.items()}


@contextmanager
def _reproducible(seed: int, device: torch.device) -> Iterator[None]:
    """Seeded generators and deterministic operators; both are as before afterwards.

    Operators without a deterministic form, which only CUDA has, are used all the same.
    """
    was = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic", category=UserWarning)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # it only takes time
        torch.manual_seed(seed)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(was, warn_only=warned)
            torch.utils.deterministic.fill_uninitialized_memory = fill


@dataclass
class _Loop:
    """One run. ``step`` is the number of batches that are done; all state belongs to it."""

    trainee: Trainee
    data: LabelledData
    evaluation: LabelledData
    objective: Objective
    schedule: Schedule
    processes: Processes
    progress: Progress
    step: int = 0
    seconds_before: float = 0.0
    losses: tuple[float, int] = (0.0, 0)  # sum and number since the last evaluation
    curve: list[Point] = field(default_factory=list)
    best: tuple[Point, dict[str, torch.Tensor]] | None = None
    factor: float = 1.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.device = self.processes.device
        for module in (self.trainee.student, self.trainee.teacher, self.trainee.quantizers):
            if module is not None:
                module.to(self.device)
        self.parameters = self.trainee.parameters()
        self.total = self.schedule.total(self.data.steps)
        self.interval = self.schedule.evaluation_interval(self.data.steps)
        self.optimizer = self._optimizer()
        self.started = time.monotonic()
        self.written = self.started
        self.writing = self.evaluating = 0.0
        self.path: Path | None = None
        self.is_saved = False

    def _optimizer(self) -> torch.optim.AdamW:
        """One group of parameters for each rate."""
        schedule, of = self.schedule, self.trainee
        groups: list[dict[str, Any]] = []
        for factor in sorted({of.factors.get(name, 1) for name in of.weights}):
            own = [p for name, p in of.weights.items() if of.factors.get(name, 1) == factor]
            rate, decay = factor * schedule.weight_rate, schedule.weight_decay
            groups.append({"params": own, "highest": rate, "weight_decay": decay})
        if of.ranges:
            ranges = list(of.ranges.values())
            groups.append({"params": ranges, "highest": schedule.range_rate, "weight_decay": 0.0})
        return torch.optim.AdamW(groups, lr=0.0, fused=True)

    def run(self) -> None:
        """Train until the last step or the time limit."""
        self.progress.step("train", self.total)
        for _ in range(self.step):
            self.progress.advance()
        batches = self._batches()
        while True:
            is_last = self.step >= self.total or self._is_out_of_time()
            if self._is_evaluation_due(is_last):
                self._evaluate()
                self.save()
            if is_last:
                return
            self._train_on(next(batches))
            self.progress.advance()
            if self._is_checkpoint_due():
                self.save()

    def _batches(self) -> Iterator[Batch]:
        epoch, start = divmod(self.step, self.data.steps)
        while True:
            yield from self.data.batches(self.schedule.seed, epoch, start)
            epoch, start = epoch + 1, 0

    def _train_on(self, batch: Batch) -> None:
        """One step. An interrupt comes before it or after it, never in between."""
        self._set_rates()
        self.optimizer.zero_grad(set_to_none=True)
        value = self._accumulate(batch)
        is_finite = math.isfinite(value)
        if is_finite:
            norm = nn.utils.clip_grad_norm_(list(self.parameters.values()), self.schedule.clip)
            is_finite = math.isfinite(float(norm))
        with deferred_interrupts():
            self.step += 1
            if is_finite:
                self.optimizer.step()
                self.losses = self.losses[0] + value, self.losses[1] + 1
                self.skipped_in_a_row = 0
            else:
                self._skip()

    def _accumulate(self, batch: Batch) -> float:
        """The mean loss of a batch, with its gradients added up.

        A batch of long texts is computed in parts, so that memory does not grow with it.
        """
        mean = 0.0
        parts = list(batch.parts(_TOKENS_AT_ONCE, self.processes.count))
        for part in self.processes.own(parts):
            loss = self._loss(TensorBatch.of(part, self.device)) * (part.count / batch.count)
            mean += float(loss.detach())
            if not math.isfinite(mean):
                break
            loss.backward()
        mean = self.processes.sum(mean)
        if math.isfinite(mean):
            self.processes.add_gradients(self.parameters.values())
        return mean

    def _loss(self, batch: TensorBatch) -> torch.Tensor:
        answers, teacher = None, self.trainee.teacher
        if teacher is not None and self.objective.distillation is not None:
            with torch.no_grad():
                answers = teacher(batch.feed, self.objective.taught)
        return self.objective.loss(
            self.trainee.student(batch.feed, self.objective.watched), answers, batch
        )

    def _skip(self) -> None:
        """Nothing is learned from a batch without a finite loss; lower rates may prevent more."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        self.factor *= _LOWERED
        if self.skipped_in_a_row >= _MOST_SKIPPED:
            raise TrainingError(
                f"the loss or its gradient was not finite in {_MOST_SKIPPED} steps in a row, the "
                f"last of them step {self.step}: lower the learning rates "
                f"({self.schedule.weight_rate:g} of weights, {self.schedule.range_rate:g} of "
                "ranges), or check that the float model's outputs are finite"
            )

    def _set_rates(self) -> None:
        done = (self.step + 0.5) / self.total
        if self.schedule.seconds is not None:
            done = max(done, self._time_used() / self.schedule.seconds)
        share = self.factor * self.schedule.share_of_rate(done)
        for group in self.optimizer.param_groups:
            group["lr"] = share * group["highest"]

    def _elapsed(self) -> float:
        """Seconds of this run and those that it continues."""
        return self.seconds_before + time.monotonic() - self.started

    def _time_used(self) -> float:
        """The same for all processes: seconds, with those of an evaluation that is to come."""
        return self.processes.of_first(self._elapsed() + self.evaluating)

    def _is_out_of_time(self) -> bool:
        limit = self.schedule.seconds
        return limit is not None and self.step > 0 and self._time_used() >= limit

    def _is_evaluation_due(self, is_last: bool) -> bool:
        if self.curve and self.curve[-1].step == self.step:
            return False
        at_interval = self.interval is not None and self.step % self.interval == 0
        return is_last or at_interval or self.step == 0

    def _evaluate(self) -> None:
        """Add a point to the curve, and keep the parameters if it is the best one."""
        begin = time.monotonic()
        modules = (self.trainee.student, self.trainee.quantizers)
        for module in filter(None, modules):
            module.eval()
        score = evaluate(
            self.trainee.student,
            None if self.data.labelled and self.evaluation.labelled else self.trainee.teacher,
            self.evaluation,
            self.objective.output,
            self.device,
        )
        for module in filter(None, modules):
            module.train()
        self.evaluating = time.monotonic() - begin
        total, count = self.losses
        mean = total / count if count else None
        epoch = self.step / self.data.steps
        point = Point(self.step, epoch, mean, score, self._elapsed())
        with deferred_interrupts():
            self.losses = 0.0, 0
            self.curve.append(point)
            # Of equal scores the later one counts: it is closer to the teacher.
            if self.best is None or _quality(point) >= _quality(self.best[0]):
                self.best = point, self._values()

    def _values(self) -> dict[str, torch.Tensor]:
        return {n: p.detach().to("cpu", copy=True) for n, p in self.parameters.items()}

    def _is_checkpoint_due(self) -> bool:
        """At the interval asked for, or at longer ones where writing takes long."""
        interval = self.schedule.checkpoint_seconds
        if interval:
            interval = max(interval, self.writing / _SHARE_OF_WRITING)
        return time.monotonic() - self.written >= interval

    def keep_in(self, path: Path, identity: Mapping[str, str]) -> None:
        """Continue from the checkpoint, if there is one, and write the next ones there."""
        self.path, self.identity = path, identity
        held = checkpoint.load(path, identity)
        self.processes.wait()  # all have read it before one writes it
        if held is None:
            check_writable(path)
            return
        try:
            self._restore(held)
        except (KeyError, TypeError, ValueError, RuntimeError) as e:
            raise TrainingError(
                f"checkpoint {str(path)!r} does not fit this run: {e}; delete it to start again"
            ) from e
        self.notes.append(f"continued from a checkpoint after step {self.step} of {self.total}")

    def save(self) -> None:
        """Write a checkpoint; where that fails, training goes on, and a note says so."""
        if self.path is None or not self.processes.is_first:
            return
        begin = time.monotonic()
        try:
            with deferred_interrupts():
                checkpoint.save(self.path, self.identity, self._state())
            self.is_saved = True
        except OutputError as e:
            self.is_saved = False
            note = f"no checkpoint was written: {e}"
            self.notes += [note] if note not in self.notes else []
        self.written = time.monotonic()
        self.writing = self.written - begin

    def _state(self) -> checkpoint.State:
        best = None if self.best is None else (asdict(self.best[0]), self.best[1])
        return {
            "step": self.step,
            "seconds": self._elapsed(),
            "losses": self.losses,
            "curve": [asdict(point) for point in self.curve],
            "best": best,
            "factor": self.factor,
            "skipped": [self.skipped, self.skipped_in_a_row],
            "values": {n: p.detach() for n, p in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "generator": torch.get_rng_state(),
        }

    def _restore(self, held: checkpoint.State) -> None:
        self._load(held["values"])
        self.optimizer.load_state_dict(held["optimizer"])
        torch.set_rng_state(held["generator"])
        self.curve = [_point(values) for values in held["curve"]]
        best = held["best"]
        self.best = None if best is None else (_point(best[0]), best[1])
        self.skipped, self.skipped_in_a_row = held["skipped"]
        self.factor, self.losses = held["factor"], tuple(held["losses"])
        self.step, self.seconds_before = held["step"], held["seconds"]
        self.started = time.monotonic()

    def _load(self, values: Mapping[str, torch.Tensor]) -> None:
        if values.keys() != self.parameters.keys():
            raise KeyError(f"{len(values)} parameters, expected {len(self.parameters)}")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if values[name].shape != parameter.shape:
                    raise ValueError(f"shape of {name}")
                parameter.copy_(values[name])

    def outcome(self) -> Trained:
        """The result, with the best values in the parameters."""
        assert self.best is not None
        self._load(self.best[1])
        if self.skipped:
            self.notes.append(f"{self.skipped} steps were skipped: their loss was not finite")
        if self.step < self.total:
            self.notes.append(f"time limit: {self.step} of {self.total} steps were trained")
        return Trained(
            tuple(self.curve), self.best[0], self._elapsed(), self.step, self.skipped,
            tuple(self.notes), self.processes.is_first,
        )  # fmt: skip


def _quality(point: Point) -> float:
    """The value that is to be large; anything is better than a score without a value."""
    score = point.score
    value = score.value if score.distance is None else -score.distance
    return -math.inf if math.isnan(value) else value


def _point(values: Mapping[str, Any]) -> Point:
    return Point(**{**values, "score": Score(**values["score"])})
