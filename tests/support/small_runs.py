"""Command lines of small runs to export, and what is compared of them."""

from __future__ import annotations

from pathlib import Path

import torch

REPOSITORY = Path(__file__).parents[2]
BASE = ["-c", str(REPOSITORY / "configs/base.yaml"), "-c", str(REPOSITORY / "configs/experiment/bfpo.yaml")]
SMALL = [
    *("--trainer.max_steps=4", "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1"),
    *("--trainer.val_check_interval=2", "--checkpoint.every_n_train_steps=2", "--checkpoint.save_top_k=-1"),
    *("--checkpoint.monitor=step", "--checkpoint.mode=min"),
    *("--data.streams.safety.source.count=40", "--data.streams.safety.source.validation_count=12"),
    *("--data.streams.safety.batch_size=4", "--data.streams.helpfulness.source.count=40"),
    *("--data.streams.helpfulness.batch_size=4", "--model.optimizer.lr=0.01", "--model.schedule.warmup=0"),
]
TINY = ["--model.policy.hidden_size=32", "--model.policy.layers=2", "--model.policy.heads=2"]
LORA = ["--model.trainable=LoRA", "--model.trainable.r=4", "--model.reference=AdapterOff"]
SHARDED = ["-c", str(REPOSITORY / "configs/strategy/fsdp2.yaml"), "--trainer.devices=1"]
TOKENS = torch.tensor([[1, 9, 14, 30, 3, 8, 25, 40, 2]])


def logits(model) -> torch.Tensor:
    """Logits of a fixed row."""
    model.eval()
    with torch.no_grad():
        return model(TOKENS).logits


def checkpoint(run: Path, step: int) -> Path:
    """The run's checkpoint of a step."""
    return next(path for path in (run / "checkpoints").glob("*.ckpt") if f"step={step}" in path.name)
