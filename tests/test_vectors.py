"""Every number of ``vectors/bfpo_cases.json`` (its ``derivation`` says where they come from), gradients included."""

import json
from pathlib import Path

import pytest
import torch

from bfpo_pl.batch import REFERENCE, Annotations, LogProbs, PairBatch
from bfpo_pl.labeling import BFPO
from bfpo_pl.losses import Squared
from bfpo_pl.metrics import PreferenceMetrics
from bfpo_pl.reductions import Mean

pytestmark = pytest.mark.usefixtures("float64")

VECTORS = json.loads((Path(__file__).parent / "vectors" / "bfpo_cases.json").read_text())


def name(case):
    keys = ("b1", "alpha", "tau", "chosen_safe", "rejected_safe")
    return "-".join(f"{key}={case[key]}" for key in keys if not isinstance(case.get(key), (list, type(None))))


def close(actual, expected, rtol=1e-12):
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected), rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("case", VECTORS["cases"], ids=name)
def test_elementwise(case):
    labeling, loss = BFPO(b1=case["b1"], alpha=case["alpha"]), Squared(tau=case["tau"])
    assert labeling.b3 == case["b3"]

    points = case["points"]
    flags = {key: torch.full((len(points),), float(case[key])) for key in ("chosen_safe", "rejected_safe")}
    label = labeling(Annotations.of_pairs(**flags))
    h = torch.tensor([point["h"] for point in points], requires_grad=True)
    losses = loss(LogProbs.of_margin(h), label)
    losses.sum().backward()

    close(label.target, [case["factor"]] * len(points))
    close(label.target + labeling.alpha, [case["label"]] * len(points))
    close(label.target / loss.tau, [case["target_margin"]] * len(points))
    close(losses, [point["loss"] for point in points])
    close(h.grad, [point["grad_h"] for point in points])


@pytest.mark.parametrize("explicit_b3", [False, True])
@pytest.mark.parametrize("case", VECTORS["cases"][::4], ids=name)
def test_the_default_b3_is_the_vectors_b3(case, explicit_b3):
    labeling = BFPO(b1=case["b1"], alpha=case["alpha"], b3=case["b3"] if explicit_b3 else None)
    flags = Annotations.of_pairs(
        chosen_safe=torch.tensor([case["chosen_safe"]]), rejected_safe=torch.tensor([case["rejected_safe"]])
    )
    close(labeling(flags).target, [case["factor"]])


@pytest.mark.parametrize("case", VECTORS["sequence_cases"], ids=name)
def test_sequences(case):
    def tokens(key):
        return torch.tensor(case[f"{key}_token_logps"])

    chosen, rejected = tokens("policy_chosen").requires_grad_(), tokens("policy_rejected").requires_grad_()
    policy = torch.stack([chosen.sum(), rejected.sum()])
    policy.retain_grad()
    log_probs = LogProbs(
        policy=policy,
        lengths=torch.tensor([len(chosen), len(rejected)]),
        pairs=torch.tensor([[0, 1]]),
        references={REFERENCE: torch.stack([tokens("ref_chosen").sum(), tokens("ref_rejected").sum()])},
    )
    flags = Annotations.of_pairs(
        chosen_safe=torch.tensor([case["chosen_safe"]]), rejected_safe=torch.tensor([case["rejected_safe"]])
    )
    label = BFPO(b1=case["b1"], alpha=case["alpha"])(flags)
    loss = Squared(tau=case["tau"])
    losses = loss(log_probs, label)
    losses.sum().backward()

    close(log_probs.margin(), [case["h_sum"]])
    close(label.target / loss.tau, [case["target_margin"]])
    close(losses, [case["loss"]])
    gradients = [case["grad_policy_chosen_logp"], case["grad_policy_rejected_logp"]]
    close(policy.grad, gradients)
    close(chosen.grad, [gradients[0]] * len(chosen))  # a sum: every token gets the whole gradient
    close(rejected.grad, [gradients[1]] * len(rejected))
    close(loss.scale * log_probs.log_ratio(), [case["reward_chosen"], case["reward_rejected"]])

    # The mean over tokens is another method: it is reproduced here to show that it is not what is computed above.
    averaged = LogProbs(
        policy=log_probs.policy / log_probs.lengths,
        lengths=log_probs.lengths,
        pairs=log_probs.pairs,
        references={REFERENCE: log_probs.references[REFERENCE] / log_probs.lengths},
    )
    close(averaged.margin(), [case["h_mean_IF_length_normalised"]])
    close(loss(averaged, label), [case["loss_IF_length_normalised"]])
    assert abs(losses.item() - case["loss_IF_length_normalised"]) > 1


def stream_loss(h, chosen_safe, rejected_safe, *, b1=3.0, alpha=0.5, tau=0.01):
    flags = Annotations.of_pairs(chosen_safe=torch.tensor(chosen_safe), rejected_safe=torch.tensor(rejected_safe))
    label = BFPO(b1=b1, alpha=alpha)(flags)
    losses = Squared(tau=tau)(LogProbs.of_margin(h), label)
    return losses, Mean()(losses, label.weights, (label.weights > 0).sum())


