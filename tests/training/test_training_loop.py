"""Training learns, keeps the best state, continues exactly, and stops with a reason."""

from __future__ import annotations

import itertools
import math
import signal
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qcompile.errors import OutputError, TrainingError
from qcompile.training.labelled.metrics import Score
from qcompile.training.loop import checkpoint, training_loop
from qcompile.training.loop.objectives import Distillation, Objective
from qcompile.training.loop.training_loop import Trainee
from tests.training.small_run import (
    CLASSES,
    LABELS_ALONE,
    OBJECTIVE,
    SCHEDULE,
    Classifier,
    run,
    small_data,
    trainee,
    values,
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class StopAt:
    """Progress that interrupts after so many steps, as Ctrl-C does."""

    def __init__(self, steps: int) -> None:
        self.left, self.total = steps, 0

    def step(self, name: str, total: int | None = None) -> None:
        assert name == "train"
        self.total = total or 0

    def advance(self) -> None:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)


class Broken(Classifier):
    """Gives infinite answers in some of the steps, counted from 1."""

    def __init__(self, steps: Collection[int]) -> None:
        super().__init__(1)
        self.steps, self.seen = steps, 0

    def forward(
        self, feed: Mapping[str, torch.Tensor], watch: Collection[str] = ()
    ) -> dict[str, torch.Tensor]:
        outputs = super().forward(feed, watch)
        self.seen += self.training
        if self.training and self.seen in self.steps:
            outputs["logits"] = outputs["logits"] * float("inf")
        return outputs


def broken(*steps: int) -> Trainee:
    student = Broken(steps)
    return Trainee(student, None, {"table": student.table, "weight": student.weight}, {})


def test_labels_are_learned(tmp_path: Path) -> None:
    found, of = run(tmp_path, objective=LABELS_ALONE, schedule=replace(SCHEDULE, epochs=4))
    first, last = found.curve[0], found.curve[-1]
    assert first.step == 0 and first.loss is None and last.step == found.steps == 48
    assert found.best.score.value > first.score.value + 20
    assert found.best.score.value == max(point.score.value for point in found.curve)
    assert float(of.ranges["scale"].detach()) != 0 and found.notes == ()


def test_a_teacher_is_learned_without_labels(tmp_path: Path) -> None:
    objective = Objective(CLASSES, "logits", Distillation(labels=0, pairs=(("pooled", "pooled"),)))
    schedule = replace(SCHEDULE, epochs=4, evaluations=0)
    found, _ = run(tmp_path, objective=objective, schedule=schedule, labelled=False)
    first, last = found.curve
    assert last.score.metric == "cosine" and last.score.value > first.score.value + 5


def test_of_states_compared_with_the_teacher_the_closest_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distances = iter([0.3, 0.1, float("nan"), 0.2, 0.4])
    accuracies = iter([5.0, 1.0, 9.0, 2.0, 4.0])

    def evaluate(*_args: object) -> Score:
        return Score("accuracy", next(accuracies), distance=next(distances))

    monkeypatch.setattr(training_loop, "evaluate", evaluate)
    assert run(tmp_path)[0].best.score.value == 1.0


def test_labelled_answers_are_compared_where_labels_do_not_teach(tmp_path: Path) -> None:
    (data, _), (_, evaluation) = small_data(tmp_path, labelled=False), small_data(tmp_path)
    schedule = replace(SCHEDULE, epochs=1, evaluations=0)
    cpu = torch.device("cpu")
    found = training_loop.train(trainee(), data, evaluation, OBJECTIVE, schedule, device=cpu)
    assert found.best.score.metric == "accuracy" and found.best.score.distance is not None
    assert run(tmp_path, schedule=schedule)[0].best.score.distance is None


def test_the_best_state_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([5.0, float("nan"), 5.0, 2.0, 4.0])
    seen: list[dict[str, list[float]]] = []
    of = trainee()

    def evaluate(*_args: object) -> Score:
        seen.append(values(of))
        return Score("accuracy", next(scores))

    monkeypatch.setattr(training_loop, "evaluate", evaluate)
    found, _ = run(tmp_path, of=of)
    assert found.best.step == found.curve[2].step and values(of) == seen[2]
    assert values(of) != seen[4] and math.isnan(found.curve[1].score.value)


def test_a_first_score_without_a_value_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = itertools.chain([float("nan")], itertools.repeat(0.0))
    monkeypatch.setattr(training_loop, "evaluate", lambda *_: Score("accuracy", next(scores)))
    assert run(tmp_path)[0].best.score.value == 0


def test_the_same_seed_gives_the_same_result(tmp_path: Path) -> None:
    first, again, other = (
        values(run(tmp_path, schedule=replace(SCHEDULE, seed=seed))[1]) for seed in (0, 0, 1)
    )
    assert first == again and first != other


