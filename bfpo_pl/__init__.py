"""bfpo_pl: aligns language models for helpfulness and safety at once, with Bi-Factorial Preference Optimization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bfpo_pl.batch import Annotations, Label, LogProbs, PairBatch, Requirements
from bfpo_pl.component import UserError
from bfpo_pl.labeling import BFPO, HelpfulnessOnly, LabelingFunction, Linear, SafetyFirst, SafetyOnly
from bfpo_pl.losses import AuxiliaryLoss, Hinge, Logistic, PreferenceLoss, RobustLogistic, SafeChosenNLL, Squared
from bfpo_pl.reductions import Mean, PairReduction

__version__ = "0.1.0"

__all__ = [
    "BFPO",
    "Annotations",
    "AuxiliaryLoss",
    "HelpfulnessOnly",
    "Hinge",
    "Label",
    "LabelingFunction",
    "Linear",
    "LogProbs",
    "Logistic",
    "Mean",
    "PairBatch",
    "PairReduction",
    "PreferenceLoss",
    "Requirements",
    "RobustLogistic",
    "SafeChosenNLL",
    "SafetyFirst",
    "SafetyOnly",
    "Squared",
    "UserError",
    "load",
]


def load(run: str | Path) -> tuple[Any, Any]:
    """Loads the model that a run exported, with plain transformers.

    Args:
        run: A run's folder, such as ``runs/bfpo/20260101-120000-ab12``, or an export itself, an adapter's as well.

    Returns:
        The model, in eval mode, and its tokenizer.

    Raises:
        UserError: The folder holds no export; the message says what it holds.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(run)
    for export in (folder, folder / "export"):
        if (export / "adapter_config.json").is_file():
            from bfpo_pl.chat.loading import load_adapter

            return load_adapter(export)
        if (export / "config.json").is_file():
            model = AutoModelForCausalLM.from_pretrained(export, use_safetensors=True, trust_remote_code=False)
            return model, AutoTokenizer.from_pretrained(export, trust_remote_code=False)
    found = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else "no such folder"
    raise UserError(f"'{run}' holds no exported model (found: {found or 'nothing'}). Name a run that ended its fit.")
