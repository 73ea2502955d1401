"""Reductions over pairs: weights, dropped units, empty streams."""

import pytest
import torch

from bfpo_pl.reductions import Mean

pytestmark = pytest.mark.usefixtures("float64")


def mean(losses, weights, count=None):
    weights = torch.as_tensor(weights)
    return Mean()(losses, weights, (weights > 0).sum() if count is None else torch.as_tensor(count))


def test_mean_and_its_gradient():
    losses = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    value = mean(losses, [1.0, 1.0, 1.0])
    value.backward()
    assert value.shape == ()
    assert value.item() == 3.0
    torch.testing.assert_close(losses.grad, torch.full((3,), 1 / 3))


def test_weights_scale_and_the_divisor_counts_units():
    losses = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    value = mean(losses, [2.0, 0.5, 0.0])
    value.backward()
    assert value.item() == pytest.approx((2 * 1 + 0.5 * 2) / 2)  # two units of positive weight, not a weight of 2.5
    torch.testing.assert_close(losses.grad, torch.tensor([1.0, 0.25, 0.0]))


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_dropped_unit_poisons_neither_value_nor_gradient(bad):
    losses = torch.tensor([1.0, bad, 3.0], requires_grad=True)
    value = mean(losses, [1.0, 0.0, 1.0])
    value.backward()
    assert value.item() == 2.0
    torch.testing.assert_close(losses.grad, torch.tensor([0.5, 0.0, 0.5]))


def test_an_overflowing_dropped_unit_leaves_its_margin_without_a_gradient():
    h = torch.tensor([1.0, 1e300], requires_grad=True)
    losses = (h - 3.0) ** 2
    assert torch.isinf(losses[1])
    mean(losses, [1.0, 0.0]).backward()
    assert h.grad.tolist() == [-4.0, 0.0]


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_unit_that_counts_is_not_hidden(bad):
    assert not torch.isfinite(mean(torch.tensor([1.0, bad]), [1.0, 1e-3]))


@pytest.mark.parametrize("size", [0, 1, 3])
def test_nothing_left_gives_zero_attached_to_the_graph(size):
    losses = torch.full((size,), 5.0, requires_grad=True)
    value = mean(losses * 2, torch.zeros(size))
    assert value.item() == 0.0
    assert value.requires_grad  # backward must run on every process, or ddp hangs
    value.backward()
    assert losses.grad.tolist() == [0.0] * size


def test_count_from_outside_makes_the_average_over_processes_the_global_mean():
    # Two processes with 1 and 3 counting units; the count is their average, 2.
    first, second = torch.tensor([8.0]), torch.tensor([1.0, 2.0, 5.0])
    parts = [mean(first, torch.ones(1), 2.0), mean(second, torch.ones(3), 2.0)]
    assert sum(parts).item() / 2 == pytest.approx(torch.cat([first, second]).mean().item())
    # A process without a unit takes part in the average with 0.
    parts = [mean(torch.zeros(0), torch.zeros(0), 1.5), mean(second, torch.ones(3), 1.5)]
    assert sum(parts).item() / 2 == pytest.approx(second.mean().item())


def test_count_below_one_is_not_raised_to_one():
    # One unit on four processes: the average count is 1/4, the gradient of the mean must be whole.
    assert mean(torch.tensor([8.0]), torch.ones(1), 0.25).item() / 4 == pytest.approx(8.0)
