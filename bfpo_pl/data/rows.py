"""Rows: one validated record for every dataset, strict about what a preference pair must have."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_LONGEST_VALUE = 60
# All that Unicode has for spaces, control characters and invisible marks, and the letters and signs that are blank.
_BLANK = "".join(c for c in map(chr, range(0x3001)) if c.isspace() or unicodedata.category(c) in ("Cc", "Cf"))
_BLANK += "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\ufeff\uffa0" + "".join(map(chr, range(0xFE00, 0xFE10)))
_NOT_TEXT = (
    "In a CSV file a column of nothing but numbers or true/false is read as such, quoted or not: write such rows as "
    "JSON lines, with the text in quotes."
)
_ROLES = ("system", "user", "assistant")


def abbreviated(value: Any) -> str:
    """The value as it appears in messages: its repr, at most 60 characters (rows hold offensive text)."""
    text = repr(value[:_LONGEST_VALUE] if isinstance(value, str) else value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"


class RowError(ValueError):
    """A row that cannot be used.

    Args:
        origin: Where the row came from, for instance ``file.jsonl:12``.
        field: The field at fault.
        value: Its value; messages show at most 60 characters of it.
        reason: What is wrong, without the value: rows are counted by it.
        remedy: What to do about it.
    """

    def __init__(self, origin: str, field: str, value: Any, reason: str, remedy: str = "") -> None:
        self.origin, self.field, self.reason, self.remedy = origin, field, reason, remedy
        self.value = abbreviated(value)
        super().__init__(f"{origin}: {field} = {self.value}: {reason}." + (f" {remedy}" if remedy else ""))


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Args:
        role: ``system``, ``user`` or ``assistant``.
        content: Its text.
    """

    role: str
    content: str


@dataclass(frozen=True)
class Row:
    """A prompt with its k ≥ 1 responses, pairs among them, and what is known about them. Always valid.

    Args:
        prompt: The turns up to the response: perhaps a system message, then user and assistant in turn, user last.
        responses: Texts of the responses.
        pairs: (chosen, rejected) indices into the responses; empty for supervised and unary rows.
        columns: Per-response columns, one number a response, for instance ``safe``.
        pair_columns: Per-pair columns, one number a pair.
        origin: Where the row came from, for messages alone.

    Raises:
        RowError: Something in it cannot be used.
    """

    prompt: tuple[Message, ...]
    responses: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...] = ()
    columns: dict[str, tuple[float, ...]] = field(default_factory=dict)
    pair_columns: dict[str, tuple[float, ...]] = field(default_factory=dict)
    origin: str = ""

    def __post_init__(self) -> None:
        _check_prompt(self.prompt, self.origin)
        names = response_names(self.responses, self.pairs)
        if not self.responses:
            raise RowError(self.origin, "responses", self.responses, "there is no response")
        for name, response in zip(names, self.responses, strict=True):
            _check_text(response, self.origin, name)
        for chosen, rejected in self.pairs:
            if not (0 <= chosen < len(names) and 0 <= rejected < len(names)):
                raise RowError(self.origin, "pairs", (chosen, rejected), "a pair points outside the responses")
            if self.responses[chosen] == self.responses[rejected]:
                raise RowError(
                    self.origin,
                    names[rejected],
                    self.responses[rejected],
                    "the chosen and the rejected response are identical",
                    "Such a pair teaches nothing; leave it out.",
                )
        self._check_columns()

    def _check_columns(self) -> None:
        sizes = ((self.columns, len(self.responses)), (self.pair_columns, len(self.pairs)))
        for table, size in sizes:
            for name, values in table.items():
                if len(values) != size:
                    raise RowError(self.origin, name, values, f"the column has {len(values)} values, not {size}")
                check = flag if name == "safe" else number
                for value in values:
                    check(value, self.origin, name)

    @classmethod
    def pair(
        cls,
        prompt: str | Sequence[Any],
        chosen: str,
        rejected: str,
        chosen_safe: Any = None,
        rejected_safe: Any = None,
        origin: str = "",
        **extras: Any,
    ) -> Row:
        """A prompt with two responses, the more helpful one first.

        Args:
            prompt: Its text, or a list of messages (``role``, ``content``).
            chosen: The more helpful response.
            rejected: The other response.
            chosen_safe: True, False, 1, 0 or the probability of being safe; None if unknown.
            rejected_safe: The same of the other response.
            origin: Where the row came from.
            **extras: Further numbers. ``chosen_x`` with ``rejected_x`` become the response column ``x``, any other
                name a pair column.
        """
        columns: dict[str, tuple[float, ...]] = {}
        if chosen_safe is not None or rejected_safe is not None:
            flags = {"chosen_safe": chosen_safe, "rejected_safe": rejected_safe}
            columns["safe"] = tuple(flag(value, origin, name) for name, value in flags.items())
        pair_columns: dict[str, tuple[float, ...]] = {}
        for name, value in extras.items():
            side, _, column = name.partition("_")
            other = {"chosen": "rejected", "rejected": "chosen"}.get(side)
            if other is None or not column or f"{other}_{column}" not in extras:
                pair_columns[name] = (number(value, origin, name),)
            elif side == "chosen":
                sides = (name, f"rejected_{column}")
                columns[column] = tuple(number(extras[key], origin, key) for key in sides)
        return cls(messages(prompt, origin), (chosen, rejected), ((0, 1),), columns, pair_columns, origin)

    @classmethod
    def single(cls, prompt: str | Sequence[Any], response: str, origin: str = "") -> Row:
        """A prompt with the one response that supervised training imitates.

        Args:
            prompt: Its text, or a list of messages (``role``, ``content``).
            response: The response.
            origin: Where the row came from.
        """
        return cls(messages(prompt, origin), (response,), origin=origin)


