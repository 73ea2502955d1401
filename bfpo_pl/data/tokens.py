"""From conversations to text to token ids, batch by batch, with one tokenizer and one chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError as JinjaError
from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerFast

from bfpo_pl.component import UserError

Conversation = list[dict[str, str]]
"""Messages in order, each with ``role`` and ``content``."""
_TEXTS_AT_ONCE = 256  # larger batches are no faster, and keep all their encodings in memory
_NEUTRAL = ("\n", "0", ".", "a")  # texts of which one merges with no given text that follows it


class TemplateError(UserError):
    """The chat template or the tokenizer cannot say where a prompt ends and a response begins."""


class Refusal(TemplateError):
    """The chat template refuses a conversation.

    Args:
        roles: The roles of its messages.
        words: What the template says.
    """

    def __init__(self, roles: str, words: str) -> None:
        self.roles, self.words = roles, words
        super().__init__(f"the chat template refuses a conversation of {roles}: {words}.")

    def __reduce__(self) -> tuple[Any, ...]:
        return Refusal, (self.roles, self.words)


class ChatTokenizer:
    """Renders conversations and encodes text.

    Args:
        tokenizer: A transformers tokenizer.
        jinja: The chat template itself.
        variables: Further variables for the template.
        stop_tokens: Tokens that end a response besides the tokenizer's end-of-sequence token.
        stop_ids: The same as token ids.

    Raises:
        TemplateError: The tokenizer has no end-of-sequence token, or lacks one of the stop tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        jinja: str,
        variables: Mapping[str, Any],
        stop_tokens: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise TemplateError("The tokenizer has no end-of-sequence token; a response needs one to end with.")
        self.tokenizer, self.jinja, self.variables = tokenizer, jinja, dict(variables)
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int = tokenizer.eos_token_id
        self.stop_ids = frozenset({self.eos_id, *stop_ids, *map(self._known_id, stop_tokens)})
        # A model may know more tokens than its tokenizer does.
        self.stop_tokens = tuple(sorted({tokenizer.decode([i]) for i in self.stop_ids if i < len(tokenizer)} - {""}))
        self._neutral = self._neutral_beginnings()
        self._special = None if getattr(tokenizer, "split_special_tokens", False) else _any_of(special_texts(tokenizer))

    def special_in(self, text: str) -> str | None:
        """The first special token that a text holds and that is read as such; None if it holds none.

        Args:
            text: The text.
        """
        found = None if self._special is None else self._special.search(text)
        return None if found is None else found[0]

    def render(self, conversations: list[Conversation], generation: bool) -> list[str]:
        """The conversations as text.

        Args:
            conversations: The conversations.
            generation: Whether the header of an assistant's turn follows.

        Raises:
            Refusal: The template refuses one of them.
            TemplateError: It is no jinja template.
        """
        if not conversations:
            return []
        try:
            return self.tokenizer.apply_chat_template(
                conversations,
                chat_template=self.jinja,
                tokenize=False,
                add_generation_prompt=generation,
                **self.variables,
            )
        except TemplateSyntaxError as error:
            raise TemplateError(
                f"the chat template cannot be compiled: line {error.lineno}: {error.message}. Mend it, or set another "
                "one as data.template.chat_template."
            ) from error
        except JinjaError as error:
            roles = ", ".join(turn["role"] for turn in conversations[0])
            raise Refusal(roles, str(error).rstrip(".")) from error

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without tokens that the tokenizer would put around it.

        Args:
            texts: The texts.
        """
        given: list[list[int]] = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            given += self._ids_at_once(list(texts[start : start + _TEXTS_AT_ONCE]))
        return given

    def continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that follow other text: without the space that sentencepiece puts before a first word.

        Args:
            texts: The texts.

        Raises:
            TemplateError: The tokenizer merges a text with whatever stands before it.
        """
        if self._neutral is None:
            return self.ids(texts)
        given: list[list[int] | None] = [None] * len(texts)
        for before, beginning in self._neutral.items():
            left = [index for index, ids in enumerate(given) if ids is None]
            for index, ids in zip(left, self.ids([before + texts[index] for index in left]), strict=True):
                if ids[: len(beginning)] == beginning:
                    given[index] = ids[len(beginning) :]
        if None in given:
            raise TemplateError("the tokenizer merges the beginning of a response with any text before it.")
        return [ids for ids in given if ids is not None]

    def with_bos(self, ids: list[int]) -> list[int]:
        """A rendered prompt's token ids with the beginning-of-sequence token once in front, if there is one.

        Args:
            ids: Its tokens; the template may have written that token already.
        """
        if self.bos_id is None:
            return ids
        while len(ids) > 1 and ids[0] == ids[1] == self.bos_id:
            ids = ids[1:]
        return ids if ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def to_stop(self, ids: list[int]) -> list[int]:
        """A response's token ids up to its first stop token; with the end-of-sequence token after them if none is.

        Args:
            ids: Its tokens.
        """
        if self.stop_ids.isdisjoint(ids):
            return [*ids, self.eos_id]
        return ids[: 1 + min(ids.index(stop) for stop in self.stop_ids if stop in ids)]

    def _ids_at_once(self, texts: list[str]) -> list[list[int]]:
        kind = type(self.tokenizer)
        if not isinstance(self.tokenizer, PreTrainedTokenizerFast) or (
            kind._encode_plus is not PreTrainedTokenizerFast._encode_plus
            or kind.__call__ is not PreTrainedTokenizerFast.__call__
        ):  # a tokenizer with Python code of its own
            return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)[
                "input_ids"
            ]
        # What the call above would do, without the offsets and masks that nobody here reads. Other callers may have
        # left settings behind.
        backend: Any = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = bool(self.tokenizer.split_special_tokens)
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _known_id(self, token: str) -> int:
        index = self.tokenizer.convert_tokens_to_ids(token)
        if index is None or index == self.tokenizer.unk_token_id:
            raise TemplateError(f"data.template.stop_tokens: the tokenizer has no token {token!r}.")
        return index

    def _neutral_beginnings(self) -> dict[str, list[int]] | None:
        """Tokens of short texts, if this tokenizer puts a space before any text (sentencepiece); None if not."""
        line, after, alone = self.ids(["\n", "\na", "a"])
        if not line or after[: len(line)] != line or after[len(line) :] == alone:
            return None
        return dict(zip(_NEUTRAL, self.ids(_NEUTRAL), strict=True))


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of the tokens that are no text.

    Args:
        tokenizer: A transformers tokenizer.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}


