"""A tabular policy, trained with the package's own labeling and loss over all pairs, reaches the closed-form optimum.

The setting: a handful of arms (whole responses to one prompt), pairs (y, y') drawn from mu x mu, the winner drawn with
probability p(y > y'). With P(y) = E_y' p(y > y') and Q(y) = E_y' s(y') p(y > y') the minimiser of the BFPO loss is

    tau log(pi/ref)(y) = b3 [s(y) (1 + (b1 - 1) P(y)) + (b1 - 1) Q(y)] - 2 alpha P(y) + const,

for every reference, every mu of full support and every p, with hard or soft flags s: the expected target of a pair is
antisymmetric, m(y, y') = p(y > y') g(y, y') - p(y' > y) g(y', y), and the least-squares fit of margins u(y) - u(y') to
it under mu x mu is u(y) = E_y' m(y, y').
"""

import dataclasses
import itertools
import math

import pytest
import torch

from bfpo_pl.batch import REFERENCE, Annotations, LogProbs
from bfpo_pl.labeling import BFPO, HelpfulnessOnly, SafetyFirst
from bfpo_pl.losses import Logistic, RobustLogistic, Squared
from bfpo_pl.reductions import Mean

pytestmark = pytest.mark.usefixtures("float64")

BEST_FIRST = torch.ones(4, 4, dtype=torch.float64).triu(1) + torch.eye(4, dtype=torch.float64) / 2
"""p(y > y') of four arms, each surely better than those after it."""


def uniform(arms):
    return torch.full((arms,), 1 / arms)


def random_preferences(arms, generator):
    """A matrix p(y > y') with p + p' = 1, not of Bradley-Terry form: cycles included."""
    upper = torch.rand(arms, arms, generator=generator).triu(1)
    return upper + (1 - upper).T.tril(-1) + torch.eye(arms) / 2


def random_distribution(arms, generator):
    return torch.softmax(torch.randn(arms, generator=generator), 0)


def train(annotate, loss, labeling, *, ref, mu, wins):
    """Trains softmax logits to convergence over every ordered outcome (chosen, rejected), weighted by how likely it is.

    Args:
        annotate: Response columns of the batch.
        wins: ``[A, A]`` p(y > y').

    Returns:
        ``[A]``, log(pi/ref), centred.
    """
    arms = len(ref)
    pairs = torch.tensor(list(itertools.product(range(arms), repeat=2)))
    chosen, rejected = pairs.unbind(1)
    label = labeling(Annotations(pairs=pairs, response=annotate))
    # Drawn as (y, y') or as (y', y), the outcome "chosen wins" is twice mu(y) mu(y') p(y > y').
    likelihood = 2 * mu[chosen] * mu[rejected] * wins[chosen, rejected]
    label = dataclasses.replace(label, weight=label.weights * likelihood * len(pairs))

    logits = ref.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=2000, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        log_probs = LogProbs(
            policy=torch.log_softmax(logits, 0),
            lengths=torch.ones(arms, dtype=torch.long),
            pairs=pairs,
            references={REFERENCE: ref.log()},
        )
        value = Mean()(loss(log_probs, label), label.weights, torch.tensor(len(pairs)))
        value.backward()
        return value

    optimizer.step(closure)
    return centred(torch.log_softmax(logits.detach(), 0) - ref.log())


def centred(values):
    return values - values.mean()


def closed_form(labeling, *, tau, safe, mu, wins):
    """``[A]``, log(pi/ref) of the optimum, centred."""
    b1, b3, alpha = labeling.b1, labeling.b3, labeling.alpha
    big_p, big_q = wins @ mu, wins @ (mu * safe)
    return centred(b3 * (safe * (1 + (b1 - 1) * big_p) + (b1 - 1) * big_q) - 2 * alpha * big_p) / tau


def close(actual, expected, atol=1e-4):
    torch.testing.assert_close(actual, torch.as_tensor(expected), rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("alpha", "safe", "expected"),
    [
        (0.5, [0, 1, 0, 1], [-0.625, 0.625, -0.375, 0.375]),
        (0.5, [0, 0, 1, 1], [-0.625, -0.375, 0.625, 0.375]),
        (0.0, [0, 1, 0, 1], [-0.25, 0.75, -0.5, 0.0]),
        (0.0, [0, 0, 1, 1], [-0.25, -0.25, 0.5, 0.0]),
    ],
)
@pytest.mark.parametrize("tau", [1.0, 0.1])
def test_four_arms_by_hand(alpha, safe, expected, tau):
    # P = (7, 5, 3, 1)/8, ties against oneself counted half. For instance the second arm of the first case, before
    # centring: Q = (1/2 + 1)/4 = 3/8, so (1/2) (1 + 2 * 5/8 + 2 * 3/8) - 5/8 = 7/8; the mean over arms is 1/4.
    labeling, safe = BFPO(b1=3.0, alpha=alpha), torch.tensor(safe, dtype=torch.float64)
    setting = {"mu": uniform(4), "wins": BEST_FIRST}
    close(closed_form(labeling, tau=1.0, safe=safe, **setting), expected, atol=1e-12)
    found = train({"safe": safe}, Squared(tau), labeling, ref=uniform(4), **setting)
    close(tau * found, expected)


