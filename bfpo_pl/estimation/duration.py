"""Time: operations over what the devices can do."""

from __future__ import annotations

from dataclasses import dataclass

from bfpo_pl.estimation.batches import Workload
from bfpo_pl.estimation.plan import Plan
from bfpo_pl.estimation.trace import passing, training

DEFAULT_UTILISATION = 0.40
"""Share of the devices' rate of matrix products that a step reaches. Well-tuned pre-training on H100s reports 38-43 %
(Llama 3, arXiv 2407.21783, table 4) and on A100s 40-50 %; sequences of uneven length and a frozen model beside the
policy take some of that, so that 40 % is for large models and full batches. Small ones reach less."""


@dataclass(frozen=True)
class Duration:
    """Operations and time of one device.

    Args:
        policy: Operations of the policy's forward and backward pass over a batch.
        references: Those of the live references.
        tokens: Tokens of that batch.
        batches: Batches of an epoch, or of 1,000 rows of the driver.
        rows: Rows of an epoch; None if not known.
        rate: Operations a second that the device could do; None if not known.
        utilisation: Share of it that is reached.
    """

    policy: float
    references: float
    tokens: int
    batches: int
    rows: int | None
    rate: float | None
    utilisation: float

    @property
    def batch_seconds(self) -> float | None:
        """Seconds of a batch: its operations over the rate that is reached. Devices work side by side."""
        if self.rate is None:
            return None
        return (self.policy + self.references) / (self.rate * self.utilisation)

    @property
    def epoch_seconds(self) -> float | None:
        """Seconds of all batches."""
        return None if self.batch_seconds is None else self.batch_seconds * self.batches


def duration_of(plan: Plan, work: Workload, utilisation: float) -> Duration:
    """How long an epoch takes.

    Operations are counted, not estimated from parameters: linear layers over the tokens that they see, attention over
    pairs of tokens, the head over response tokens alone, what checkpointing and the head compute again, no gradients of
    frozen weights. A rule of thumb to compare with: a forward pass takes 2 operations for each weight and token, a
    backward pass 4 (2 where weights are frozen), full checkpointing another 2, a live reference 2.

    Args:
        plan: What it depends on.
        work: The batches.
        utilisation: Share of the devices' rate that is reached.
    """
    step = training(plan, work.typical)
    return Duration(
        policy=step.forward_flops + step.backward_flops,
        references=sum(passing(plan, source, work.typical).flops for source in plan.live),
        tokens=len(work.typical.tokens),
        batches=work.batches,
        rows=work.rows,
        rate=plan.kind.half_rate if plan.half else plan.kind.full_rate,
        utilisation=utilisation,
    )
