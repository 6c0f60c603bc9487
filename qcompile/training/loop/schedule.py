"""How long to train, and how fast."""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.errors import TrainingError

_USUAL_BITS = 4  # and more: the rate is that of fine-tuning a float model


@dataclass(frozen=True)
class Schedule:
    """Length and rates of training.

    Attributes:
        epochs: passes over the data; also parts of one.
        steps: batches, in place of epochs.
        seconds: time after which training finishes early, evaluation included. The rates follow
            the share of time then, if it is larger than that of steps, so results vary.
        weight_rate: the highest learning rate of weights and other constants; ``rate_factor`` of it
            for quantized weights.
        range_rate: the highest learning rate of ranges: logarithms of scales, and zero points.
        warmup: share of the steps in which the rates rise from zero; then they fall to zero.
        clip: the largest norm of all gradients; longer ones are shortened.
        weight_decay: of weights, decoupled (AdamW, Loshchilov and Hutter 2019); ranges have none.
        evaluations: per epoch, evenly spread; there is always one before and one after training.
        checkpoint_seconds: between checkpoints, at least; 0 for one after each step.
        seed: of the order of the data.

    Raises TrainingError for values out of range.
    """

    epochs: float = 3.0
    steps: int | None = None
    seconds: float | None = None
    weight_rate: float = 2.5e-5
    range_rate: float = 1e-3
    warmup: float = 0.1
    clip: float = 1.0
    weight_decay: float = 0.0
    evaluations: int = 2
    checkpoint_seconds: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise TrainingError(f"warm-up {self.warmup:g}: expected a share, at least 0, below 1")
        least = {"weight_rate": 0.0, "range_rate": 0.0, "weight_decay": 0.0, "seed": 0}
        least |= {"checkpoint_seconds": 0.0, "evaluations": 0}
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                raise TrainingError(f"{name} {getattr(self, name):g}: expected at least {bound:g}")
        for name in ("epochs", "steps", "seconds", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise TrainingError(f"{name} {value:g}: expected a number over 0")

    def total(self, steps_per_epoch: int) -> int:
        """Steps of the whole training."""
        return self.steps or max(1, round(self.epochs * steps_per_epoch))

    def evaluation_interval(self, steps_per_epoch: int) -> int | None:
        """Steps from one evaluation to the next, None where there are none in between."""
        return max(1, round(steps_per_epoch / self.evaluations)) if self.evaluations else None

    def share_of_rate(self, progress: float) -> float:
        """The share of the highest rates, where ``progress`` (0 to 1) of training is done."""
        if progress < self.warmup:
            return progress / self.warmup
        return max(0.0, 1 - progress) / (1 - self.warmup)


def rate_factor(bits: int, *, distilled: bool = False) -> float:
    """How much faster a weight of few bits is trained.

    Each bit less doubles the step between two integers, and with it the way to the next one. With
    the rate that weights of 2 bits need, those of 4 bits lose what calibration has found.

    distilled: without labels, nothing is to be learned but the same outputs with integers. Weights
    of many bits are so near to them that the rate of fine-tuning carries them away: theirs is
    halved for each two bits over 4.
    """
    fewer = _USUAL_BITS - bits
    if fewer >= 0:
        return float(2**fewer)
    return 2 ** (fewer / 2) if distilled else 1.0
