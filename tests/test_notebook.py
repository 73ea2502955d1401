"""What a notebook uses: the loss in six lines, and a run's model."""

from __future__ import annotations

import pytest
import torch

import bfpo_pl


def test_the_loss_in_six_lines():
    annotations = bfpo_pl.Annotations.of_pairs(chosen_safe=[1, 1, 0, 0], rejected_safe=[1, 0, 0, 1])
    label = bfpo_pl.BFPO(b1=3.0, alpha=0.5)(annotations)
    margin = torch.full((4,), 2.0, requires_grad=True)
    loss = bfpo_pl.Squared(tau=0.1)(bfpo_pl.LogProbs.of_margin(margin), label)
    loss.mean().backward()
    assert loss.tolist() == pytest.approx([9, 64, 49, 144])
    assert margin.grad.tolist() == pytest.approx([(2 - target) / 2 for target in (5, 10, -5, -10)])


def test_load_a_run(bfpo, base, small, tmp_path):
    run = bfpo("fit", *base, *small)
    for path in (run.run_folder, run.run_folder / "export"):
        model, tokenizer = bfpo_pl.load(path)
        assert not model.training
        assert torch.equal(model.get_input_embeddings().weight, run.model.policy.get_input_embeddings().weight)
        assert tokenizer.chat_template
    with pytest.raises(bfpo_pl.UserError, match="no exported model"):
        bfpo_pl.load(tmp_path / "nowhere")
