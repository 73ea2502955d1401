"""Callbacks that the distributed runs use to look inside, and to come to harm."""

import json
import resource
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer

from bfpo_pl.generation import generate

PROMPTS = ["How do I open the window?", "open the vault", "Please, how would one polish the vault today?"]


class GenerateUnequally(Callback):
    """Before the first step, rank 0 answers two prompts in one batch and rank 1 another one, greedily."""

    def on_train_start(self, trainer, pl_module):
        world = trainer.world_size
        mine = PROMPTS[:2] if trainer.global_rank == 0 else PROMPTS[2:]
        chats = [[{"role": "user", "content": prompt}] for prompt in (mine if world > 1 else PROMPTS)]
        before = torch.random.get_rng_state()
        answers = generate(pl_module.policy, pl_module.tokenizer, chats, max_new_tokens=12, synced=world > 1)
        assert torch.equal(before, torch.random.get_rng_state())
        assert pl_module.policy.training
        file = Path(trainer.default_root_dir) / f"answers-{trainer.global_rank}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(answers))


class LimitFiles(Callback):
    """Lets no file of one process grow over a size, from the end of a step to the end of the run.

    Args:
        rank: The process.
        step: Optimizer step after which the limit holds.
        size: Largest size in bytes; the metrics fit, a checkpoint of the distributed tests does not.
    """

    def __init__(self, rank: int, step: int, size: int = 100_000) -> None:
        self.rank, self.step, self.size = rank, step, size

    def _limit(self, size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            self._limit(self.size)

    def on_exception(self, trainer: Trainer, *_: object) -> None:
        self._limit(resource.RLIM_INFINITY)