def messages(value: Any, origin: str, name: str = "prompt") -> tuple[Message, ...]:
    """Reads text (one user message) or a list of messages; the order of roles is checked by :class:`Row`.

    Args:
        value: The text or the list.
        origin: Where the row came from.
        name: The field's name.

    Raises:
        RowError: It is neither.
    """
    if isinstance(value, str):
        return (Message("user", value),)
    if not isinstance(value, (list, tuple)):
        raise RowError(origin, name, value, "it is neither text nor a list of messages", _remedy_for_no_text(value))
    turns = []
    for index, item in enumerate(value):
        if isinstance(item, Message):
            turns.append(item)
        elif isinstance(item, Mapping) and "role" in item and "content" in item:
            turns.append(Message(item["role"], item["content"]))
        else:
            raise RowError(origin, f"{name}[{index}]", item, "a message must have the keys 'role' and 'content'")
    return tuple(turns)


def flag(value: Any, origin: str, name: str) -> float:
    """A safety flag as a number in [0, 1]; strings are refused, for any text would count as true.

    Raises:
        RowError: It is not True, False, 0, 1 or a probability.
    """
    if value is None:
        reason, remedy = "the safety flag is missing", "Both flags of a pair must be given, or neither."
        raise RowError(origin, name, value, reason, remedy)
    if isinstance(value, (bool, int, float)) and 0 <= value <= 1:
        return float(value)
    reason = "a safety flag must be true, false, 0, 1 or a probability in [0, 1]"
    remedy = "Convert the column, or write an adapter that does."
    if isinstance(value, str):
        remedy += " In a CSV file one cell that is not true, false or a number makes the whole column text."
    raise RowError(origin, name, value, reason, remedy)


def number(value: Any, origin: str, name: str) -> float:
    """A finite number.

    Raises:
        RowError: It is not one.
    """
    try:
        if isinstance(value, (bool, int, float)) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer beyond the range of floats
        pass
    raise RowError(origin, name, value, "the column must hold finite numbers")


def response_names(responses: Sequence[str], pairs: Sequence[tuple[int, int]]) -> list[str]:
    """What messages call the responses of a row.

    Args:
        responses: The responses.
        pairs: The pairs among them.
    """
    if len(responses) == 1:
        return ["response"]
    if tuple(pairs) == ((0, 1),) and len(responses) == 2:
        return ["chosen", "rejected"]
    return [f"responses[{index}]" for index in range(len(responses))]


def _check_text(value: Any, origin: str, name: str) -> None:
    if not isinstance(value, str):
        raise RowError(origin, name, value, "it is not text", _remedy_for_no_text(value))
    if not value.strip(_BLANK):
        raise RowError(origin, name, value, "the text is empty")
    _check_encodable(value, origin, name)


def _remedy_for_no_text(value: Any) -> str:
    return _NOT_TEXT if isinstance(value, (bool, int, float)) else ""


def _check_encodable(value: str, origin: str, name: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        reason = "the text has half of a surrogate pair, which is no character and has no UTF-8 form"
        remedy = "Where the file was written, such text was cut or decoded wrongly; mend or remove it."
        raise RowError(origin, name, value[error.start : error.end], reason, remedy) from error


def _check_prompt(turns: Sequence[Message], origin: str) -> None:
    if not turns:
        raise RowError(origin, "prompt", [], "the prompt has no message")
    order = "Messages must be: perhaps one system message, then user and assistant in turn, user last."
    expected = "user"
    for index, turn in enumerate(turns):
        name = "prompt" if len(turns) == 1 else f"prompt[{index}]"
        if turn.role not in _ROLES:
            raise RowError(origin, f"{name}.role", turn.role, "unknown role", f"Roles: {', '.join(_ROLES)}.")
        if turn.role == "system" and index == 0:
            if not isinstance(turn.content, str):
                raise RowError(origin, name, turn.content, "it is not text")
            _check_encodable(turn.content, origin, name)
            continue
        if turn.role != expected:
            raise RowError(origin, f"{name}.role", turn.role, "roles are out of order", order)
        _check_text(turn.content, origin, name)
        expected = "assistant" if expected == "user" else "user"
    if expected == "user":
        raise RowError(origin, "prompt", turns[-1].role, "the prompt does not end with a user message", order)
