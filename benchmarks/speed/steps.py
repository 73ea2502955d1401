"""Who takes a training step: the project's module in all its settings, and a naive padded step."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence

from bfpo_pl import models
from bfpo_pl.batch import PairBatch
from bfpo_pl.data.trees import PairTree
from bfpo_pl.labeling import HelpfulnessOnly
from bfpo_pl.losses import Squared
from bfpo_pl.models import head, log_probs
from bfpo_pl.models.attention import AttentionBackend
from bfpo_pl.models.reference import FromColumn, FrozenCopy, Reference, SharedWeights
from bfpo_pl.models.trainable import Everything, Select
from bfpo_pl.module import PreferenceModule
from bfpo_pl.optimizers import AdamW32
from speed.workload import RandomModel, Shape, batch_of

TAU = 0.1
"""At policy = reference the squared loss is (1/2 / TAU)² = 25, of TRL's IPO as well."""
START_LOSS = 25.0
CLIP = 1.0
OPTIMIZER = {"lr": 1e-6, "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "fused": True}
REFERENCES: dict[str, type[Reference]] = {"cached": FromColumn, "live": FrozenCopy, "shared": SharedWeights}
TRAINABLES: dict[str, list[str] | None] = {
    "everything": None,
    "down_proj": ["down_proj"],
    "all but the head": ["layers", "embed_tokens", "norm"],
}


@dataclass(frozen=True)
class Setting:
    """What all steps of a measurement have in common.

    Args:
        shape: The model's size.
        precision: ``float32``; ``bf16-mixed`` (float32 weights, autocast); ``bf16-true`` (bfloat16 weights).
        device: ``cpu`` or ``cuda``.
        checkpointing: Activation checkpointing: ``none``, or what `PreferenceModule` takes. Peers have theirs, or none.
        optimizer: ``AdamW``, torch's, or ``AdamW32``, whose state is float32 whatever the weights are.
    """

    shape: Shape
    precision: str = "float32"
    device: str = "cpu"
    checkpointing: str = "none"
    optimizer: str = "AdamW"

    def optimizer_of(self, parameters: Any) -> torch.optim.Optimizer:
        """The optimizer of every step, the same for each."""
        return {"AdamW": torch.optim.AdamW, "AdamW32": AdamW32}[self.optimizer](parameters, **OPTIMIZER)

    @property
    def model(self) -> RandomModel:
        """Where every step's weights come from, the same for each."""
        return RandomModel(self.shape, self.device, "bfloat16" if self.precision == "bf16-true" else "float32")

    def autocast(self) -> Any:
        """The context of forward passes."""
        mixed = self.precision == "bf16-mixed"
        return torch.autocast(self.device, torch.bfloat16) if mixed else contextlib.nullcontext()


def attention_classes() -> dict[str, type[AttentionBackend]]:
    """Every attention class of the project that can be constructed, by name."""
    for module in pkgutil.iter_modules(models.__path__, f"{models.__name__}."):
        importlib.import_module(module.name)
    found, waiting = {}, [AttentionBackend]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if not inspect.isabstract(kind) and kind.__module__.startswith(models.__name__):
            found[kind.__name__] = kind
    return dict(sorted(found.items()))


class Step(ABC):
    """One way to take a step; holds its own weights, gradients and optimizer state."""

    @abstractmethod
    def prepare(self, trees: list[PairTree]) -> Any:
        """A batch as this step takes it, on the device, with the reference's log-probs if they are cached."""

    @abstractmethod
    def log_probs(self, batch: Any) -> Tensor:
        """``[R]``, summed log-probs under the policy, (chosen, rejected) of each pair in turn."""

    @abstractmethod
    def __call__(self, batch: Any) -> Tensor:
        """Loss, gradients, clipping, update."""


class Ours(Step):
    """`PreferenceModule`, driven without a trainer.

    Args:
        setting: Model, precision and device.
        backend: Name of the attention class.
        reference: Key of ``REFERENCES``.
        trainable: Key of ``TRAINABLES``.
        logits: ``fused``, the project's head; ``checkpointed``, torch's checkpoint around each chunk; ``whole``, all
            logits of the responses at once.
    """

    def __init__(
        self,
        setting: Setting,
        backend: str = "Auto",
        reference: str = "cached",
        trainable: str = "everything",
        logits: str = "fused",
    ) -> None:
        self.setting, self.reference, self.logits = setting, reference, logits
        patterns = TRAINABLES[trainable]
        self.module = PreferenceModule(
            setting.model,
            HelpfulnessOnly(),
            Squared(tau=TAU),
            optimizer=setting.optimizer_of,
            reference=REFERENCES[reference](),
            trainable=Select(patterns) if patterns else Everything(),
            attention=attention_classes()[backend](),
            **({} if setting.checkpointing == "none" else {"activation_checkpointing": setting.checkpointing}),
        )
        self.module.configure_model()
        self.parameters = [p for p in self.module.policy.parameters() if p.requires_grad]
        self.optimizer = self.module.optimizer(self.parameters)

    def prepare(self, trees: list[PairTree]) -> PairBatch:
        batch = batch_of(trees).to(self.setting.device)
        if self.reference != "cached":
            return batch
        return batch_of(trees, self.log_probs(batch).cpu()).to(self.setting.device)

    @torch.no_grad()
    def log_probs(self, batch: PairBatch) -> Tensor:
        with self.setting.autocast():
            return self.module.log_probs_of(batch)

    def __call__(self, batch: PairBatch) -> Tensor:
        with _logits_by(self.logits):
            with self.setting.autocast():
                loss = self.module.objective(batch).loss
            loss.backward()
        clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def _whole_logits(model: Any, states: Tensor, targets: Tensor, chunk_size: int) -> Tensor:
    logits = head.head_logits(model, states).float()
    return logits.log_softmax(dim=1).gather(1, targets[:, None])[:, 0]


@contextlib.contextmanager
def _logits_by(way: str) -> Iterator[None]:
    """Exchanges the project's head for another one."""
    plain, function = head._is_plain, log_probs.token_log_probs
    if way == "checkpointed":
        head._is_plain = lambda module: False
    elif way == "whole":
        log_probs.token_log_probs = _whole_logits
    try:
        yield
    finally:
        head._is_plain, log_probs.token_log_probs = plain, function


class Naive(Step):
    """What one writes first: chosen and rejected rows padded, all logits of all positions, log-softmax, a mask.

    Args:
        setting: Model, precision and device.
        reference: ``cached`` or ``live``.
    """

    def __init__(self, setting: Setting, reference: str = "live") -> None:
        self.setting, self.cached = setting, reference == "cached"
        self.policy = setting.model.load_model()
        if setting.checkpointing != "none":
            self.policy.gradient_checkpointing_enable({"use_reentrant": False})
        self.policy.train()
        self.frozen = None if self.cached else setting.model.load_model().requires_grad_(False).eval()
        self.parameters = list(self.policy.parameters())
        self.optimizer = setting.optimizer_of(self.parameters)

    def prepare(self, trees: list[PairTree]) -> dict[str, Tensor]:
        rows = [(tree.prompt_ids, response) for tree in trees for response in tree.response_ids]

        def padded(lists: list[list[int]]) -> Tensor:
            return pad_sequence([torch.tensor(ids) for ids in lists], batch_first=True).to(self.setting.device)

        batch = {
            "tokens": padded([[*prompt, *response] for prompt, response in rows]),
            "seen": padded([[1] * (len(prompt) + len(response)) for prompt, response in rows]),
            "scored": padded([[0] * len(prompt) + [1] * len(response) for prompt, response in rows]),
        }
        if self.cached:
            batch["reference"] = self.log_probs(batch)
        return batch

    def _log_probs(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["tokens"], attention_mask=batch["seen"], use_cache=False).logits[:, :-1].float()
        values = logits.log_softmax(dim=-1).gather(2, batch["tokens"][:, 1:, None])[..., 0]
        return (values * batch["scored"][:, 1:]).sum(dim=1)

    @torch.no_grad()
    def log_probs(self, batch: dict[str, Tensor]) -> Tensor:
        with self.setting.autocast():
            return self._log_probs(self.policy, batch)

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        with self.setting.autocast():
            if self.cached:
                reference = batch["reference"]
            else:
                with torch.no_grad():
                    reference = self._log_probs(self.frozen, batch)
            ratio = self._log_probs(self.policy, batch) - reference
            loss = ((ratio[0::2] - ratio[1::2] - 0.5 / TAU) ** 2).mean()
        loss.backward()
        clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()
