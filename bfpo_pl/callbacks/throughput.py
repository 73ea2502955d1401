"""Logs how fast and how large a run is, and what its optimizer does."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from bfpo_pl.data.loading import rank_and_world
from bfpo_pl.training import ResponseModule


class Throughput(Callback):
    """Logs pairs and tokens a second over all processes, peak memory, the learning rate and the gradient's norm.

    The share of the time that rank zero waits for data is logged as ``train/data_wait_share``.
    Peak memory is the largest of any process. The gradient's norm is taken before clipping, on the steps that are
    logged; the learning rate is the one that the step used.
    """

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._pairs = 0
        self._responses = 0
        self._tokens = 0
        self._lr = 0.0
        self._waited = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart()

    def _restart(self) -> None:
        self._since, self._pairs, self._responses, self._tokens = time.perf_counter(), 0, 0, 0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._lr = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._pairs += len(batch.pairs)
        self._responses += len(batch)
        self._tokens += batch.tokens.numel()
        assert isinstance(pl_module, ResponseModule)
        if not pl_module.should_log():
            return
        seconds = max(time.perf_counter() - self._since, 1e-9)
        _, world = rank_and_world(trainer)
        seen = torch.tensor([self._pairs, self._responses, self._tokens], dtype=torch.float64, device=pl_module.device)
        pairs, responses, tokens = (pl_module.mean_over_ranks(seen) * world / seconds).tolist()
        memory = torch.tensor(float(peak_memory(pl_module.device)), dtype=torch.float64, device=pl_module.device)
        memory = trainer.strategy.reduce(memory, reduce_op="max")
        values = {
            "train/pairs_per_second": pairs,
            "train/responses_per_second": responses,
            "train/tokens_per_second": tokens,
            "train/peak_memory_gb": memory.item() / 2**30,
            "train/lr": self._lr,
        }
        waited = getattr(trainer.train_dataloader, "waited", None)
        if waited is not None:
            values["train/data_wait_share"] = (waited - self._waited) / seconds
            self._waited = waited
        if (norm := pl_module.guard.norm) is not None:
            values["train/grad_norm"] = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        pl_module.write(values)
        self._restart()


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: the GPU's allocator's, or this process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # ru_maxrss is in kilobytes on Linux and in bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
