"""A small generated world with exact helpfulness and safety: the dataset that needs no download."""

from bfpo_pl.microworld.judge import GroupScores, Scores, Verdict, judge, score
from bfpo_pl.microworld.rows import helpfulness_rows, prompt_rows, safety_rows, sft_rows
from bfpo_pl.microworld.tokenizer import build_tokenizer
from bfpo_pl.microworld.world import PROMPT_CLASSES, SPLITS, Combination, combinations, parse_prompt

__all__ = [
    "PROMPT_CLASSES",
    "SPLITS",
    "Combination",
    "GroupScores",
    "Scores",
    "Verdict",
    "build_tokenizer",
    "combinations",
    "helpfulness_rows",
    "judge",
    "parse_prompt",
    "prompt_rows",
    "safety_rows",
    "score",
    "sft_rows",
]
