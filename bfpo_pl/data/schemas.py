"""Adapters of datasets that are known by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from bfpo_pl.component import UserError, check_range
from bfpo_pl.data.adapters import Adapter, last_content
from bfpo_pl.data.rows import Message, Row, RowError, messages

_ORDERS = {"helpfulness": "better_response_id", "safety": "safer_response_id"}
_ROLES = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"\n\n(Human|Assistant):")


class PKUSafeRLHF(Adapter):
    """PKU-SafeRLHF: a prompt, two responses with safety flags, and which one is more helpful, which one safer.

    It reads the dataset's first release and the present one, which adds a severity to each response. A flag that is
    null is a missing flag, which ``assume_safe: true`` in the stream takes to say safe.

    Args:
        order: What orders the pair. ``helpfulness`` (the paper): chosen is ``better_response_id``. ``safety``: chosen
            is ``safer_response_id``, for rows that carry no helpfulness order.
        severity_safe: The probability that a response is safe, for each ``severity_level`` from 0 (no harm) to 3, as
            ``[1.0, 0.4, 0.1, 0.0]``; it takes the place of the flags, which are then not read. Null for the flags.
    """

    def __init__(
        self,
        order: Literal["helpfulness", "safety"] = "helpfulness",
        severity_safe: list[float] | None = None,
    ) -> None:
        self.order = order
        self.severity_safe = None if severity_safe is None else _probabilities(self, severity_safe)
        # A severity that a row lacks cannot be assumed: True would say that it is 1.
        self.flag_fields = () if severity_safe else ("is_response_0_safe", "is_response_1_safe")

    def __call__(self, raw: Mapping[str, Any], origin: str) -> Row:
        chosen = _first(self, raw, self.order, origin)
        safe = [self._safe(raw, index, origin) for index in (0, 1)]
        responses = [self.field(raw, f"response_{index}", origin) for index in (0, 1)]
        return Row.pair(
            prompt=self.field(raw, "prompt", origin),
            chosen=responses[chosen],
            rejected=responses[1 - chosen],
            chosen_safe=safe[chosen],
            rejected_safe=safe[1 - chosen],
            origin=origin,
        )

    def _safe(self, raw: Mapping[str, Any], index: int, origin: str) -> float:
        if self.severity_safe is None:
            return self.flag(raw, f"is_response_{index}_safe", origin)
        name = f"response_{index}_severity_level"
        level = self.field(raw, name, origin)
        if isinstance(level, bool) or level not in (0, 1, 2, 3):
            remedy = "Leave out the adapter's severity_safe to take the safety flags." if level is None else ""
            raise RowError(origin, name, level, "the severity level must be 0, 1, 2 or 3", remedy)
        return self.severity_safe[int(level)]


class PKUSaferResponse(Adapter):
    """PKU-SafeRLHF for supervised training: each prompt with the safer one of its two responses."""

    def __call__(self, raw: Mapping[str, Any], origin: str) -> Row:
        safer = _first(self, raw, "safety", origin)
        response = self.field(raw, f"response_{safer}", origin)
        return Row.single(self.field(raw, "prompt", origin), response, origin)


class UltraFeedbackBinarized(Adapter):
    """UltraFeedback, binarized: ``chosen`` and ``rejected`` are conversations that differ in the last message.

    It has no safety flags: a stream that needs them says ``assume_safe: true``. ``score_chosen`` and
    ``score_rejected``, where a row has them, become the columns ``chosen_score`` and ``rejected_score``.
    """

    def __call__(self, raw: Mapping[str, Any], origin: str) -> Row:
        chosen = messages(self.field(raw, "chosen", origin), origin, "chosen")
        rejected = messages(self.field(raw, "rejected", origin), origin, "rejected")
        scores = (raw.get("score_chosen"), raw.get("score_rejected"))
        extras = {} if None in scores else dict(zip(("chosen_score", "rejected_score"), scores, strict=True))
        return _same_but_last(chosen, rejected, origin, **extras)


class HHRLHF(Adapter):
    """Anthropic's HH-RLHF: ``chosen`` and ``rejected`` are transcripts of ``Human:`` and ``Assistant:`` turns.

    Turns are kept to the letter. Both transcripts must share all turns but the last. There are no safety flags: a
    stream that needs them says ``assume_safe: true``.
    """

    def __call__(self, raw: Mapping[str, Any], origin: str) -> Row:
        chosen = _turns(self.field(raw, "chosen", origin), origin, "chosen")
        rejected = _turns(self.field(raw, "rejected", origin), origin, "rejected")
        return _same_but_last(chosen, rejected, origin)


class RedTeam(Adapter):
    """Answers to red-team prompts, as the paper collected them: ``modeloutput1``, ``modeloutput2``, both flags.

    ``better_modelout``, 1 or 2, names the more helpful one. A flag that is null is a missing flag, which
    ``assume_safe: true`` in the stream takes to say safe.
    """

    flag_fields = ("is_modelout1_safe", "is_modelout2_safe")

    def __call__(self, raw: Mapping[str, Any], origin: str) -> Row:
        better = self.field(raw, "better_modelout", origin)
        if isinstance(better, bool) or better not in (1, 2, "1", "2"):
            raise RowError(origin, "better_modelout", better, "the number of a response must be 1 or 2")
        chosen, rejected = int(better), 3 - int(better)
        return Row.pair(
            prompt=self.field(raw, "prompt", origin),
            chosen=self.field(raw, f"modeloutput{chosen}", origin),
            rejected=self.field(raw, f"modeloutput{rejected}", origin),
            chosen_safe=self.flag(raw, f"is_modelout{chosen}_safe", origin),
            rejected_safe=self.flag(raw, f"is_modelout{rejected}_safe", origin),
            origin=origin,
        )


def _probabilities(owner: object, values: list[float]) -> list[float]:
    """Probabilities of being safe by severity level, checked."""
    name = type(owner).__name__
    if len(values) != 4:
        raise UserError(f"{name}: severity_safe must have 4 values, for severity levels 0 to 3, not {len(values)}.")
    checked = [check_range(owner, "severity_safe", value, 0.0, 1.0) for value in values]
    if checked != sorted(checked, reverse=True):
        raise UserError(f"{name}: severity_safe must not rise with the severity level, as {values} does.")
    return checked


def _first(adapter: Adapter, raw: Mapping[str, Any], order: str, origin: str) -> int:
    """The id, 0 or 1, of the response that comes first in an order."""
    name = _ORDERS[order]
    value = adapter.field(raw, name, origin)
    if value is None:
        remedy = "Take rows that have it, or order the pairs by safety (adapter: PKUSafeRLHF, order: safety)."
        raise RowError(origin, name, value, f"no {order} order", remedy if order == "helpfulness" else "")
    if isinstance(value, bool) or value not in (0, 1):
        raise RowError(origin, name, value, "the id of a response must be 0 or 1")
    return int(value)


def _same_but_last(chosen: tuple[Message, ...], rejected: tuple[Message, ...], origin: str, **extras: Any) -> Row:
    """A pair from two conversations that share all messages but the last."""
    if chosen[:-1] != rejected[:-1]:
        raise RowError(origin, "rejected", "", "chosen and rejected differ before the last message")
    first, second = last_content(chosen, origin, "chosen"), last_content(rejected, origin, "rejected")
    return Row.pair(chosen[:-1], first, second, origin=origin, **extras)


def _turns(transcript: Any, origin: str, name: str) -> tuple[Message, ...]:
    r"""The turns of a transcript, each begun by ``\n\nHuman: `` or ``\n\nAssistant: ``."""
    if not isinstance(transcript, str):
        raise RowError(origin, name, transcript, "it is not text")
    # The pieces alternate between the text before a mark and the mark's speaker.
    before, *pieces = _TURN.split(transcript)
    if before or not pieces or pieces[0] != "Human":
        raise RowError(origin, name, transcript, "the transcript does not begin with '\\n\\nHuman: '")
    turns = []
    for speaker, text in zip(pieces[::2], pieces[1::2], strict=True):
        if not text.strip():
            raise RowError(origin, name, transcript, "a turn of the transcript is empty")
        if text[0] != " ":
            raise RowError(origin, name, transcript, "there is no space before the text of a turn")
        turns.append(Message(_ROLES[speaker], text[1:]))
    return tuple(turns)
