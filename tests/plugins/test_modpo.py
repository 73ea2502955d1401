"""MODPO: its check value, its two sources of the margin reward, and its optimum."""

import pytest
import torch

from bfpo_pl.batch import REFERENCE, Annotations, LogProbs, Requirements
from bfpo_pl.component import UserError
from bfpo_pl.labeling import HelpfulnessOnly
from bfpo_pl.losses import Logistic
from plugins.modpo import MODPO, MarginReward

pytestmark = pytest.mark.usefixtures("float64")

SCORES = Annotations.of_pairs(chosen_score=torch.tensor([1.0]), rejected_score=torch.tensor([0.4]))


def test_check_value_and_gradient():
    # z = (0.1 * 2 - 0.5 * (1 - 0.4)) / 0.5 = -0.2
    margin = torch.tensor([2.0], requires_grad=True)
    loss = MODPO(0.1, 0.5)(LogProbs.of_margin(margin), MarginReward()(SCORES))
    assert loss.item() == pytest.approx(0.798139, abs=5e-7)
    (gradient,) = torch.autograd.grad(loss.sum(), margin)
    assert gradient.item() == pytest.approx(-0.1 / 0.5 * torch.sigmoid(torch.tensor(0.2)).item())


def test_named_reference_as_margin_model():
    # m = beta (log pi_m - log pi_ref): 0.1 * (10 - 4) = 0.6, the same margin as by the scores above.
    log_probs = LogProbs(
        policy=torch.tensor([-3.0, -7.0]),
        lengths=torch.ones(2, dtype=torch.long),
        pairs=torch.tensor([[0, 1]]),
        references={REFERENCE: torch.tensor([-5.0, -7.0]), "safety": torch.tensor([5.0, -3.0])},
    )
    loss = MODPO(0.1, 0.5, margin_reference="safety")
    assert loss(log_probs, HelpfulnessOnly()(SCORES)).item() == pytest.approx(0.798139, abs=5e-7)
    assert loss.requires == Requirements(references=(REFERENCE, "safety"))


def test_all_weight_on_the_preferences_is_dpo():
    log_probs = LogProbs.of_margin(torch.tensor([2.0]))
    dpo = Logistic(0.1)(log_probs, HelpfulnessOnly()(SCORES))
    torch.testing.assert_close(MODPO(0.1, 1.0)(log_probs, MarginReward()(SCORES)), dpo)


def test_optimum_is_the_linear_scalarisation(bandit):
    # w0 = 1/(1 + lam) and beta w0: the optimum of r + lam g at beta.
    beta, lam = 0.5, 0.7
    reward, other = (1.0, 0.0, 0.5), (-1.0, 1.0, 0.0)
    w0 = 1 / (1 + lam)
    found = bandit(MarginReward("cost"), MODPO(beta * w0, w0), reward, {"cost": other})
    exponent = (torch.tensor(reward) + lam * torch.tensor(other)) / beta
    expected = torch.softmax(torch.tensor((0.5, 0.3, 0.2)).log() + exponent, 0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_column_is_required_by_its_name():
    labeling = MarginReward("helpfulness")
    assert labeling.requires.columns == ("chosen_helpfulness", "rejected_helpfulness")
    assert repr(labeling) == "MarginReward(column='helpfulness')"


def test_w0_out_of_range_is_refused():
    with pytest.raises(UserError, match=r"MODPO: w0 must lie in \(0, 1\]"):
        MODPO(0.1, 0.0)


def test_experiment_runs(fit):
    cli = fit("modpo")
    assert cli.trainer.global_step == 2
    assert cli.model.labeling.column == "safe"


def test_score_column_of_the_data(fit, tmp_path):
    streams = tmp_path / "streams.yaml"
    streams.write_text(
        "data:\n  streams:\n    helpfulness:\n"
        "      source: {class_path: MicroworldHelpfulness, init_args: {count: 8}}\n"
        "      adapter: UltraFeedbackBinarized\n      batch_size: 4\n  driver: helpfulness\n"
    )
    # The file replaces both streams.
    column = "--model.labeling.column=score"
    cli = fit("modpo", "-c", str(streams), column, "--trainer.limit_val_batches=0", streams=("helpfulness",))
    assert cli.trainer.global_step == 2
    batch = next(iter(cli.datamodule.train_dataloader()))
    scores = batch.annotations
    assert torch.equal(cli.model.labeling(scores).offset, scores["chosen_score"] - scores["rejected_score"])
    assert (scores["chosen_score"] > scores["rejected_score"]).all()


def test_a_stream_without_the_column_stops_the_run(fit, capsys):
    with pytest.raises(SystemExit) as stop:
        fit("modpo", "--model.labeling.column=score")
    assert stop.value.code == 2
    assert "needs the column 'chosen_score', which the stream 'safety' lacks" in capsys.readouterr().err


def test_a_missing_margin_model_stops_the_run(fit, capsys):
    with pytest.raises(SystemExit):
        fit("modpo", "--model.labeling=HelpfulnessOnly", "--model.loss.margin_reference=safety")
    assert "needs the reference model(s) safety" in capsys.readouterr().err
