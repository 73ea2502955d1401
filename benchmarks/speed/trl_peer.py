"""TRL's DPOTrainer as the peer, at its best settings for this work."""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bfpo_pl.data.trees import PairTree
from speed.steps import CLIP, TAU, Setting, Step

SWITCHED_ON = [
    "loss_type=ipo, beta such that the loss at policy = reference is 25, as ours",
    "our optimizer, fused AdamW, with the same hyperparameters; AdamW32 on a GPU, where weights are bfloat16",
    "gradient_checkpointing=False on a CPU, as ours; on a GPU with and without it",
    "bf16 autocast by accelerator.prepare where ours has autocast",
    "precompute_ref_log_probs=True in the cached variants, by its own compute_ref_log_probs",
    "response rows alone meet the vocabulary (its behaviour on GPUs, forced on CPU) except in 'as shipped'",
    "driven by training_step(), gradient clipping and optimizer step: no logging, no callbacks, no data loader",
    "no max_length, no padding to a multiple; batches padded to their longest row by its own collator",
    "its metrics (entropy, mean logits, top-1) are computed in every step and cannot be switched off; "
    "'without metrics' leaves out those of the vocabulary by a patch of ours",
]


def available() -> str | None:
    """Version of TRL; None if it is not installed."""
    if importlib.util.find_spec("trl") is None:
        return None
    import trl

    return trl.__version__


class TRL(Step):
    """One step of `trl.DPOTrainer`.

    Args:
        setting: Model, precision and device.
        reference: ``cached`` or ``live``.
        compact: Whether only response positions meet the vocabulary.
        metrics: Whether the vocabulary-wide metrics are computed, as they are in every step of TRL.
    """

    def __init__(self, setting: Setting, reference: str = "live", compact: bool = True, metrics: bool = True) -> None:
        self.setting, self.cached = setting, reference == "cached"
        self.compact, self.metrics = compact, metrics
        self._folder = tempfile.TemporaryDirectory()
        self.trainer = self._trainer()
        optimizer = setting.optimizer_of(self.trainer.model.parameters())
        accelerator = self.trainer.accelerator
        # Without prepare the policy would run in float32 whatever `bf16` says.
        self.model, self.optimizer = accelerator.prepare(self.trainer.model, optimizer)
        self.trainer.model_wrapped, self.trainer.optimizer = self.model, self.optimizer
        self.trainer.current_gradient_accumulation_steps = 1

    def _trainer(self) -> Any:
        from datasets import Dataset
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast
        from trl import DPOConfig, DPOTrainer

        words = {"<pad>": 0, "<s>": 1, "</s>": 2, "ask": 3, " good": 4, " bad": 5}
        core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
        config = DPOConfig(
            output_dir=self._folder.name,
            loss_type="ipo",
            beta=TAU,
            bf16=self.setting.precision != "float32",
            use_cpu=self.setting.device == "cpu",
            gradient_checkpointing=self.setting.checkpointing != "none",
            gradient_checkpointing_kwargs={"use_reentrant": False},
            precompute_ref_log_probs=self.cached,
            optim="adamw_torch_fused",
            max_grad_norm=CLIP,
            max_length=None,
            report_to=[],
            disable_tqdm=True,
            dataloader_num_workers=0,
        )
        # A trainer wants a dataset; its own collator is later given the rows that are timed.
        rows = Dataset.from_list([{"prompt": "ask", "chosen": " good", "rejected": " bad"}])
        frozen = None if self.cached else self.setting.model.load_model()
        return DPOTrainer(
            self.setting.model.load_model(), frozen, config, train_dataset=rows, processing_class=tokenizer
        )

    @contextlib.contextmanager
    def _patched(self) -> Iterator[None]:
        from trl.trainer import utils

        with contextlib.ExitStack() as stack:
            if self.compact:
                stack.enter_context(mock.patch.object(utils, "_use_triton", return_value=True))
            if not self.metrics:
                stack.enter_context(mock.patch.object(utils, "_ChunkedLogProbFunction", _LogProbsAlone))
            yield

    def prepare(self, trees: list[PairTree]) -> dict[str, Tensor]:
        examples = [
            {"prompt_ids": list(tree.prompt_ids), "chosen_ids": list(chosen), "rejected_ids": list(rejected)}
            for tree in trees
            for chosen, rejected in [tree.response_ids]
        ]
        batch = {key: tensor.to(self.setting.device) for key, tensor in self.trainer.data_collator(examples).items()}
        if self.cached:
            with self._patched():
                chosen, rejected = self.trainer.compute_ref_log_probs(self.model, batch)
            batch |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        return batch

    def log_probs(self, batch: dict[str, Tensor]) -> Tensor:
        with self._patched():
            chosen, rejected = self.trainer.compute_ref_log_probs(self.model, batch)
        return torch.stack([chosen, rejected], dim=1).flatten()

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        with self._patched():
            loss = self.trainer.training_step(self.model, dict(batch))
        self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


class _LogProbsAlone:
    """In place of TRL's autograd function: the same without the metrics over the vocabulary, which become zeros."""

    @staticmethod
    def apply(*arguments: Any) -> tuple[Tensor | None, ...]:
        from trl.kernels import ChunkedLogProbFunction

        values = ChunkedLogProbFunction.apply(*arguments[:-1], ("log_probs",))[0]
        zeros = torch.zeros_like(values)
        wanted = arguments[-1]
        flags = zeros.bool()
        return (
            values,
            zeros if "entropy" in wanted else None,
            None,
            zeros if "mean_logits" in wanted else None,
            flags if "is_top1" in wanted else None,
        )
