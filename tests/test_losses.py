"""Losses against published values, finite differences and each other."""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from bfpo_pl.batch import REFERENCE, Annotations, Label, LogProbs
from bfpo_pl.labeling import BFPO, HelpfulnessOnly
from bfpo_pl.losses import Hinge, Logistic, PreferenceLoss, RobustLogistic, SafeChosenNLL, Squared

pytestmark = pytest.mark.usefixtures("float64")

LOSSES = [Squared(0.1), Logistic(0.1), Logistic(0.1, 0.1), RobustLogistic(0.1, 0.1), Hinge(0.1)]
LOGISTIC = [Logistic(0.3), Logistic(0.3, 0.2), RobustLogistic(0.3, 0.2)]


def label(target, **others):
    return Label(target=torch.tensor(target), **{key: torch.tensor(value) for key, value in others.items()})


def value(loss, h, **label_arguments):
    arguments = {"target": [0.5], **label_arguments}
    return loss(LogProbs.of_margin(torch.tensor([h])), label(**arguments)).item()


# ---- Values. h = 2, tau = beta = 0.1; DPO and its kin by hand from z = 0.2, softplus(-0.2) = 0.598139.


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (Logistic(0.1), 0.598139),  # DPO
        (Squared(0.1), 9.0),  # IPO: (2 - 1/(2 tau))^2
        (Logistic(0.1, label_smoothing=0.1), 0.618139),  # cDPO: DPO + 0.1 z
        (RobustLogistic(0.1, label_smoothing=0.1), 0.573139),  # DPO - 0.1/0.8 z
        (Hinge(0.1), 0.8),  # SLiC
    ],
    ids=repr,
)
def test_golden_values(loss, expected):
    assert value(loss, 2.0) == pytest.approx(expected, abs=5e-7)


def test_golden_values_of_bfpo():
    flags = Annotations.of_pairs(chosen_safe=torch.tensor([1, 1, 0, 0]), rejected_safe=torch.tensor([0, 1, 0, 1]))
    losses = Squared(0.1)(LogProbs.of_margin(torch.full((4,), 2.0)), BFPO()(flags))
    torch.testing.assert_close(losses, torch.tensor([64.0, 9.0, 49.0, 144.0]))


@pytest.mark.parametrize("h", [-30.0, -1.0, 0.0, 2.0, 700.0])
def test_a_lost_pair_costs_what_a_won_pair_of_the_opposite_margin_costs(h):
    for loss in LOSSES:
        assert value(loss, h, target=[-0.5]) == pytest.approx(value(loss, -h, target=[0.5]), rel=1e-12)


def test_losses_stay_finite_and_exact_at_large_margins():
    for h in (1e4, -1e4):
        assert value(Logistic(1.0), h) == max(0.0, -h)
        assert value(Logistic(1.0), h, target=[-0.5]) == max(0.0, h)
    assert value(Hinge(1.0), 1e4) == 0.0
    assert value(Squared(0.01), 1e4 + 50.0) == pytest.approx(1e8, rel=1e-12)


@pytest.mark.parametrize("loss", [Logistic(0.1), Logistic(0.1, 0.1), RobustLogistic(0.1, 0.1)], ids=repr)
def test_a_target_of_zero_is_a_draw(loss):
    z = torch.tensor(0.2)
    draw = -(logsigmoid(z) + logsigmoid(-z)).item() / 2  # flipping a draw changes nothing: smoothing has no effect
    assert value(loss, 2.0, target=[0.0]) == pytest.approx(draw, rel=1e-12)


def test_no_smoothing_is_dpo():
    for h in (-3.0, 0.0, 2.0):
        assert value(Logistic(0.3, 0.0), h) == value(Logistic(0.3), h)
        assert value(RobustLogistic(0.3, 0.0), h) == pytest.approx(value(Logistic(0.3), h), rel=1e-15)


def test_squared_with_helpfulness_only_is_ipo():
    h, tau = torch.linspace(-20, 60, 9), 0.02
    annotations = Annotations(pairs=torch.arange(18).view(9, 2))
    losses = Squared(tau)(LogProbs.of_margin(h), HelpfulnessOnly()(annotations))
    torch.testing.assert_close(losses, (h - 1 / (2 * tau)) ** 2)


def test_bfpo_on_safe_pairs_is_ipo():
    h, tau = torch.linspace(-20, 60, 9), 0.02
    flags = Annotations.of_pairs(chosen_safe=torch.ones(9), rejected_safe=torch.ones(9))
    losses = Squared(tau)(LogProbs.of_margin(h), BFPO(alpha=0.5)(flags))
    torch.testing.assert_close(losses, (h - 1 / (2 * tau)) ** 2)


# ---- Offset, probability


