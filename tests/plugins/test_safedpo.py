"""SafeDPO: its check value, the direction of the offset, and its optimum."""

import pytest
import torch
from torch.nn.functional import logsigmoid

from bfpo_pl.batch import Annotations, LogProbs
from bfpo_pl.component import UserError
from bfpo_pl.labeling import HelpfulnessOnly
from bfpo_pl.losses import Logistic
from plugins.safedpo import SafeDPO

pytestmark = pytest.mark.usefixtures("float64")

QUADRANTS = Annotations.of_pairs(chosen_safe=torch.tensor([1, 1, 0, 0]), rejected_safe=torch.tensor([0, 1, 1, 0]))
"""(safe, unsafe), (safe, safe), (unsafe, safe), (unsafe, unsafe)."""


def losses(h, delta=10.0, beta=0.1):
    margin = torch.as_tensor(h).expand(4).clone().requires_grad_()
    return margin, Logistic(beta)(LogProbs.of_margin(margin), SafeDPO(delta)(QUADRANTS))


def test_check_value():
    assert losses(2.0)[1][0].item() == pytest.approx(9.800055, abs=5e-7)


def test_every_quadrant_as_the_paper_writes_it():
    # On the transformed pairs: h and u are those of (winner, loser) after the swap.
    h, beta, delta = 2.0, 0.1, 10.0

    def paper(h, u_winner, u_loser):
        return -logsigmoid(torch.tensor(beta * h - (u_loser - u_winner) * delta))

    expected = torch.stack([paper(h, 0, 1), paper(h, 0, 0), paper(-h, 0, 1)])
    torch.testing.assert_close(losses(h)[1][:3], expected)


def test_labels():
    label = SafeDPO(10.0)(QUADRANTS)
    assert label.target[:3].tolist() == [0.5, 0.5, -0.5]
    assert label.weights.tolist() == [1, 1, 1, 0]
    assert label.offset.tolist() == [10, 0, -10, 0]


@pytest.mark.parametrize("h", [-80.0, 0.0, 2.0, 80.0])
def test_gradients_go_to_the_winner_and_grow_with_delta(h):
    margin, values = losses(h)
    (gradient,) = torch.autograd.grad(values[:3].sum(), margin)
    sigmoid = torch.sigmoid
    z = torch.tensor(0.1 * h)
    expected = torch.stack([-sigmoid(10 - z), -sigmoid(-z), sigmoid(z + 10), torch.tensor(0.0)]) * 0.1
    torch.testing.assert_close(gradient, expected)


def test_without_delta_safe_pairs_are_dpo():
    flags = Annotations.of_pairs(chosen_safe=torch.ones(3), rejected_safe=torch.ones(3))
    log_probs = LogProbs.of_margin(torch.tensor([-1.0, 0.0, 3.0]))
    dpo = Logistic(0.1)(log_probs, HelpfulnessOnly()(flags))
    torch.testing.assert_close(Logistic(0.1)(log_probs, SafeDPO(10.0)(flags)), dpo)


def test_soft_flags_are_rounded():
    label = SafeDPO(1.0)(Annotations.of_pairs(chosen_safe=torch.tensor([0.9]), rejected_safe=torch.tensor([0.2])))
    assert (label.target.item(), label.offset.item()) == (0.5, 1.0)


@pytest.mark.parametrize("delta", [0.0, 2.0])
def test_the_optimum_has_no_unsafe_arm_and_dpos_ratios_among_safe_ones(bandit, delta):
    # ref exp(r / beta) on safe arms: 0.3 and 0.2 e, so 0.3556 and 0.6444; arm 0 is unsafe.
    found = bandit(SafeDPO(delta), Logistic(0.5), reward=(1.0, 0.0, 0.5), columns={"safe": (0.0, 1.0, 1.0)})
    torch.testing.assert_close(found, torch.tensor([0.0, 0.355603, 0.644397]), rtol=0, atol=1e-3)


def test_negative_delta_is_refused():
    with pytest.raises(UserError, match=r"SafeDPO: delta must lie in \[0, inf\)"):
        SafeDPO(-1.0)


def test_experiment_runs(fit):
    cli = fit("safedpo")
    assert cli.trainer.global_step == 2
    assert repr(cli.model.labeling) == "SafeDPO(delta=10.0)"
