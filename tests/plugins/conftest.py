"""Imports the repository's plugins under the names that `bfpo` gives them, wherever pytest was started."""

import itertools
import sys
from pathlib import Path

import pytest
import torch

from bfpo_pl.batch import REFERENCE, Annotations, LogProbs
from bfpo_pl.cli import main
from bfpo_pl.reductions import Mean

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


@pytest.fixture
def fit(tmp_path, monkeypatch, float64):
    """Runs two steps of an experiment on the tiny model, with few rows; returns the CLI object."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("BFPO_PLUGINS", raising=False)

    def run(experiment, *overrides, streams=("safety", "helpfulness")):
        torch.set_default_dtype(torch.float32)  # whatever the rest of the test computes in
        few = [
            f"--data.streams.{stream}.{key}"
            for stream in streams
            for key in ("batch_size=4", "source.init_args.count=16", "source.init_args.validation_count=6")
        ]
        configs = ["-c", "configs/base.yaml", "-c", f"configs/experiment/{experiment}.yaml"]
        steps = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.enable_progress_bar=false"]
        return main(["fit", *configs, *few, *steps, "--trainer.accelerator=cpu", f"--runs={tmp_path}", *overrides])

    return run


@pytest.fixture
def bandit():
    """Trains a tabular policy over all pairs, the winner drawn by Bradley and Terry; returns its probabilities."""

    def train(labeling, loss, reward, columns, ref=(0.5, 0.3, 0.2)):
        ref, reward = torch.tensor(ref), torch.tensor(reward)
        pairs = torch.tensor(list(itertools.product(range(len(ref)), repeat=2)))
        chosen, rejected = pairs.T
        response = {name: torch.tensor(column) for name, column in columns.items()}
        label = labeling(Annotations(pairs=pairs, response=response))
        weights = label.weights * torch.sigmoid(reward[chosen] - reward[rejected])
        logits = ref.log().clone().requires_grad_()
        optimizer = torch.optim.LBFGS([logits], max_iter=400, tolerance_grad=1e-12, tolerance_change=0)
        lengths = torch.ones(len(ref), dtype=torch.long)

        def closure():
            optimizer.zero_grad()
            log_probs = LogProbs(torch.log_softmax(logits, 0), lengths, pairs, {REFERENCE: ref.log()})
            value = Mean()(loss(log_probs, label), weights, torch.tensor(len(pairs)))
            value.backward()
            return value

        optimizer.step(closure)
        return torch.softmax(logits.detach(), 0)

    return train
