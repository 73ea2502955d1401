"""Adapters: from the raw rows of a dataset's schema to :class:`~bfpo_pl.data.rows.Row`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from bfpo_pl.component import Component, UserError
from bfpo_pl.data.rows import Message, Row, RowError, flag, messages

ASSUME_SAFE = "To take responses without safety flags to be safe, set assume_safe: true in the stream."
"""What to do about a flag that is missing, in words."""
_NOT_EXTRA = ("prompt", "chosen", "rejected", "origin", "cls", "safe", "chosen_safe", "rejected_safe")


class Adapter(Component, ABC):
    """Reads the rows of one schema. A new one needs nothing but ``__call__``.

    ``flag_fields`` names the fields of a raw row that hold safety flags. One that is null is a missing flag; a stream
    with ``assume_safe`` takes the missing ones to say safe.
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
                remedy += f" {ASSUME_SAFE}"
            raise RowError(origin, name, None, f"the field '{name}' is missing", remedy)
        return raw[name]

    def flag(self, raw: Mapping[str, Any], name: str, origin: str) -> float:
        """A safety flag that the schema demands, in a field that ``flag_fields`` names, as a number in [0, 1].

        Raises:
            RowError: The row has no such field, the flag is null, or it is none.
        """
        value = self.field(raw, name, origin)
        if value is None:
            raise RowError(origin, name, None, "the safety flag is missing", ASSUME_SAFE)
        return flag(value, origin, name)


class Messages(Adapter):
    """Conversations for supervised training, as UltraChat has them; the last message is the response.

    Args:
        field_name: The field that holds the list of messages.
    """

    def __init__(self, field_name: str = "messages") -> None:
        self.field_name = field_name

    def __call__(self, raw: Mapping[str, Any], origin: str) -> Row:
        turns = messages(self.field(raw, self.field_name, origin), origin, self.field_name)
        return Row.single(turns[:-1], last_content(turns, origin, self.field_name), origin)


class Columns(Adapter):
    """Any other dataset, by the names of its columns; texts or lists of messages.

    Args:
        prompt: Column of the prompt.
        chosen: Column of the more helpful response (of the only response, if ``rejected`` is null).
        rejected: Column of the other response; null for supervised training.
        chosen_safe: Column of its safety flag; null if there is none. A cell that is null is a missing flag, which
            ``assume_safe: true`` in the stream takes to say safe. Supervised training reads no flags.
        rejected_safe: Column of the other flag; null if there is none.
        extras: Further numeric columns of pairs for labelings to read: ``chosen_x`` with ``rejected_x`` become the
            response column ``x``, any other name a pair column.

    Raises:
        UserError: An extra column has a name that is taken, or flags or extra columns are named without ``rejected``.
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
        _check_extras(self.extras)
        flags_named = chosen_safe not in (None, "chosen_safe") or rejected_safe not in (None, "rejected_safe")
        if rejected is None and (self.extras or flags_named):
            given = "extras" if self.extras else "chosen_safe and rejected_safe"
            raise UserError(
                f"Columns: {given} are columns of pairs, and rejected: null says that there are none. Leave {given} "
                "out, or name the column of the rejected response in rejected."
            )
        self.flag_fields = tuple(name for name in (chosen_safe, rejected_safe) if name is not None)

    def __call__(self, raw: Mapping[str, Any], origin: str) -> Row:
        self._require_columns(raw, origin)
        prompt = messages(raw[self.prompt], origin, self.prompt)
        chosen = _response(raw[self.chosen], prompt, origin, self.chosen)
        if self.rejected is None:
            return Row.single(prompt, chosen, origin)
        flags = [
            None if name is None else self.flag(raw, name, origin) for name in (self.chosen_safe, self.rejected_safe)
        ]
        return Row.pair(
            prompt,
            chosen,
            _response(raw[self.rejected], prompt, origin, self.rejected),
            chosen_safe=flags[0],
            rejected_safe=flags[1],
            origin=origin,
            **{name: self.field(raw, name, origin) for name in self.extras},
        )

    def _require_columns(self, raw: Mapping[str, Any], origin: str) -> None:
        """Names the argument to set where a column has another name."""
        for argument in ("prompt", "chosen", "rejected"):
            name = getattr(self, argument)
            if name is not None and name not in raw:
                has = ", ".join(map(str, raw)) or "no field"
                remedy = f"Set adapter.{argument} to the name of that column; the row has: {has}."
                raise RowError(origin, name, None, f"the field '{name}' is missing", remedy)

    def flag(self, raw: Mapping[str, Any], name: str, origin: str) -> float:
        if raw.get(name) is None:
            reason = "the safety flag is missing" if name in raw else f"the field '{name}' is missing"
            remedy = (
                "Name the columns of the flags in adapter.chosen_safe and adapter.rejected_safe, or set both to null "
                f"if there are none. {ASSUME_SAFE}"
            )
            raise RowError(origin, name, None, reason, remedy)
        return flag(raw[name], origin, name)


def last_content(turns: tuple[Message, ...], origin: str, name: str) -> str:
    """The content of the last message, which must be the assistant's.

    Args:
        turns: The messages.
        origin: Where the row came from.
        name: The field's name.

    Raises:
        RowError: It is not.
    """
    if not turns or turns[-1].role != "assistant":
        role = turns[-1].role if turns else None
        raise RowError(origin, name, role, "the last message is not the assistant's")
    return turns[-1].content


def _check_extras(extras: list[str]) -> None:
    """Demands that extra columns neither take each other's names nor those of what a row has anyway."""
    for name in extras:
        if extras.count(name) > 1:
            raise UserError(f"Columns: extras names '{name}' {extras.count(name)} times. Name it once.")
        if name in ("chosen_safe", "rejected_safe"):
            raise UserError(
                f"Columns: extras cannot have '{name}', which is a safety flag. Leave it out of extras, and name its "
                f"column in the argument {name}."
            )
        if name in _NOT_EXTRA:
            raise UserError(
                f"Columns: extras cannot have '{name}', a name that every row has a use for. Rename the column in the "
                "data."
            )
    sides = {name.removeprefix("chosen_") for name in extras if name.startswith("chosen_")}
    of_responses = {name for name in sides if name and f"rejected_{name}" in extras}
    of_pairs = set(extras) - {f"{side}_{name}" for side in ("chosen", "rejected") for name in of_responses}
    for name in sorted(of_responses & of_pairs):
        raise UserError(
            f"Columns: extras makes '{name}' a pair column, and 'chosen_{name}' with 'rejected_{name}' make it a "
            f"response column as well. Leave '{name}' or the other two out, or rename a column in the data."
        )


def _response(value: Any, prompt: tuple[Message, ...], origin: str, name: str) -> str:
    """The text of a response given as text, as one message, or as the whole conversation."""
    if isinstance(value, str) or not isinstance(value, (list, tuple)):
        return value
    turns = messages(value, origin, name)
    if len(turns) > 1 and turns[:-1] != prompt:
        raise RowError(origin, name, "", "the conversation does not begin with the prompt")
    return last_content(turns, origin, name)