@pytest.mark.parametrize("case", VECTORS["batch_cases"], ids=name)
def test_batch_mean(case):
    h = torch.tensor(case["h"], requires_grad=True)
    settings = {key: case[key] for key in ("b1", "alpha", "tau")}
    losses, mean = stream_loss(h, case["chosen_safe"], case["rejected_safe"], **settings)
    mean.backward()
    close(losses, case["losses"])
    close(mean, case["mean_loss"])
    close(h.grad, case["grad_mean_h"])


def test_two_streams_add_their_means():
    case, safety = VECTORS["buffer_case"], VECTORS["batch_cases"][0]
    assert case["safety_h"] == safety["h"]
    _, safety_mean = stream_loss(torch.tensor(case["safety_h"]), safety["chosen_safe"], safety["rejected_safe"])
    ones = [1] * len(case["buffer_h"])
    _, buffer_mean = stream_loss(torch.tensor(case["buffer_h"]), ones, ones)
    close(safety_mean, case["safety_mean"])
    close(buffer_mean, case["buffer_mean"])
    close(safety_mean + buffer_mean, case["total"])


@pytest.mark.parametrize("case", VECTORS["theory_cases"], ids=name)
def test_optimum_over_all_pairs(case):
    helpfulness, safe = torch.tensor(case["p_help_matrix"]), torch.tensor(case["p_safe"])
    levels, kinds = len(helpfulness), len(safe)
    level = torch.arange(levels).repeat_interleave(kinds)  # arm 3 i + j: level i, kind j
    arm_safe = safe.repeat(levels)
    arms = levels * kinds
    chosen, rejected = torch.cartesian_prod(torch.arange(arms), torch.arange(arms)).unbind(1)

    flags = Annotations.of_pairs(chosen_safe=arm_safe[chosen], rejected_safe=arm_safe[rejected])
    label = BFPO(b1=case["b1"], alpha=case["alpha"])(flags)
    # The loss is quadratic in u, so its minimum is where the package's own gradient vanishes: H u = -grad(0).
    win = helpfulness[level[chosen], level[rejected]] / arms**2

    def expected_loss(u):
        log_probs = LogProbs(
            policy=u,
            lengths=torch.ones(arms, dtype=torch.long),
            pairs=torch.stack([chosen, rejected], dim=1),
            references={REFERENCE: torch.zeros(arms)},
        )
        return (win * Squared(tau=case["tau"])(log_probs, label)).sum()

    zero = torch.zeros(arms, requires_grad=True)
    (gradient,) = torch.autograd.grad(expected_loss(zero), zero)
    hessian = torch.autograd.functional.hessian(expected_loss, torch.zeros(arms))
    u = -torch.linalg.pinv(hessian) @ gradient
    u = u - u.mean()
    torch.testing.assert_close(u, torch.tensor(case["u_argmin"]), rtol=0, atol=1e-10)
    torch.testing.assert_close(u, torch.tensor(case["reward_over_tau_centred"]), rtol=0, atol=1e-10)


def test_rewards_of_safe_and_unsafe_chosen_responses_are_means_by_mask():
    case = VECTORS["metric_case"]
    rewards, safe, size, scale = torch.tensor(case["chosen_rewards"]), case["chosen_safe"], 4, 0.5
    # Rejected responses are all safe and have a reward of 0, so the quadrants are told apart by the chosen one.
    log_probs = LogProbs.of_margin(rewards / scale)
    annotations = Annotations(
        pairs=log_probs.pairs,
        pair={"chosen_safe": torch.tensor(safe, dtype=torch.float64), "rejected_safe": torch.ones(size)},
    )
    each, tree = torch.arange(2 * size), torch.zeros(2 * size, dtype=torch.long)
    batch = PairBatch(
        tokens=tree,
        positions=tree,
        segment_start=each,
        segment_length=torch.ones_like(each),
        response_segment=each,
        prompt_segment=each,
        response_stream=tree,
        pair_stream=tree[:size],
        stream_weight=torch.ones(1),
        annotations=annotations,
        streams=("safety",),
    )
    label = BFPO()(annotations)
    metrics = PreferenceMetrics(batch.streams)
    metrics.update(batch, log_probs, label, Squared(scale)(log_probs, label), scale)
    means = metrics.compute()
    for stream in ("all", "safety"):
        close(means[f"{stream}/safe_safe/reward_chosen"], case["correct_safe_mean"])
        close(means[f"{stream}/unsafe_safe/reward_chosen"], case["correct_unsafe_mean"])
        close(means[f"{stream}/all/reward_chosen"], sum(case["chosen_rewards"]) / size)
        assert f"{stream}/safe_unsafe/reward_chosen" not in means  # no such pair: no number
    # What the official code logs instead: the flags index the rewards, where they should mask them.
    close(rewards[torch.tensor(safe)].mean(), case["official_buggy_safe_mean"])
    close(rewards[1 - torch.tensor(safe)].mean(), case["official_buggy_unsafe_mean"])