def test_offset_is_subtracted_from_the_scaled_margin():
    h, offset = torch.tensor([2.0, -1.0, 7.0]), [0.3, -0.5, 2.0]
    for loss in LOSSES:
        with_offset = loss(LogProbs.of_margin(h), label([0.5, -1.0, 1.0], offset=offset))
        shifted = loss(LogProbs.of_margin(h - torch.tensor(offset) / loss.scale), label([0.5, -1.0, 1.0]))
        torch.testing.assert_close(with_offset, shifted, rtol=1e-12, atol=1e-12)


def test_offset_by_hand():
    # z = 0.1 * 2 - 0.5 = -0.3
    assert value(Logistic(0.1), 2.0, offset=[0.5]) == pytest.approx(math.log1p(math.exp(0.3)), rel=1e-12)
    assert value(Hinge(0.1), 2.0, offset=[0.5]) == pytest.approx(1.3, rel=1e-12)
    assert value(Hinge(0.1), 2.0, offset=[0.5], target=[-1.0]) == pytest.approx(0.7, rel=1e-12)
    assert value(Squared(0.1), 2.0, offset=[0.5]) == pytest.approx(((-0.3 - 0.5) / 0.1) ** 2, rel=1e-12)


@pytest.mark.parametrize("loss", LOGISTIC, ids=repr)
@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_a_soft_preference_is_the_expectation_over_sampled_winners(loss, p):
    for h in (-4.0, 0.0, 2.5):
        sampled = p * value(loss, h, target=[1.0]) + (1 - p) * value(loss, h, target=[-1.0])
        assert value(loss, h, probability=[p]) == pytest.approx(sampled, rel=1e-12)


def test_probability_wins_over_the_sign_of_the_target():
    for loss in LOGISTIC:
        assert value(loss, 2.0, target=[-1.0], probability=[1.0]) == value(loss, 2.0, target=[1.0])


@pytest.mark.parametrize("epsilon", [0.05, 0.1, 0.3, 0.45])
def test_robust_loss_is_unbiased_under_flips(epsilon):
    robust, clean = RobustLogistic(0.7, epsilon), Logistic(0.7)
    for h in (-4.0, -0.1, 0.0, 2.5):
        for target in (0.5, -0.5):
            kept, flipped = value(robust, h, target=[target]), value(robust, h, target=[-target])
            expectation = (1 - epsilon) * kept + epsilon * flipped
            assert expectation == pytest.approx(value(clean, h, target=[target]), rel=1e-9)


@pytest.mark.parametrize("epsilon", [0.1, 0.3])
def test_label_smoothing_is_the_expected_loss_under_flips(epsilon):
    for h in (-4.0, 0.0, 2.5):
        flips = (1 - epsilon) * value(Logistic(0.7), h) + epsilon * value(Logistic(0.7), h, target=[-0.5])
        assert value(Logistic(0.7, epsilon), h) == pytest.approx(flips, rel=1e-12)


# ---- Gradients


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_gradient_matches_finite_differences(loss):
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(5, generator=generator, requires_grad=True)
    reference = torch.randn(5, generator=generator)
    pairs = torch.tensor([[0, 1], [2, 3], [4, 0], [1, 4]])  # responses shared between pairs
    asked = label([0.5, -1.0, 1.0, -0.3], offset=[0.0, 0.1, -0.2, 0.4], probability=[0.9, 0.3, 1.0, 0.0])

    def losses(policy):
        return loss(LogProbs(policy, torch.ones(5, dtype=torch.long), pairs, {REFERENCE: reference}), asked)

    assert torch.autograd.gradcheck(losses, policy)


def test_gradients_go_up_for_chosen_and_down_for_rejected():
    policy = torch.zeros(2, requires_grad=True)
    log_probs = LogProbs(policy, torch.ones(2, dtype=torch.long), torch.tensor([[0, 1]]), {REFERENCE: torch.zeros(2)})
    for loss in LOSSES:
        (gradient,) = torch.autograd.grad(loss(log_probs, label([0.5])).sum(), policy)
        assert gradient[0] < 0 < gradient[1]  # a descent step raises log-prob of chosen, lowers that of rejected
        assert gradient.sum() == 0


def test_hinge_without_a_winner_has_no_gradient():
    h = torch.tensor([-3.0, 0.0, 5.0], requires_grad=True)
    losses = Hinge(0.1)(LogProbs.of_margin(h), label([0.0, 0.0, 0.0], offset=[0.0, 1.0, 2.0]))
    losses.sum().backward()
    assert losses.tolist() == [1.0, 1.0, 1.0]
    assert h.grad.tolist() == [0.0, 0.0, 0.0]


def test_hinge_stops_at_a_scaled_margin_of_one():
    h = torch.tensor([9.0, 11.0, -11.0], requires_grad=True)
    losses = Hinge(0.1)(LogProbs.of_margin(h), label([0.5, 0.5, -0.5]))
    losses.sum().backward()
    torch.testing.assert_close(losses, torch.tensor([0.1, 0.0, 0.0]))
    torch.testing.assert_close(h.grad, torch.tensor([-0.1, 0.0, 0.0]))


