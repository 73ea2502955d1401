"""A guard against training on prompts that an evaluation asks."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

import numpy as np
import regex

from bfpo_pl.component import Component, UserError, check_range
from bfpo_pl.data.checked import CheckedRows, text_hash
from bfpo_pl.data.files import LocalFiles
from bfpo_pl.data.rows import Message, RowError, messages

_ALONE = r"\p{Han}\p{Hiragana}\p{Katakana}"  # scripts without spaces: every character counts as a word
_WORD = regex.compile(rf"[{_ALONE}]|(?:(?![{_ALONE}])[\w\p{{M}}])+")
_ROWS_AT_ONCE = 1024


class ContaminationGuard(Component):
    """Leaves out training rows whose prompt an evaluation file has; says how many.

    A prompt matches if its words are those of an evaluation prompt, case and punctuation aside, or if it shares
    `ngram` words in a row with one.

    Args:
        path: File, folder or glob of the evaluation, in any format that `LocalFiles` reads; or a list of them.
        field: Field that holds the prompt: text, or a list of messages.
        ngram: Words in a row that make a match.
    """

    def __init__(self, path: str | list[str], field: str = "prompt", ngram: int = 13) -> None:
        self.path, self.field = path, field
        self.ngram = int(check_range(self, "ngram", ngram, 1))
        self._known: tuple[set[int], set[int]] | None = None

    def matches(self, rows: CheckedRows, indices: np.ndarray) -> list[int]:
        """The ``prompt_key`` of every row whose prompt matches.

        Args:
            rows: The checked rows.
            indices: Rows to look at, in ascending order.

        Raises:
            UserError: The evaluation cannot be read.
        """
        whole, grams = self._evaluation()
        keys, found = rows.numbers("prompt_key"), []
        for first in range(0, len(indices), _ROWS_AT_ONCE):
            some = indices[first : first + _ROWS_AT_ONCE]
            for index, row in zip(some, rows.rows(some), strict=True):
                words = _words(row.prompt)
                if text_hash(" ".join(words)) in whole or any(gram in grams for gram in self._grams(words)):
                    found.append(int(keys[index]))
        return found

    def _evaluation(self) -> tuple[set[int], set[int]]:
        if self._known is None:
            whole: set[int] = set()
            grams: set[int] = set()
            for origin, raw in LocalFiles(self.path).rows("train"):
                if isinstance(raw, RowError):
                    raise UserError(f"data.contamination: {raw}")
                if self.field not in raw:
                    raise UserError(
                        f"data.contamination: {origin} has no field '{self.field}'; it has: {', '.join(raw)}. Set "
                        "data.contamination.field."
                    )
                try:
                    words = _words(messages(raw[self.field], origin, self.field))
                except RowError as error:
                    raise UserError(f"data.contamination: {error}") from error
                whole.add(text_hash(" ".join(words)))
                grams.update(self._grams(words))
            if not whole:
                raise UserError(f"data.contamination: {self.path} has no row.")
            self._known = whole, grams
        return self._known

    def _grams(self, words: list[str]) -> Iterator[int]:
        for first in range(len(words) - self.ngram + 1):
            yield text_hash(" ".join(words[first : first + self.ngram]))


def _words(prompt: tuple[Message, ...]) -> list[str]:
    """The words of what the user says, without case and punctuation; the text itself if it has none."""
    text = " ".join(turn.content for turn in prompt if turn.role == "user")
    text = unicodedata.normalize("NFKC", text).casefold()
    return _WORD.findall(text) or [text.strip()]
