"""Answers of several groups to the same prompts, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bfpo_pl.comparison.analysis import Row
from bfpo_pl.comparison.reading import RunRecord, read_samples

PROMPTS = 12
SHORT = 140
"""Characters of an answer that are shown at once."""


@dataclass(frozen=True)
class Answer:
    """One group's answer.

    Args:
        label: The group.
        text: The whole answer.
        marks: What the judge says of it: ``unsafe``, ``malformed``, ``helpfulness 0.50`` …
        bad: Whether it is unsafe or malformed.
    """

    label: str
    text: str
    marks: list[str]
    bad: bool

    @property
    def short(self) -> str:
        """The first characters on one line."""
        line = " ".join(self.text.split())
        return line if len(line) <= SHORT else line[: SHORT - 1] + "…"

    @property
    def cut(self) -> bool:
        return self.short != self.text


@dataclass(frozen=True)
class Prompt:
    """A prompt with the groups' answers.

    Args:
        text: The prompt.
        kind: Its class, such as ``harmful_pair``.
        harmful: Whether its class is a harmful one.
        answers: The answers, in the groups' order.
    """

    text: str
    kind: str
    harmful: bool
    answers: list[Answer]


@dataclass(frozen=True)
class SideBySide:
    """Prompts with answers, and where the answers are from.

    Args:
        prompts: Those that all the groups answered.
        origin: Seed and decoding, in words.
    """

    prompts: list[Prompt]
    origin: str


def side_by_side(rows: Sequence[Row], split: str) -> SideBySide:
    """The last greedy answers of one run of each group, to prompts that they share.

    Args:
        rows: The groups to show.
        split: ``test`` or ``val``: of which prompts, where the samples say.
    """
    seed = _common_seed(rows)
    answers: dict[str, dict[str, dict[str, Any]]] = {}
    decoding = "greedy"
    for row in rows:
        run = row.group.replicates.get(seed) or row.group.runs[0]
        decoding, found = _last(run, split)
        if found:
            answers[row.label] = found
    if not answers:
        return SideBySide([], "")
    shared = [text for text in next(iter(answers.values())) if all(text in each for each in answers.values())]
    prompts = []
    for text in _spread(shared):
        judged = {label: each[text] for label, each in answers.items()}
        kind = str(next(iter(judged.values())).get("class") or "")
        prompts.append(
            Prompt(text, kind, kind.startswith("harmful"), [_answer(*item) for item in judged.items()]),
        )
    prompts.sort(key=lambda prompt: not prompt.harmful)
    return SideBySide(prompts, f"seed {seed}, decoding {decoding}, last evaluation")


def _common_seed(rows: Sequence[Row]) -> Any:
    seeds = [seed for row in rows for seed in row.group.replicates]
    return max(dict.fromkeys(seeds), key=seeds.count)


def _last(run: RunRecord, split: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """Decoding, and by prompt the rows of the last step with answers of that decoding."""
    rows = [row for row in read_samples(run.folder) if "prompt" in row and "answer" in row]
    names = ("test", "heldout") if split == "test" else ("val", "validation")
    rows = [row for row in rows if row.get("split") in names] or rows
    decodings = list(dict.fromkeys(str(row.get("decoding")) for row in rows))
    if not decodings:
        return "greedy", {}
    decoding = "greedy" if "greedy" in decodings else decodings[0]
    rows = [row for row in rows if str(row.get("decoding")) == decoding]
    last = max(row.get("step", 0) for row in rows)
    return decoding, {str(row["prompt"]): row for row in rows if row.get("step", 0) == last}


def _spread(texts: Sequence[str]) -> list[str]:
    count = min(PROMPTS, len(texts))
    return [texts[place * len(texts) // count] for place in range(count)]


def _answer(label: str, row: dict[str, Any]) -> Answer:
    unsafe, malformed = row.get("safe") is False, row.get("malformed") is True
    marks = [name for name, is_so in (("unsafe", unsafe), ("malformed", malformed)) if is_so]
    if not marks and row.get("form"):
        marks.append(str(row["form"]))
    if isinstance(row.get("helpfulness"), int | float):
        marks.append(f"helpfulness {row['helpfulness']:.2f}")
    return Answer(label, str(row["answer"]), marks, unsafe or malformed)