def test_the_squared_loss_keeps_float32_digits():
    # The paper's tau: targets of 50 nats on margins near them; written as ((tau h - g)/tau)^2 it would lose them.
    h = torch.tensor([50.001], dtype=torch.float32)
    loss = Squared(0.01)(LogProbs.of_margin(h), Label(target=torch.tensor([0.5], dtype=torch.float32)))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx((h.double().item() - 50.0) ** 2, rel=1e-3)


# ---- Margins of log-probs


def test_margin_uses_the_pair_table_and_the_named_reference():
    log_probs = LogProbs(
        policy=torch.tensor([-1.0, -2.0, -4.0]),
        lengths=torch.tensor([2, 3, 4]),
        pairs=torch.tensor([[2, 0], [0, 1], [2, 1]]),
        references={REFERENCE: torch.tensor([-2.0, -2.5, -3.0]), "helpful": torch.tensor([-1.0, -1.0, -1.0])},
    )
    torch.testing.assert_close(log_probs.log_ratio(), torch.tensor([1.0, 0.5, -1.0]))
    torch.testing.assert_close(log_probs.margin(), torch.tensor([-2.0, 0.5, -1.5]))
    torch.testing.assert_close(log_probs.margin("helpful"), torch.tensor([-3.0, 1.0, -2.0]))


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_declarations(loss):
    assert isinstance(loss, PreferenceLoss)
    assert loss.requires.references == (REFERENCE,)
    assert loss.unit == "pair"
    assert loss.scale == 0.1
    empty = loss(LogProbs.of_margin(torch.zeros(0)), label([]))
    assert empty.shape == (0,)


# ---- The optional likelihood term


def test_safe_chosen_nll():
    policy = torch.tensor([-3.0, -5.0, -7.0, -11.0], requires_grad=True)
    log_probs = LogProbs(policy, torch.ones(4, dtype=torch.long), torch.tensor([[0, 1], [3, 2], [2, 0]]))
    annotations = Annotations(pairs=log_probs.pairs, response={"safe": torch.tensor([1.0, 1.0, 0.0, 0.5])})
    term = SafeChosenNLL(weight=0.1)(log_probs, annotations)
    term.sum().backward()
    torch.testing.assert_close(term, torch.tensor([0.3, 0.55, 0.0]))  # 0.1 * s_chosen * -log pi(chosen)
    torch.testing.assert_close(policy.grad, torch.tensor([-0.1, 0.0, 0.0, -0.05]))
    assert SafeChosenNLL(0).weight == 0
    assert SafeChosenNLL.requires.columns == ("chosen_safe",)


# ---- Argument ranges


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Squared(tau=0.0), ["Squared", "tau", "0.0"]),
        (lambda: Squared(tau=-0.1), ["Squared", "tau", "-0.1"]),
        (lambda: Squared(tau=float("inf")), ["Squared", "tau", "inf"]),
        (lambda: Squared(tau=float("nan")), ["Squared", "tau", "nan"]),
        (lambda: Logistic(beta=0.0), ["Logistic", "beta"]),
        (lambda: Logistic(beta=0.1, label_smoothing=-0.1), ["Logistic", "label_smoothing", "[0, 0.5]"]),
        (lambda: Logistic(beta=0.1, label_smoothing=0.51), ["Logistic", "label_smoothing", "[0, 0.5]"]),
        (lambda: RobustLogistic(beta=-1.0), ["RobustLogistic", "beta"]),
        (lambda: RobustLogistic(beta=0.1, label_smoothing=0.5), ["RobustLogistic", "label_smoothing", "[0, 0.5)"]),
        (lambda: RobustLogistic(beta=0.1, label_smoothing=-0.1), ["RobustLogistic", "label_smoothing"]),
        (lambda: Hinge(beta=0.0), ["Hinge", "beta"]),
        (lambda: SafeChosenNLL(weight=-0.1), ["SafeChosenNLL", "weight", "-0.1"]),
    ],
)
def test_arguments_out_of_range_are_named(make, words):
    with pytest.raises(ValueError, match="must lie in") as error:
        make()
    assert [word for word in words if word not in str(error.value)] == []


def test_the_strength_of_the_anchor_has_no_default():
    for loss in (Squared, Logistic, RobustLogistic, Hinge):
        with pytest.raises(TypeError, match=r"tau|beta"):
            loss()


def test_label_smoothing_of_a_half_is_allowed_and_ignores_who_won():
    assert value(Logistic(0.1, 0.5), 2.0) == pytest.approx(value(Logistic(0.1, 0.5), 2.0, target=[-0.5]))
