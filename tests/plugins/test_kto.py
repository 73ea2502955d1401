"""KTO: its check values, the anchor z0, which responses are desirable, and the mismatched responses of the data."""

import pytest
import torch

from bfpo_pl.batch import REFERENCE, Annotations, Label, LogProbs, Requirements
from bfpo_pl.component import UserError
from bfpo_pl.data.adapters import Columns
from plugins.kto import KTO, Desirable, WithMismatched

pytestmark = pytest.mark.usefixtures("float64")


def log_probs(ratios):
    size = len(ratios)
    return LogProbs(
        ratios, torch.ones(size, dtype=torch.long), torch.zeros(0, 2).long(), {REFERENCE: torch.zeros(size)}
    )


def losses(ratios, targets, loss):
    return loss(log_probs(torch.tensor(ratios)), Label(target=torch.tensor(targets)))


@pytest.mark.parametrize("estimated", [True, False])
def test_check_values(estimated):
    loss = KTO(0.1) if estimated else KTO(0.1, z0=0.5)
    values = losses([2.0, 2.0, 0.9, 0.1], [0.5, -0.5, 0.0, 0.0], loss)  # the mismatched ones have the mean 0.5
    torch.testing.assert_close(values[:2], torch.tensor([0.462570, 0.537430]), rtol=0, atol=5e-7)


@pytest.mark.parametrize(("mismatched", "z0"), [([-3.0, -1.0], 0.0), ([], 0.0), ([-1.0, 3.0], 1.0)])
def test_z0_is_clamped_at_zero_and_needs_no_mismatched_response(mismatched, z0):
    targets = [0.5, -0.5] + [0.0] * len(mismatched)
    values = losses([2.0, 2.0, *mismatched], targets, KTO(0.1))
    torch.testing.assert_close(values[:2], losses([2.0, 2.0], [0.5, -0.5], KTO(0.1, z0=z0)))


def test_gradients_and_none_through_z0():
    ratios = torch.tensor([2.0, 2.0, 0.9, 0.1], requires_grad=True)
    targets = torch.tensor([0.5, -0.5, 0.0, 0.0])
    values = KTO(0.1)(log_probs(ratios), Label(target=targets))
    # Unequal weights: with equal ones what would flow through z0 cancels.
    (gradient,) = torch.autograd.grad(3 * values[0] + values[1], ratios)
    slope = 0.1 * (1 - 0.462570) * 0.462570
    torch.testing.assert_close(gradient, torch.tensor([-3 * slope, slope, 0.0, 0.0]), rtol=0, atol=1e-7)


def test_fixed_z0_of_zero_is_apo_zero_unpaired():
    r = torch.tensor(1.3)
    values = losses([1.3, 1.3], [0.5, -0.5], KTO(0.1, z0=0.0))
    torch.testing.assert_close(values, torch.stack([1 - torch.sigmoid(0.1 * r), torch.sigmoid(0.1 * r)]))


def quadrants(**columns):
    safe = torch.tensor([1, 0, 1, 1, 0, 1, 0, 0], dtype=torch.float64)
    return Annotations(torch.arange(8).view(4, 2), {"safe": safe, **columns})


def test_a_response_is_desirable_if_safe_and_no_safe_one_beats_it():
    # (safe, unsafe), (safe, safe), (unsafe, safe), (unsafe, unsafe)
    label = Desirable()(quadrants())
    assert (label.target > 0).tolist() == [True, False, True, False, False, True, False, False]
    assert label.weights.tolist() == [1] * 8


def test_weights_and_mismatched_responses():
    mismatched = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1], dtype=torch.float64)
    label = Desirable(desirable_weight=2.0, undesirable_weight=0.5)(quadrants(mismatched=mismatched))
    assert label.weights.tolist() == [2, 0.5, 2, 0.5, 0.5, 2, 0, 0]
    assert label.target[-2:].tolist() == [0, 0]


def test_the_column_is_required_unless_z0_is_fixed():
    assert KTO(0.1).requires == Requirements(("mismatched",), (REFERENCE,))
    assert KTO(0.1, z0=0.0).requires == Requirements((), (REFERENCE,))


def test_arguments_out_of_range_are_refused():
    for make in (lambda: KTO(0.0), lambda: KTO(0.1, z0=-1.0), lambda: Desirable(desirable_weight=-1.0)):
        with pytest.raises(UserError):
            make()


def test_rows_get_the_responses_of_the_row_before():
    adapter = WithMismatched(Columns(extras=["chosen_score", "rejected_score"]))

    def row(prompt, name):
        raw = {"prompt": prompt, "chosen": f"{name}1", "rejected": f"{name}2", "chosen_safe": 1, "rejected_safe": 0}
        return adapter(raw | {"chosen_score": 3, "rejected_score": 2}, name)

    first, second, third = row("p", "a"), row("q", "b"), row("q", "c")
    assert (first.responses, first.columns["mismatched"]) == (("a1", "a2"), (0, 0))
    assert (second.responses, second.pairs) == (("b1", "b2", "a1", "a2"), ((0, 1),))
    assert second.columns == {"safe": (1, 0, 0, 0), "score": (3, 2, 0, 0), "mismatched": (0, 0, 1, 1)}
    assert third.responses == ("c1", "c2")  # the same prompt before it: nothing mismatched there


def test_no_row_borrows_from_another_split_or_an_earlier_reading():
    adapter = WithMismatched(Columns())

    def read(*origins):
        flags = {"chosen_safe": 1, "rejected_safe": 0}
        return [len(adapter({"prompt": o, "chosen": "1", "rejected": "2", **flags}, o).responses) for o in origins]

    train, validation = ("data[train]:0", "data[train]:1", "data[train]:5"), ("data[test]:6", "data[test]:10")
    assert read(*train) == [2, 4, 4]
    assert read(*validation) == [2, 4]
    assert read(*train) == [2, 4, 4]
    assert read(*train) == [2, 4, 4]
    assert read("f:1") == read("f:1") == [2]


def test_experiment_runs_with_mismatched_responses_and_learns_none_of_them(fit):
    cli = fit("kto")
    assert cli.trainer.global_step == 2
    assert "val/all/all/reward_margin" in cli.trainer.callback_metrics
    batch = next(iter(cli.datamodule.train_dataloader()))
    mismatched = batch.annotations["mismatched"]
    assert mismatched.sum() >= len(batch.pairs)
    assert not mismatched[batch.pairs].any()
    objective = cli.model.objective(batch)
    learned = objective.losses * objective.label.weights
    count = [(objective.label.weights[batch.response_stream == k] > 0).sum() for k in (0, 1)]
    expected = sum(learned[batch.response_stream == k].sum() / count[k] for k in (0, 1))
    torch.testing.assert_close(objective.loss, expected)
    assert count == [8, 8]


def test_plain_adapters_need_a_fixed_z0(fit, capsys):
    plain = ["--data.streams.safety.adapter=PKUSafeRLHF", "--data.streams.helpfulness.adapter=UltraFeedbackBinarized"]
    with pytest.raises(SystemExit):
        fit("kto", *plain)
    assert "needs the column 'mismatched'" in capsys.readouterr().err
    assert fit("kto", *plain, "--model.loss.z0=0").trainer.global_step == 2


def test_a_labeling_of_pairs_is_refused(fit, capsys):
    with pytest.raises(SystemExit):
        fit("kto", "--model.labeling=HelpfulnessOnly")
    assert "needs a label for each response" in capsys.readouterr().err