def special_texts(tokenizer: Any) -> list[str]:
    """The tokens that are no text, as they are written.

    Args:
        tokenizer: A transformers tokenizer.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    texts = {*tokenizer.all_special_tokens, *(token.content for token in added.values() if token.special)}
    return sorted(texts - {""})


def _any_of(texts: Sequence[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True)))) if texts else None


def common_end(first: str, second: str) -> str:
    """The longest text that both end in.

    Args:
        first: A text.
        second: Another text.
    """
    pairs = zip(reversed(first), reversed(second), strict=False)
    size = next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
    return first[len(first) - size :]


def require_prefix(full: str, prompt: str) -> None:
    """Demands that a rendered conversation begins with its rendered prompt, and goes on after it.

    Args:
        full: The rendered conversation.
        prompt: The rendered prompt.

    Raises:
        TemplateError: It does not.
    """
    if full.startswith(prompt):
        if len(full) > len(prompt):
            return
        raise TemplateError("The chat template writes nothing for the response. Set data.template.chat_template.")
    same = next((i for i, (a, b) in enumerate(zip(full, prompt, strict=False)) if a != b), len(full))
    raise TemplateError(
        "The chat template renders the prompt otherwise when a response follows, so no token boundary lies "
        f"between them (they part at character {same}: {prompt[same : same + 20]!r} against "
        f"{full[same : same + 20]!r}). Set data.template.kwargs (for instance enable_thinking), or "
        "data.template.chat_template."
    )
