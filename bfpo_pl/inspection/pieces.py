"""What each token of a sequence adds to its text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\ufffd"
_ESCAPES = {ord("\\"): "\\\\", ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\\t"}


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; joined, the decoded sequence.

    A character that several tokens make up belongs to the last of them; the others add nothing.

    Args:
        tokenizer: A transformers tokenizer.
        ids: Token ids of the whole sequence.
    """
    # A token is decoded after the one before it: some tokenizers put spaces between tokens, or take the first away.
    found, before, start = [], 0, 0
    for end in range(1, len(ids) + 1):
        known, text = decoded(tokenizer, ids[before:start]), decoded(tokenizer, ids[before:end])
        if text.endswith(_UNFINISHED) and end < len(ids):
            found.append("")
            continue
        found.append(text[len(known) :])
        before, start = start, end
    return found


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of token ids, special tokens among it.

    Args:
        tokenizer: A transformers tokenizer.
        ids: The ids.
    """
    plain = [int(index) for index in ids]
    return tokenizer.decode(plain, skip_special_tokens=False, clean_up_tokenization_spaces=False) if plain else ""


def escaped(text: str) -> str:
    """A text on one line, with line breaks and everything else that cannot be seen written out.

    Args:
        text: The text.
    """
    text = text.translate(_ESCAPES)
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text
    )


def shortened(text: str, most: int = 60) -> str:
    """The first words of a text.

    Args:
        text: The text.
        most: Most characters.
    """
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most + 1].rpartition(" ")[0] or text[:most]
