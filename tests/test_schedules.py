"""Learning-rate schedules against numbers worked out by hand."""

import math

import pytest
import torch

from bfpo_pl.component import UserError
from bfpo_pl.schedules import Constant, WarmupCosine


def test_warmup_is_linear_and_peaks_right_after():
    schedule = WarmupCosine(warmup=0.1)
    factors = [schedule.factor(step, 40) for step in range(5)]
    assert factors == pytest.approx([1 / 5, 2 / 5, 3 / 5, 4 / 5, 1.0])


def test_cosine_by_hand():
    # 4 steps of warm-up, then 36 of the cosine: a third of the way is step 16, half is 22, two thirds is 28.
    schedule = WarmupCosine(warmup=4)
    assert [schedule.factor(step, 40) for step in (4, 16, 22, 28, 40)] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    assert schedule.factor(39, 40) == pytest.approx(0.5 * (1 + math.cos(math.pi * 35 / 36)))
    assert schedule.factor(1000, 40) == pytest.approx(0.0)


def test_floor():
    schedule = WarmupCosine(warmup=0, floor=0.2)
    assert [schedule.factor(step, 10) for step in (0, 5, 10)] == pytest.approx([1.0, 0.6, 0.2])


def test_warmup_below_one_is_a_share_and_from_one_on_a_number():
    assert WarmupCosine(warmup=1).factor(0, 100) == pytest.approx(1 / 2)
    assert WarmupCosine(warmup=1).factor(1, 100) == 1.0
    assert WarmupCosine(warmup=0.5).factor(49, 100) == pytest.approx(50 / 51)
    assert WarmupCosine(warmup=0.5).factor(50, 100) == 1.0


def test_a_share_that_is_no_whole_number_of_steps_is_rounded_up():
    # 1.5 of 15 steps: two steps of warm-up, and the peak in the third.
    assert [WarmupCosine(0.1).factor(step, 15) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert [Constant(0.1).factor(step, 15) for step in range(4)] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])


def test_rounding_of_a_share_adds_no_step():
    # 0.07 · 100 is 7.000000000000001 in floating point: still seven steps of warm-up.
    assert 0.07 * 100 > 7
    for schedule in (WarmupCosine(0.07), Constant(0.07)):
        assert schedule.factor(6, 100) == pytest.approx(7 / 8)
        assert schedule.factor(7, 100) == 1.0


def test_constant():
    assert [Constant().factor(step, 10) for step in (0, 5, 10, 1000)] == [1.0] * 4
    assert [Constant(warmup=3).factor(step, 10) for step in range(5)] == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1.0, 1.0])


@pytest.mark.parametrize("schedule", [WarmupCosine(0.25), WarmupCosine(3, 0.1), Constant(), Constant(0.3)])
@pytest.mark.parametrize("total", [1, 2, 7, 100])
def test_factors_stay_in_range_and_never_start_at_zero(schedule, total):
    factors = [schedule.factor(step, total) for step in range(total + 1)]
    assert all(0.0 <= factor <= 1.0 for factor in factors)
    assert all(factor > 0.0 for factor in factors[:total])


def test_the_scheduler_sets_the_optimizers_rate():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    scheduler = WarmupCosine(warmup=1).build(optimizer, 4)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    # Warm-up 1/2; then the cosine at 0, 1/3 and 2/3 of its way.
    assert rates == pytest.approx([0.25, 0.5, 0.375, 0.125])


@pytest.mark.parametrize("build", [lambda: WarmupCosine(warmup=-1), lambda: Constant(warmup=-0.1)])
def test_warmup_must_not_be_negative(build):
    with pytest.raises(UserError, match="warmup must lie in"):
        build()


@pytest.mark.parametrize("floor", [-0.1, 1.1, float("nan")])
def test_floor_must_lie_in_range(floor):
    with pytest.raises(UserError, match="floor must lie in"):
        WarmupCosine(floor=floor)
