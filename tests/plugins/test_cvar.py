"""CVaR: hand values, the variational form, dropped pairs, and what several processes make of it."""

import pytest
import torch

from bfpo_pl.component import UserError
from bfpo_pl.reductions import Mean
from plugins.cvar import CVaR

pytestmark = pytest.mark.usefixtures("float64")


def cvar(fraction, losses, weights=None, count=None):
    losses = torch.as_tensor(losses)
    weights = torch.ones_like(losses) if weights is None else torch.tensor(weights)
    count = (weights > 0).sum() if count is None else count
    return CVaR(fraction)(losses, weights, torch.as_tensor(count, dtype=losses.dtype))


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [
        (0.5, 3.5),
        (1.0, 2.5),
        (0.25, 4.0),  # one of four: the worst
        (0.1, 4.0),  # less than one of four: the worst too
        (0.375, (4 + 0.5 * 3) / 1.5),  # one and a half of four
        (0.75, 3.0),
    ],
)
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]])
def test_hand_values(fraction, expected, order):
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0])[order]
    assert cvar(fraction, losses).item() == pytest.approx(expected)


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.62, 1.0])
def test_equals_the_variational_form(fraction):
    losses = torch.randn(13, generator=torch.Generator().manual_seed(0))
    # eta + mean((loss - eta)+)/fraction is convex and piecewise linear: its least value lies at one of the losses.
    values = [eta + torch.relu(losses - eta).mean() / fraction for eta in losses]
    assert cvar(fraction, losses).item() == pytest.approx(min(values).item())


def test_gradient_goes_to_the_worst_alone():
    losses = torch.tensor([1.0, 4.0, 2.0, 3.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(cvar(0.375, losses), losses)
    torch.testing.assert_close(gradient, torch.tensor([0.0, 1.0, 0.0, 0.5]) / 1.5)


def test_dropped_pairs_count_for_nothing_whatever_their_loss():
    losses = torch.tensor([1.0, torch.nan, 2.0, torch.inf, 3.0, 4.0], requires_grad=True)
    value = cvar(0.5, losses, weights=[1.0, 0.0, 1.0, 0.0, 1.0, 1.0])
    assert value.item() == pytest.approx(3.5)
    assert torch.autograd.grad(value, losses)[0].tolist() == [0, 0, 0, 0, 0.5, 0.5]


def test_negative_losses_are_worse_than_dropped_ones():
    assert cvar(0.5, [-4.0, -1.0, -2.0, -3.0, 0.0], weights=[1.0, 1.0, 1.0, 1.0, 0.0]).item() == pytest.approx(-1.5)


def test_the_worst_are_those_of_the_largest_weighted_loss():
    assert cvar(0.5, [1.0, 2.0], weights=[5.0, 1.0]).item() == pytest.approx(5.0)


@pytest.mark.parametrize("fraction", [0.25, 1.0])
def test_nothing_left_gives_zero_with_a_gradient(fraction):
    for size in (0, 3):
        losses = torch.ones(size, requires_grad=True)
        value = cvar(fraction, losses, weights=[0.0] * size)
        value.backward()
        assert value.item() == 0
        assert losses.grad.tolist() == [0.0] * size


def test_fraction_one_is_the_mean_on_every_process():
    losses, weights = torch.rand(7), torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5, 0.0, 1.0])
    for count in (5.0, 3.5, 6.25):  # the average over processes may differ from this one's five
        torch.testing.assert_close(
            CVaR(1.0)(losses, weights, torch.tensor(count)), Mean()(losses, weights, torch.tensor(count))
        )


def test_processes_are_averaged_by_their_numbers_of_pairs():
    first, second = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    average = (cvar(0.5, first, count=4.0) + cvar(0.5, second, count=4.0)) / 2
    assert average.item() == pytest.approx((2 * 2.0 + 6 * 7.0) / 8)


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, float("nan")])
def test_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(UserError, match=r"CVaR: fraction must lie in \(0, 1\]"):
        CVaR(fraction)


def test_experiment_runs_and_reduces_each_stream(fit):
    cli = fit("cvar")
    assert cli.trainer.global_step == 2
    batch = next(iter(cli.datamodule.train_dataloader()))
    objective = cli.model.objective(batch)
    worst = [objective.losses[batch.pair_stream == k].sort().values[-2:].mean() for k in (0, 1)]  # half of four
    torch.testing.assert_close(objective.loss, sum(worst))