def test_settings_of_torch_are_as_before(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    run(tmp_path)
    assert torch.equal(torch.rand(3), expected)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("steps", [1, 6, 17, 24])
def test_an_interrupted_run_continues_to_the_same_result(tmp_path: Path, steps: int) -> None:
    schedule = replace(SCHEDULE, checkpoint_seconds=1000)  # so that only the interrupt writes
    expected, of = run(tmp_path, schedule=schedule)
    state = tmp_path / "run.pt"
    progress = StopAt(steps)
    with pytest.raises(KeyboardInterrupt, match=f"^{steps} of 24 steps are kept in run.pt, the s"):
        run(tmp_path, state, schedule=schedule, progress=progress)
    found, again = run(tmp_path, state, schedule=replace(schedule, checkpoint_seconds=0))
    assert progress.total == 24 and values(again) == values(of)
    assert [(p.step, p.loss, p.score) for p in found.curve] == [
        (p.step, p.loss, p.score) for p in expected.curve
    ]
    assert found.notes == (f"continued from a checkpoint after step {steps} of 24",)


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_without_a_checkpoint_promises_none(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        run(tmp_path, progress=StopAt(3))


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    state = tmp_path / "run.pt"
    expected = values(run(tmp_path, state)[1])
    found, of = run(tmp_path, state, of=broken_after_all())
    assert values(of) == expected and found.steps == 24


def broken_after_all() -> Trainee:
    student = Broken(range(100))
    weights = {"table": student.table, "weight": student.weight}
    return Trainee(student, Classifier(8), weights, {"scale": student.scale})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"schedule": replace(SCHEDULE, seed=1)}, "settings"),
        ({"objective": LABELS_ALONE}, "objective"),
        ({"run": {"graph": "x"}}, "graph"),
    ],
)
def test_another_run_does_not_continue(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    state = tmp_path / "run.pt"
    run(tmp_path, state)
    with pytest.raises(TrainingError, match=f"belongs to a run with other {named};"):
        run(tmp_path, state, **change)


def test_a_checkpoint_of_other_parameters_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "run.pt"
    run(tmp_path, state)
    student = Classifier(1)
    of = Trainee(student, Classifier(2), {"table": student.table}, {})
    with pytest.raises(TrainingError, match=r"does not fit this run: .*delete it"):
        run(tmp_path, state, of=of)


def test_a_checkpoint_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OutputError, match="does not exist"):
        run(tmp_path, tmp_path / "none" / "run.pt")

    def full(*_args: object) -> None:
        raise OutputError("cannot write 'run.pt': No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    found, _ = run(tmp_path, tmp_path / "run.pt")
    assert found.notes == (
        "no checkpoint was written: cannot write 'run.pt': No space left on device",
    )


def test_a_step_without_a_finite_loss_is_skipped(tmp_path: Path) -> None:
    found, of = run(tmp_path, of=broken(3, 4), objective=LABELS_ALONE)
    assert found.skipped == 2 and found.steps == 24
    assert all(math.isfinite(v) for row in values(of).values() for v in row)
    assert found.notes == ("2 steps were skipped: their loss was not finite",)


def test_a_loss_that_stays_infinite_ends_training(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"5 steps in a row, the last of them step 6: lower"):
        run(tmp_path, of=broken(*range(2, 99)), objective=LABELS_ALONE)


def test_a_time_limit_ends_training_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    found, _ = run(tmp_path, schedule=replace(SCHEDULE, seconds=40))
    assert 0 < found.steps < 24 and found.curve[-1].step == found.steps
    assert found.notes == (f"time limit: {found.steps} of 24 steps were trained",)


def test_nothing_to_train(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="nothing to train"):
        run(tmp_path, of=Trainee(Classifier(1), None, {}, {}))


def test_only_ranges_can_be_trained(tmp_path: Path) -> None:
    student = Classifier(1)
    before = student.weight.detach().clone()
    of = Trainee(student, None, {}, {"scale": student.scale})
    found, _ = run(tmp_path, of=of, objective=LABELS_ALONE, schedule=replace(SCHEDULE, epochs=1))
    assert torch.equal(student.weight, before) and found.steps == 12


def test_a_batch_of_long_texts_in_parts_has_the_same_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = run(tmp_path, objective=LABELS_ALONE)
    monkeypatch.setattr(training_loop, "_TOKENS_AT_ONCE", 1)
    parts, _ = run(tmp_path, objective=LABELS_ALONE)
    losses = [[point.loss or 0 for point in found.curve] for found in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # float32 sums in another order


def test_weights_of_few_bits_have_a_rate_of_their_own(tmp_path: Path) -> None:
    """Adam's first step is as large as the rate: so it shows which rate a parameter has."""
    of = replace(trainee(), factors={"weight": 4})
    schedule = replace(SCHEDULE, epochs=9, steps=1, warmup=0, evaluations=0)
    before = values(of)
    _, after = run(tmp_path, of=of, schedule=schedule, objective=LABELS_ALONE)
    moved = {name: np.abs(np.subtract(v, before[name])).max() for name, v in values(after).items()}
    assert moved["weight weight"] == pytest.approx(4 * moved["weight table"], rel=0.01)
