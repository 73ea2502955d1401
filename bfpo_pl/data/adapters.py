"""Adapters: from the raw rows of a dataset's schema to :class:`~bfpo_pl.data.rows.Row`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

from bfpo_pl.component import Component
from bfpo_pl.data.rows import Message, Row, RowError, messages

_ASSUME_SAFE = "To take responses without safety flags to be safe, set assume_safe: true in the stream."


class Adapter(Component, ABC):
    """Reads the rows of one schema. A new one needs nothing but ``__call__``.

    ``flag_fields`` names the fields of a raw row that hold safety flags; a stream with ``assume_safe`` takes those that
    a row lacks to say safe.
    """

    flag_fields: tuple[str, ...] = ()

    @abstractmethod
    def __call__(self, raw: Mapping[str, Any], origin: str) -> Row:
        """Turns a raw row into a checked one.

        Args:
            raw: The row as the source gave it.
            origin: Where it came from, for messages.

        Raises:
            RowError: It cannot be used.
        """

    def field(self, raw: Mapping[str, Any], name: str, origin: str) -> Any:
        """The value of a field that the schema demands.

        Raises:
            RowError: The row has no such field.
        """
        if name not in raw:
            remedy = f"{type(self).__name__} needs it; the row has: {', '.join(map(str, raw)) or 'no field'}."
            if name in self.flag_fields:
                remedy += f" {_ASSUME_SAFE}"
            raise RowError(origin, name, None, f"the field '{name}' is missing", remedy)
        return raw[name]


class PKUSafeRLHF(Adapter):
    """PKU-SafeRLHF: a prompt, two responses with safety flags, and which one is more helpful, which one safer.

    Args:
        order: What orders the pair. ``helpfulness`` (the paper): chosen is ``better_response_id``. ``safety``: chosen
            is ``safer_response_id``, for rows that carry no helpfulness order.
    """

    flag_fields = ("is_response_0_safe", "is_response_1_safe")

    def __init__(self, order: Literal["helpfulness", "safety"] = "helpfulness") -> None:
        self.order = order

    def __call__(self, raw: Mapping[str, Any], origin: str) -> Row:
        name = "better_response_id" if self.order == "helpfulness" else "safer_response_id"
        chosen = self.field(raw, name, origin)
        if chosen is None:
            remedy = "Take rows that have it, or order the pairs by safety (adapter: PKUSafeRLHF, order: safety)."
            order = "no helpfulness order" if self.order == "helpfulness" else "no safety order"
            raise RowError(origin, name, chosen, order, remedy if self.order == "helpfulness" else "")
        if isinstance(chosen, bool) or chosen not in (0, 1):
            raise RowError(origin, name, chosen, "the id of a response must be 0 or 1")
        rejected = 1 - int(chosen)
        flags = [self.field(raw, f"is_response_{index}_safe", origin) for index in (0, 1)]
        for index, value in enumerate(flags):
            if value is None:
                raise RowError(origin, f"is_response_{index}_safe", value, "the safety flag is missing")
        responses = [self.field(raw, f"response_{index}", origin) for index in (0, 1)]
        return Row.pair(
            prompt=self.field(raw, "prompt", origin),
            chosen=responses[int(chosen)],
            rejected=responses[rejected],
            chosen_safe=flags[int(chosen)],
            rejected_safe=flags[rejected],
            origin=origin,
        )


class UltraFeedbackBinarized(Adapter):
    """UltraFeedback, binarized: ``chosen`` and ``rejected`` are conversations that differ in the last message.

    It has no safety flags: a stream that needs them says ``assume_safe: true``. ``score_chosen`` and
    ``score_rejected``, where a row has them, become the columns ``chosen_score`` and ``rejected_score``.
    """

    def __call__(self, raw: Mapping[str, Any], origin: str) -> Row:
        chosen = messages(self.field(raw, "chosen", origin), origin, "chosen")
        rejected = messages(self.field(raw, "rejected", origin), origin, "rejected")
        if chosen[:-1] != rejected[:-1]:
            raise RowError(origin, "rejected", "", "chosen and rejected differ before the last message")
        scores = (raw.get("score_chosen"), raw.get("score_rejected"))
        extras = {} if None in scores else dict(zip(("chosen_score", "rejected_score"), scores, strict=True))
        responses = [_last(turns, origin, name) for name, turns in (("chosen", chosen), ("rejected", rejected))]
        return Row.pair(chosen[:-1], responses[0], responses[1], origin=origin, **extras)


class Messages(Adapter):
    """Conversations for supervised training, as UltraChat has them; the last message is the response.

    Args:
        field_name: The field that holds the list of messages.
    """

    def __init__(self, field_name: str = "messages") -> None:
        self.field_name = field_name

    def __call__(self, raw: Mapping[str, Any], origin: str) -> Row:
        turns = messages(self.field(raw, self.field_name, origin), origin, self.field_name)
        return Row.single(turns[:-1], _last(turns, origin, self.field_name), origin)


class Columns(Adapter):
    """Any other dataset, by the names of its columns; texts or lists of messages.

    Args:
        prompt: Column of the prompt.
        chosen: Column of the more helpful response (of the only response, if ``rejected`` is null).
        rejected: Column of the other response; null for supervised training.
        chosen_safe: Column of its safety flag; null if there is none.
        rejected_safe: Column of the other flag; null if there is none.
        extras: Further numeric columns for labelings to read: ``chosen_x`` with ``rejected_x`` become the response
            column ``x``, any other name a pair column.
    """

    def __init__(
        self,
        prompt: str = "prompt",
        chosen: str = "chosen",
        rejected: str | None = "rejected",
        chosen_safe: str | None = "chosen_safe",
        rejected_safe: str | None = "rejected_safe",
        extras: list[str] | None = None,
    ) -> None:
        self.prompt, self.chosen, self.rejected = prompt, chosen, rejected
        self.chosen_safe, self.rejected_safe = chosen_safe, rejected_safe
        self.extras = list(extras or ())
        self.flag_fields = tuple(name for name in (chosen_safe, rejected_safe) if name is not None)

    def __call__(self, raw: Mapping[str, Any], origin: str) -> Row:
        prompt = messages(self.field(raw, self.prompt, origin), origin, self.prompt)
        chosen = _response(self.field(raw, self.chosen, origin), prompt, origin, self.chosen)
        if self.rejected is None:
            return Row.single(prompt, chosen, origin)
        flags = [
            None if name is None else self._flag(raw, name, origin) for name in (self.chosen_safe, self.rejected_safe)
        ]
        return Row.pair(
            prompt,
            chosen,
            _response(self.field(raw, self.rejected, origin), prompt, origin, self.rejected),
            chosen_safe=flags[0],
            rejected_safe=flags[1],
            origin=origin,
            **{name: self.field(raw, name, origin) for name in self.extras},
        )

    def _flag(self, raw: Mapping[str, Any], name: str, origin: str) -> Any:
        if name not in raw:
            remedy = (
                "Name the columns of the flags in adapter.chosen_safe and adapter.rejected_safe, or set both to null "
                f"if there are none. {_ASSUME_SAFE}"
            )
            raise RowError(origin, name, None, f"the field '{name}' is missing", remedy)
        return raw[name]


def _last(turns: tuple[Message, ...], origin: str, name: str) -> str:
    """The content of the last message, which must be the assistant's."""
    if not turns or turns[-1].role != "assistant":
        role = turns[-1].role if turns else None
        raise RowError(origin, name, role, "the last message is not the assistant's")
    return turns[-1].content


def _response(value: Any, prompt: tuple[Message, ...], origin: str, name: str) -> str:
    """The text of a response given as text, as one message, or as the whole conversation."""
    if isinstance(value, str) or not isinstance(value, (list, tuple)):
        return value
    turns = messages(value, origin, name)
    if len(turns) > 1 and turns[:-1] != prompt:
        raise RowError(origin, name, "", "the conversation does not begin with the prompt")
    return _last(turns, origin, name)
