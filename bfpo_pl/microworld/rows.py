"""Rows of the microworld, as plain dicts in the schemas of the real datasets, so that the same readers take them.

Every generator is deterministic in its arguments: `seed` sets the draws, `split_seed` the split (see `combinations`).
"""

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bfpo_pl.microworld.judge import Verdict, judge_combination
from bfpo_pl.microworld.world import (
    BENIGN_CLASSES,
    PROMPT_CLASSES,
    Combination,
    combinations,
    draw_response,
)

Row = dict[str, Any]

SAFETY_MIX: Mapping[str, float] = {
    "harmful_verb": 0.30,
    "harmful_pair": 0.30,
    "dual_verb": 0.20,
    "sensitive_object": 0.12,
    "plain": 0.08,
}
HELPFULNESS_MIX: Mapping[str, float] = dict.fromkeys(BENIGN_CLASSES, 1 / len(BENIGN_CLASSES))
SFT_MIX: Mapping[str, float] = dict.fromkeys(PROMPT_CLASSES, 1 / len(PROMPT_CLASSES))


@dataclass(frozen=True)
class _Pair:
    """Two responses to one prompt, the more helpful first, with their verdicts."""

    prompt: str
    responses: tuple[str, str]
    verdicts: tuple[Verdict, Verdict]

    @property
    def conflict(self) -> bool:
        """The more helpful response is the unsafe one."""
        return not self.verdicts[0].safe and self.verdicts[1].safe


class _Sampler:
    """Draws prompts by a mix of classes, and pairs of responses to them."""

    def __init__(self, name: str, seed: int, split: str, split_seed: int, mix: Mapping[str, float]) -> None:
        self.rng = random.Random(f"microworld {name} {seed}")
        self.mix = mix
        self.members: dict[str, list[Combination]] = {name: [] for name in mix}
        for combination in combinations(split, split_seed):
            if combination.prompt_class in self.members:
                self.members[combination.prompt_class].append(combination)

    def prompt(self) -> tuple[Combination, str]:
        """Draw a class, then a combination of it, then a template."""
        prompt_class = self.rng.choices(list(self.mix), list(self.mix.values()))[0]
        combination = self.rng.choice(self.members[prompt_class])
        return combination, self.rng.choice(combination.prompts())

    def pair(self) -> _Pair:
        """Draw a prompt and two responses, again until their helpfulness differs."""
        combination, prompt = self.prompt()
        while True:
            drawn = [draw_response(combination, self.rng) for _ in range(2)]
            judged = [(judge_combination(combination, response), response) for response in drawn]
            (better, first), (worse, second) = sorted(judged, key=lambda item: -item[0].helpfulness)
            if better.helpfulness > worse.helpfulness:
                return _Pair(prompt, (first, second), (better, worse))

    def pair_with(self, conflict: bool) -> _Pair:
        """Draw pairs until one is a conflict, or is none."""
        while (pair := self.pair()).conflict != conflict:
            pass
        return pair


def safety_rows(
    count: int,
    seed: int = 0,
    split: str = "train",
    split_seed: int = 0,
    flag_noise: float = 0.0,
    soft_flags: bool = False,
    unsafe_helpful_share: float | None = None,
) -> list[Row]:
    """Pairs with safety flags, in the schema of PKU-SafeRLHF; a random side holds the winner.

    Args:
        count: Number of rows.
        seed: Seed of the draws.
        split: Which combinations to ask about.
        split_seed: Which split.
        flag_noise: Probability with which each safety flag is flipped, each on its own.
        soft_flags: Give each flag as the probability of being safe that the noise leaves (``1 - flag_noise`` or
            ``flag_noise``, a float) instead of flipping it.
        unsafe_helpful_share: Share of the rows that are a conflict (the more helpful response is unsafe, the other
            safe), by the true flags; None leaves the natural share, about 0.3.
    """
    _check_share("flag_noise", flag_noise)
    sampler = _Sampler("safety", seed, split, split_seed, SAFETY_MIX)
    if unsafe_helpful_share is None:
        pairs = [sampler.pair() for _ in range(count)]
    else:
        _check_share("unsafe_helpful_share", unsafe_helpful_share)
        conflicts = round(unsafe_helpful_share * count)
        pairs = [sampler.pair_with(conflict=index < conflicts) for index in range(count)]
        sampler.rng.shuffle(pairs)
    sides = random.Random(f"microworld sides {seed}")
    noise = random.Random(f"microworld flags {seed}")
    return [_safety_row(pair, sides.randrange(2), noise, flag_noise, soft_flags) for pair in pairs]


def _safety_row(pair: _Pair, better_id: int, noise: random.Random, flag_noise: float, soft_flags: bool) -> Row:
    order = (0, 1) if better_id == 0 else (1, 0)
    responses = [pair.responses[index] for index in order]
    verdicts = [pair.verdicts[index] for index in order]
    flags = [_flag(verdict.safe, noise, flag_noise, soft_flags) for verdict in verdicts]
    return {
        "prompt": pair.prompt,
        "response_0": responses[0],
        "response_1": responses[1],
        "is_response_0_safe": flags[0],
        "is_response_1_safe": flags[1],
        "better_response_id": better_id,
        "safer_response_id": int(verdicts[1].caution > verdicts[0].caution),
    }


def _flag(safe: bool, noise: random.Random, flag_noise: float, soft_flags: bool) -> bool | float:
    if soft_flags:
        return 1.0 - flag_noise if safe else flag_noise
    return safe != (noise.random() < flag_noise)


def _check_share(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")


def helpfulness_rows(count: int, seed: int = 0, split: str = "train", split_seed: int = 0) -> list[Row]:
    """Pairs on benign prompts, in the schema of UltraFeedback (binarized); scores are exact helpfulness in [0, 1]."""
    sampler = _Sampler("helpfulness", seed, split, split_seed, HELPFULNESS_MIX)
    rows = []
    for _ in range(count):
        pair = sampler.pair()
        chosen, rejected = (_messages(pair.prompt, response) for response in pair.responses)
        rows.append(
            {
                "prompt": pair.prompt,
                "prompt_id": hashlib.sha256(pair.prompt.encode()).hexdigest(),
                "chosen": chosen,
                "rejected": rejected,
                "messages": chosen,
                "score_chosen": pair.verdicts[0].helpfulness,
                "score_rejected": pair.verdicts[1].helpfulness,
            }
        )
    return rows


def sft_rows(count: int, seed: int = 0, split: str = "train", split_seed: int = 0) -> list[Row]:
    """Conversations for supervised fine-tuning: responses by the response law, all classes alike (60 % benign)."""
    sampler = _Sampler("sft", seed, split, split_seed, SFT_MIX)
    rows = []
    for _ in range(count):
        combination, prompt = sampler.prompt()
        rows.append({"messages": _messages(prompt, draw_response(combination, sampler.rng))})
    return rows


def prompt_rows(split: str = "heldout", split_seed: int = 0) -> list[Row]:
    """Every prompt of a split, each combination in every template, with its class, verb and object."""
    return [
        {
            "prompt": prompt,
            "prompt_class": combination.prompt_class,
            "harmful": combination.harmful,
            "verb": combination.verb,
            "object": combination.object,
        }
        for combination in combinations(split, split_seed)
        for prompt in combination.prompts()
    ]


def _messages(prompt: str, response: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
