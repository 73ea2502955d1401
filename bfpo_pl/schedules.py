"""Learning-rate schedules, per optimizer step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from bfpo_pl.component import Component, check_range


class Schedule(Component, ABC):
    """The learning rate as a factor of the optimizer's own, over the steps of a run."""

    @abstractmethod
    def factor(self, step: int, total_steps: int) -> float:
        """Factor in [0, 1] at an optimizer step, counted from 0."""

    def build(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """A scheduler to be stepped once an optimizer step."""
        return LambdaLR(optimizer, lambda step: self.factor(step, total_steps))


class WarmupCosine(Schedule):
    """Linear warm-up, then half a cosine down to ``floor``. The paper warms up for 10 % and ends at 0.

    Args:
        warmup: Share of the run's steps, if below 1; a number of steps otherwise.
        floor: Last factor, as a share of the peak, in [0, 1].
    """

    def __init__(self, warmup: float = 0.1, floor: float = 0.0) -> None:
        self.warmup = check_range(self, "warmup", warmup, 0.0)
        self.floor = check_range(self, "floor", floor, 0.0, 1.0)

    def factor(self, step: int, total_steps: int) -> float:
        warmup_steps = _warmup_steps(self.warmup, total_steps)
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))


class Constant(Schedule):
    """The optimizer's own learning rate, after an optional linear warm-up.

    Args:
        warmup: Share of the run's steps, if below 1; a number of steps otherwise.
    """

    def __init__(self, warmup: float = 0.0) -> None:
        self.warmup = check_range(self, "warmup", warmup, 0.0)

    def factor(self, step: int, total_steps: int) -> float:
        warmup_steps = _warmup_steps(self.warmup, total_steps)
        return min((step + 1) / (warmup_steps + 1), 1.0) if warmup_steps else 1.0


def _warmup_steps(warmup: float, total_steps: int) -> int:
    """Steps of warm-up; a share of the run is rounded up, but not for the sake of floating point (0.07 · 100 is 7)."""
    return math.ceil(round(warmup * total_steps, 6) if warmup < 1 else warmup)
