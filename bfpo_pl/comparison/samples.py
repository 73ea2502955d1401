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
        apart: What of its origin is not as of the others, such as ``seed 7``; empty if nothing.
    """

    label: str
    text: str
    marks: list[str]
    bad: bool
    apart: str = ""

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
    seed = _most([seed for row in rows for seed in row.group.replicates])
    answers: dict[str, dict[str, dict[str, Any]]] = {}
    origins: dict[str, list[str]] = {}
    for row in rows:
        own = seed if seed in row.group.replicates else next(iter(row.group.replicates))
        found = _last(row.group.replicates[own], split)
        if found:
            answers[row.label] = found
            origins[row.label] = [f"seed {own}" if isinstance(own, int) else str(own), *_origin(found)]
    if not answers:
        return SideBySide([], "")
    usual = [_most(parts) for parts in zip(*origins.values(), strict=True)]
    apart = {
        label: ", ".join(part for part, other in zip(parts, usual, strict=True) if part != other)
        for label, parts in origins.items()
    }
    shared = [text for text in next(iter(answers.values())) if all(text in each for each in answers.values())]
    prompts = []
    for text in _spread(shared):
        judged = {label: each[text] for label, each in answers.items()}
        kind = str(next(iter(judged.values())).get("class") or "")
        listed = [_answer(label, row, apart[label]) for label, row in judged.items()]
        prompts.append(Prompt(text, kind, kind.startswith("harmful"), listed))
    prompts.sort(key=lambda prompt: not prompt.harmful)
    return SideBySide(prompts, ", ".join([*filter(None, usual), "last evaluation"]))


def _most(values: Sequence[Any]) -> Any:
    """The most frequent value, of several the first."""
    return max(dict.fromkeys(values), key=values.count)


def _last(run: RunRecord, split: str) -> dict[str, dict[str, Any]]:
    """By prompt the rows of the last step; greedy ones, and of the split, where there are some."""
    rows = [row for row in read_samples(run.folder) if "prompt" in row and "answer" in row]
    names = ("test", "heldout") if split == "test" else ("val", "validation")
    rows = [row for row in rows if row.get("split") in names] or rows
    decodings = list(dict.fromkeys(str(row.get("decoding")) for row in rows))
    decoding = "greedy" if "greedy" in decodings else next(iter(decodings), "")
    rows = [row for row in rows if str(row.get("decoding")) == decoding]
    last = max((row.get("step", 0) for row in rows), default=0)
    return {str(row["prompt"]): row for row in rows if row.get("step", 0) == last}


def _origin(found: dict[str, dict[str, Any]]) -> list[str]:
    """Decoding and prompts of answers, in words."""
    row = next(iter(found.values()))
    split = row.get("split")
    prompts = "held-out prompts" if split in ("test", "heldout") else f"{split} prompts" if split else ""
    return [f"decoding {row.get('decoding')}", prompts]


def _spread(texts: Sequence[str]) -> list[str]:
    count = min(PROMPTS, len(texts))
    return [texts[place * len(texts) // count] for place in range(count)]


def _answer(label: str, row: dict[str, Any], apart: str) -> Answer:
    unsafe, malformed = row.get("safe") is False, row.get("malformed") is True
    marks = [name for name, is_so in (("unsafe", unsafe), ("malformed", malformed)) if is_so]
    if not marks and row.get("form"):
        marks.append(str(row["form"]))
    if isinstance(row.get("helpfulness"), int | float):
        marks.append(f"helpfulness {row['helpfulness']:.2f}")
    return Answer(label, str(row["answer"]), marks, unsafe or malformed, apart)
