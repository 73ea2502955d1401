"""What of a network trains: everything, modules selected by pattern, or a low-rank adapter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from fnmatch import fnmatchcase
from typing import Literal

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from bfpo_pl.component import Component, UserError, check_range


class TrainablePart(Component, ABC):
    """Decides which parameters get gradients; may add some."""

    @abstractmethod
    def apply(self, model: PreTrainedModel) -> None:
        """Sets ``requires_grad`` of the model's parameters, in place, before it is sharded.

        Raises:
            UserError: Nothing would train.
        """


class Everything(TrainablePart):
    """Every parameter trains."""

    def apply(self, model: PreTrainedModel) -> None:
        model.requires_grad_(True)


class Select(TrainablePart):
    """Only the modules that match a pattern train ("selective" training; the paper trains ``down_proj``).

    A pattern is one or more module-name components joined by dots; it matches where its components stand next to each
    other anywhere in a parameter's name: ``down_proj`` matches ``model.layers.0.mlp.down_proj.weight`` and not
    ``up_down_proj``; ``layers.0.mlp.*`` matches that block's MLP. ``*``, ``?`` and ``[ab]`` stand within a component.

    Args:
        patterns: The patterns. Each must match at least one parameter.
    """

    def __init__(self, patterns: list[str]) -> None:
        if not patterns:
            raise UserError("Select: patterns is empty, so nothing would train.")
        self.patterns = list(patterns)

    def apply(self, model: PreTrainedModel) -> None:
        matched: dict[str, int] = dict.fromkeys(self.patterns, 0)
        for name, parameter in model.named_parameters():
            hits = [pattern for pattern in self.patterns if _matches(pattern, name)]
            parameter.requires_grad_(bool(hits))
            for pattern in hits:
                matched[pattern] += 1
        missing = [pattern for pattern, count in matched.items() if count == 0]
        if missing:
            leaves = sorted({name.split(".")[-2] for name, _ in model.named_parameters() if "." in name})
            raise UserError(
                f"Select: no parameter of {type(model).__name__} matches {', '.join(map(repr, missing))}. "
                f"Names of its innermost modules: {', '.join(leaves)}."
            )


class LoRA(TrainablePart):
    """A low-rank adapter (peft) trains, the base weights are frozen. Pairs with the reference `AdapterOff`.

    Args:
        r: Rank of the update.
        alpha: Its scale is alpha / r.
        dropout: Dropout of the adapter's input.
        target_modules: Names of the linear modules that get an adapter, or ``all-linear``.
    """

    name = "default"

    def __init__(
        self,
        r: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        target_modules: list[str] | Literal["all-linear"] = "all-linear",
    ) -> None:
        self.r = int(check_range(self, "r", r, 1))
        self.alpha = check_range(self, "alpha", alpha, 0.0, low_open=True)
        self.dropout = check_range(self, "dropout", dropout, 0.0, 1.0, high_open=True)
        self.target_modules = target_modules

    def apply(self, model: PreTrainedModel) -> None:
        model.requires_grad_(False)
        try:
            model.add_adapter(
                LoraConfig(
                    r=self.r,
                    lora_alpha=self.alpha,  # type: ignore[arg-type]  # peft takes any number
                    lora_dropout=self.dropout,
                    target_modules=self.target_modules,
                    task_type="CAUSAL_LM",
                ),
                adapter_name=self.name,
            )
        except ValueError as error:
            raise UserError(f"LoRA: {error}") from error
        if getattr(model, "is_loaded_in_4bit", False):
            for parameter in model.parameters():
                if parameter.requires_grad:  # peft gives them the type that the packed bits are stored in
                    parameter.data = parameter.data.float()
        if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise UserError(f"LoRA: no module matches target_modules={self.target_modules!r}.")


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Numbers of trainable parameters and of all parameters."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def _matches(pattern: str, name: str) -> bool:
    wanted, parts = pattern.split("."), name.split(".")
    windows = (parts[start : start + len(wanted)] for start in range(len(parts) - len(wanted) + 1))
    return any(all(fnmatchcase(part, want) for part, want in zip(window, wanted, strict=True)) for window in windows)
