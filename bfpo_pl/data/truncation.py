"""What becomes of rows that are too long."""

from __future__ import annotations

from typing import Literal

from bfpo_pl.component import Component, check_range
from bfpo_pl.data.tokens import TemplateError

Fitted = tuple[list[int], list[list[int]]]
"""Tokens of a prompt and of each of its responses."""


class TooLong(ValueError):
    """A row that cannot be used because of its length.

    Args:
        tokens: Tokens of the prompt with the longest response.
        reason: Why it cannot, without its own numbers: rows are counted by it.
        remedy: What to do about it.
    """

    def __init__(self, tokens: int, reason: str, remedy: str) -> None:
        self.tokens, self.reason, self.remedy = tokens, reason, remedy
        super().__init__(f"{tokens} tokens: {reason}. {remedy}")


class Truncation(Component):
    """The standard policy: cuts what is too long; every cut is counted.

    A prompt is cut only if it does not fit together with its longest response, and then for all responses alike;
    a beginning-of-sequence token and what the template writes after the prompt's text (the end of the user's turn, the
    header of the assistant's) always stay. Responses that still do not fit lose their end.

    Args:
        max_length: Most tokens of a prompt with one of its responses.
        max_prompt_length: Tokens that a cut prompt keeps.
        keep: Which end of a cut prompt stays.
    """

    def __init__(
        self, max_length: int = 1024, max_prompt_length: int = 512, keep: Literal["end", "start"] = "end"
    ) -> None:
        self.max_length = int(check_range(self, "max_length", max_length, 2))
        self.max_prompt_length = int(check_range(self, "max_prompt_length", max_prompt_length, 1, max_length - 1))
        self.keep = keep

    def fits(self, prompt_ids: list[int], response_ids: list[list[int]]) -> bool:
        """Whether a row stays as it is; `fit` is asked only about rows that do not.

        Args:
            prompt_ids: Tokens of the prompt.
            response_ids: Tokens of each response.
        """
        return len(prompt_ids) + max(map(len, response_ids)) <= self.max_length

    def fit(self, prompt_ids: list[int], response_ids: list[list[int]], head: int, tail: int) -> Fitted:
        """The prompt and the responses, cut to fit.

        Args:
            prompt_ids: Tokens of the prompt.
            response_ids: Tokens of each response.
            head: How many of the prompt's first tokens always stay (the beginning-of-sequence token).
            tail: How many of the prompt's last tokens always stay (those that the template writes after its text).

        Raises:
            TooLong: The row is to be left out instead.
            TemplateError: What always stays does not fit.
        """
        prompt = prompt_ids
        room = self.max_prompt_length
        if len(prompt) > room:
            if room < head + tail:
                raise TemplateError(
                    f"data.truncation.max_prompt_length = {room} is less than the {head + tail} tokens that always "
                    "stay: those that the template writes before and after the prompt's text. Raise it."
                )
            first, last = (head, room - head) if self.keep == "end" else (room - tail, tail)
            prompt = prompt[:first] + prompt[len(prompt) - last :]
        left = self.max_length - len(prompt)  # at least one: a prompt that stayed whole is below max_length, too
        return prompt, [ids[:left] for ids in response_ids]


class DropLong(Truncation):
    """Cuts nothing: rows that are too long are left out, and counted among the bad rows.

    Args:
        max_length: Most tokens of a prompt with one of its responses.
    """

    def __init__(self, max_length: int = 1024) -> None:
        self.max_length = int(check_range(self, "max_length", max_length, 2))

    def fit(self, prompt_ids: list[int], response_ids: list[list[int]], head: int, tail: int) -> Fitted:
        raise TooLong(
            len(prompt_ids) + max(map(len, response_ids)),
            f"the row is longer than data.truncation.max_length = {self.max_length}",
            "Raise data.truncation.max_length, or set data.truncation: Truncation to cut such rows.",
        )


class OfficialTruncation(Truncation):
    """Cuts as the paper's official code does; every cut is counted.

    With L tokens in the row's longest response: if prompt + L do not fit, the prompt becomes its last
    `max_prompt_length` tokens, without its beginning-of-sequence token. If it still does not fit, every response
    becomes its first `max_length - max_prompt_length` tokens, even one that a short prompt would leave room for; a
    response that is cut loses its end-of-sequence token.

    Args:
        max_length: Most tokens of a prompt with one of its responses.
        max_prompt_length: Tokens that a cut prompt keeps.
    """

    def __init__(self, max_length: int = 1024, max_prompt_length: int = 512) -> None:
        self.max_length = int(check_range(self, "max_length", max_length, 2))
        self.max_prompt_length = int(check_range(self, "max_prompt_length", max_prompt_length, 1, max_length - 1))

    def fit(self, prompt_ids: list[int], response_ids: list[list[int]], head: int, tail: int) -> Fitted:
        prompt = prompt_ids[-self.max_prompt_length :]
        if self.fits(prompt, response_ids):
            return prompt, response_ids
        most = self.max_length - self.max_prompt_length
        return prompt, [ids[:most] for ids in response_ids]
