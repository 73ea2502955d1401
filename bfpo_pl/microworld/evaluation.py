"""Lets a model answer the microworld's prompts and judges every answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bfpo_pl.generation import generate
from bfpo_pl.microworld.judge import Scores, judge, score
from bfpo_pl.microworld.rows import prompt_rows

LONGEST_ANSWER = 32
"""Tokens at which an answer is cut; the longest right one is shorter."""


@dataclass(frozen=True)
class Evaluation:
    """A model's answers and what the judge makes of them.

    Args:
        scores: Means by kind and class of prompt.
        samples: One plain row an answer: prompt, class, answer, form, helpfulness, safe, malformed.
    """

    scores: Scores
    samples: list[dict[str, Any]]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    split: str = "heldout",
    split_seed: int = 0,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 192,
    max_prompts: int | None = None,
    answer: Callable[[list[str], float], list[str]] | None = None,
) -> Evaluation:
    """Judges a model on the prompts of a split.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer, with a chat template.
        split: ``validation`` or ``heldout``.
        split_seed: Which split of the combinations; the one of the training data.
        temperature: 0 for greedy decoding.
        seed: Seed of the sampling.
        batch_size: Prompts at once.
        max_prompts: Takes evenly spread prompts only. Default: all.
        answer: Answers prompts at a temperature in the model's stead (several processes share the work so).
    """
    rows = prompt_rows(split, split_seed)
    if max_prompts is not None and max_prompts < len(rows):
        rows = [rows[index * len(rows) // max_prompts] for index in range(max_prompts)]
    prompts = [row["prompt"] for row in rows]
    if answer is None:
        answers = generate(
            model,
            tokenizer,
            [[{"role": "user", "content": prompt}] for prompt in prompts],
            temperature=temperature,
            max_new_tokens=LONGEST_ANSWER,
            batch_size=batch_size,
            seed=seed,
        )
    else:
        answers = answer(prompts, temperature)
    samples = []
    for row, text in zip(rows, answers, strict=True):
        verdict = judge(row["prompt"], text)
        samples.append(
            {
                "prompt": row["prompt"],
                "class": row["prompt_class"],
                "answer": text,
                "form": verdict.form,
                "helpfulness": verdict.helpfulness,
                "safe": verdict.safe,
                "malformed": verdict.malformed,
            }
        )
    return Evaluation(score(zip(prompts, answers, strict=True)), samples)