def test_each_unordered_pair_once_gives_the_same_optimum():
    # What a deterministic annotator leaves: the better arm of every pair is the chosen one, six rows.
    safe, labeling = torch.tensor([0.0, 0.0, 1.0, 1.0]), BFPO()
    once = train({"safe": safe}, Squared(1.0), labeling, ref=uniform(4), mu=uniform(4), wins=BEST_FIRST.triu(1))
    close(once, [-0.625, -0.375, 0.625, 0.375])


def test_help_that_depends_on_safety_is_not_the_bilinear_form():
    # The frequently quoted (s + E s - 2 alpha)(P + 1/2) holds only if helpfulness is independent of safety.
    safe = torch.tensor([0.0, 0.0, 1.0, 1.0])
    big_p = BEST_FIRST @ uniform(4)
    bilinear = centred((safe + safe.mean() - 1) * (big_p + 0.5))
    close(bilinear, [-0.5625, -0.4375, 0.5625, 0.4375], atol=1e-12)
    found = train({"safe": safe}, Squared(1.0), BFPO(), ref=uniform(4), mu=uniform(4), wins=BEST_FIRST)
    assert (found - bilinear).abs().max() > 0.05


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize(
    ("b1", "alpha", "b3", "tau"),
    [(3.0, 0.5, None, 1.0), (3.0, 0.0, None, 0.1), (1.5, 0.7, None, 0.5), (6.0, 1.0, None, 0.05), (4.0, 0.2, 0.1, 0.3)],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_bandits(seed, b1, alpha, b3, tau, soft):
    generator, arms = torch.Generator().manual_seed(seed), 5
    ref, mu = random_distribution(arms, generator), random_distribution(arms, generator)
    wins, safe = random_preferences(arms, generator), torch.rand(arms, generator=generator)
    safe = safe if soft else safe.round()
    labeling = BFPO(b1=b1, alpha=alpha, b3=b3)
    found = train({"safe": safe}, Squared(tau), labeling, ref=ref, mu=mu, wins=wins)
    close(found, closed_form(labeling, tau=tau, safe=safe, mu=mu, wins=wins))


@pytest.mark.parametrize("seed", range(3))
def test_safe_arms_end_above_unsafe_ones_by_half_and_are_ordered_by_helpfulness(seed):
    generator, arms, tau = torch.Generator().manual_seed(seed), 6, 0.2
    safe = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    score = torch.randn(arms, generator=generator)
    wins = torch.sigmoid(score[:, None] - score[None, :])
    mu, ref = random_distribution(arms, generator), random_distribution(arms, generator)
    reward = tau * train({"safe": safe}, Squared(tau), BFPO(), ref=ref, mu=mu, wins=wins)
    assert reward[safe == 1].min() - reward[safe == 0].max() >= 0.5 - 1e-6
    assert torch.equal(reward[safe == 1].argsort(), score[safe == 1].argsort())
    assert torch.equal(reward[safe == 0].argsort(), score[safe == 0].argsort(descending=True))  # in reverse


def test_soft_flags_have_the_optimum_of_sampled_flags():
    generator, arms, tau = torch.Generator().manual_seed(7), 4, 0.5
    ref, mu = random_distribution(arms, generator), random_distribution(arms, generator)
    wins, safe = random_preferences(arms, generator), torch.rand(arms, generator=generator)
    labeling = BFPO(b1=2.5, alpha=0.3)
    soft = train({"safe": safe}, Squared(tau), labeling, ref=ref, mu=mu, wins=wins)

    # The same policy on pairs whose flags were sampled: each of the four outcomes of (s, s') by its probability.
    pairs, flags, weights = [], [], []
    for (y, z), (s, t) in itertools.product(
        itertools.product(range(arms), repeat=2), itertools.product((0.0, 1.0), repeat=2)
    ):
        pairs.append((y, z))
        flags.append((s, t))
        p_flags = (safe[y] if s else 1 - safe[y]) * (safe[z] if t else 1 - safe[z])
        weights.append(mu[y] * mu[z] * wins[y, z] * p_flags)
    chosen_safe, rejected_safe = torch.tensor(flags).T
    label = labeling(
        Annotations(pairs=torch.tensor(pairs), pair={"chosen_safe": chosen_safe, "rejected_safe": rejected_safe})
    )
    log_ratio = soft.clone().requires_grad_()
    log_probs = LogProbs(
        policy=log_ratio + ref.log(),
        lengths=torch.ones(arms, dtype=torch.long),
        pairs=torch.tensor(pairs),
        references={REFERENCE: ref.log()},
    )
    (torch.stack(weights) * Squared(tau)(log_probs, label)).sum().backward()
    close(log_ratio.grad, torch.zeros(arms), atol=1e-7)  # the optimum of the soft flags is stationary here too


@pytest.mark.parametrize("seed", range(3))
def test_all_safe_with_alpha_one_half_is_ipo(seed):
    generator, arms, tau = torch.Generator().manual_seed(seed), 5, 0.1
    ref, mu = random_distribution(arms, generator), random_distribution(arms, generator)
    setting = {"ref": ref, "mu": mu, "wins": random_preferences(arms, generator)}
    bfpo = train({"safe": torch.ones(arms)}, Squared(tau), BFPO(alpha=0.5), **setting)
    ipo = train({}, Squared(tau), HelpfulnessOnly(), **setting)
    close(bfpo, ipo, atol=1e-7)
    close(ipo, centred(setting["wins"] @ mu) / tau)  # Azar et al.: tau log(pi/ref) = P + const
    unsafe = train({"safe": torch.zeros(arms)}, Squared(tau), BFPO(alpha=0.5), **setting)
    close(unsafe, -ipo)  # all unsafe: the order is inverted


@pytest.mark.parametrize("seed", range(2))
def test_dpo_recovers_the_reward_of_a_bradley_terry_annotator(seed):
    generator, arms, beta = torch.Generator().manual_seed(seed), 5, 0.5
    ref, mu = random_distribution(arms, generator), random_distribution(arms, generator)
    score = torch.randn(arms, generator=generator)
    wins = torch.sigmoid(score[:, None] - score[None, :])
    close(train({}, Logistic(beta), HelpfulnessOnly(), ref=ref, mu=mu, wins=wins), centred(score) / beta)
    # A fifth of the labels flipped: the robust loss still finds the reward, plain DPO does not.
    flipped = 0.8 * wins + 0.2 * wins.T
    robust = train({}, RobustLogistic(beta, 0.2), HelpfulnessOnly(), ref=ref, mu=mu, wins=flipped)
    close(robust, centred(score) / beta)
    plain = train({}, Logistic(beta), HelpfulnessOnly(), ref=ref, mu=mu, wins=flipped)
    assert (plain - centred(score) / beta).abs().max() > 0.1


def expected_target(labeling, chosen_safe, rejected_safe, wrong):
    """E g over flags that are each wrong with a probability, by going through all four cases."""
    total = 0.0
    for chosen_wrong in (0, 1):
        for rejected_wrong in (0, 1):
            safe = torch.tensor([float(abs(chosen_safe - chosen_wrong)), float(abs(rejected_safe - rejected_wrong))])
            flags = Annotations(torch.tensor([[0, 1]]), response={"safe": safe})
            weight = math.prod(wrong if each else 1 - wrong for each in (chosen_wrong, rejected_wrong))
            total += weight * labeling(flags).target.item()
    return total


@pytest.mark.parametrize("wrong", [0.0, 0.1, 0.2, 0.4])
@pytest.mark.parametrize("pair", [(1, 1), (1, 0), (0, 0), (0, 1)])
def test_wrong_flags_scale_the_targets_of_bfpo(wrong, pair):
    """docs/ablations.md: at the paper's values noise scales every target by 1 - 2e."""
    assert expected_target(BFPO(3.0, 0.5), *pair, wrong) == pytest.approx(
        (1 - 2 * wrong) * expected_target(BFPO(3.0, 0.5), *pair, 0.0), abs=1e-12
    )


@pytest.mark.parametrize("wrong", [0.0, 0.1, 0.2, 0.4])
def test_wrong_flags_turn_safety_first_around(wrong):
    """docs/ablations.md: a conflict pair's target passes 0 at e = 1 - 1/sqrt(2)."""
    conflict = expected_target(SafetyFirst(), 0, 1, wrong)
    assert conflict == pytest.approx((1 - 2 * (1 - wrong) ** 2) / 2, abs=1e-12)
    assert (conflict > 0) == (wrong > 1 - 1 / math.sqrt(2))
    both_unsafe = expected_target(SafetyFirst(), 0, 0, wrong)
    assert both_unsafe == pytest.approx((1 - 2 * wrong * (1 - wrong)) / 2, abs=1e-12)
